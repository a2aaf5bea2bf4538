"""The JSON values of a file in bounded memory: on lines, in an array, or printed over several lines."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from kdcache.errors import InputError
from kdcache.inputs.content import BEGINNING, Start
from kdcache.inputs.formats.open_file import TextStream

_CHUNK_BYTES = 2**18
_SPACE = b" \t\r\n"
_STRUCTURE = re.compile(rb'[][{}"]')
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_BLANK = re.compile(rb"[ \t\r\n]*+")


class Value(NamedTuple):
    """The bytes of one value, where it stands (`a.jsonl:17`: a line; `a.json#3`: the fourth value), and where it starts."""

    data: bytes
    where: str
    start: Start


def read_values(stream: TextStream, path: str, start: Start) -> Iterator[Value]:
    """Yield the values from `start` on, without decoding them.

    Raises:
        InputError: the file is cut, or an array holds anything but objects.
    """
    if stream.layout is None:
        stream.layout = _layout(stream, path)
    stream.seek(start.offset)
    if stream.layout == "lines":
        for line, line_start in read_lines(stream, path, start):
            if line.strip():
                # Also inside a file, where files were joined: a value does not begin with it.
                yield Value(line.removeprefix(codecs.BOM_UTF8), f"{path}:{line_start.item_index + 1}", line_start)
    else:
        yield from _Objects(stream, path, stream.layout == "array").read(start)


def read_lines(stream: TextStream, path: str, start: Start) -> Iterator[tuple[bytes, Start]]:
    """Yield the lines from `start` on without their line ends, and without a byte order mark before the first."""
    offset, index = start.offset, start.item_index
    stream.seek(offset)
    most = stream.max_item_bytes
    while line := stream.readline(most):
        content = line.removesuffix(b"\n")
        if len(line) == most and not line.endswith(b"\n"):
            raise InputError(f"{path}:{index + 1}: a line of more than {most:,} bytes; split it")
        yield content.removeprefix(codecs.BOM_UTF8) if offset == 0 else content, Start(start.file_index, offset, index)
        offset, index = offset + len(line), index + 1


def _layout(stream: TextStream, path: str) -> str:
    """Tell the layout: `lines`, `array`, or `printed` (objects over several lines). Anything else is read as lines."""
    lines = (line for line, _ in read_lines(stream, path, BEGINNING) if line.strip())
    stream.seek(0)
    head = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip(_SPACE)
    if head.startswith(b"["):  # whose one line may be the whole file
        return "array"
    first = next(lines, b"")
    if not first.lstrip().startswith(b"{") or _is_object(first):
        return "lines"
    end = _end_of_object(first, first.index(b"{")).end
    if end:  # more follows it: another object, or a line that is not JSON
        return "printed" if _is_object(first[:end]) and first[end:].lstrip().startswith(b"{") else "lines"
    second = next(lines, b"")
    return "lines" if not second or _is_object(second) else "printed"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


class _Scan(NamedTuple):
    """How far an object has been scanned: its end, if known, and where to resume with how many brackets open."""

    end: int
    at: int
    depth: int


def _end_of_object(data: bytes, at: int, depth: int = 0) -> _Scan:
    """Find where the object ends that starts at `at`, or was scanned up to there; 0 if its end is not in the data."""
    while (found := _STRUCTURE.search(data, at)) is not None:
        byte = found.group()
        if byte == b'"':
            string = _STRING.match(data, found.start())
            if string is None:
                return _Scan(0, found.start(), depth)
            at = string.end()
            continue
        at = found.end()
        depth += 1 if byte in b"[{" else -1
        if depth == 0:
            return _Scan(at, at, 0)
    return _Scan(0, len(data), depth)


class _Objects:
    """Cuts a stream into objects: those of one array, with commas between them, or one after another."""

    def __init__(self, stream: TextStream, path: str, is_array: bool) -> None:
        self._stream, self._path, self._is_array = stream, path, is_array
        self._data, self._base = b"", stream.tell()

    def read(self, start: Start) -> Iterator[Value]:
        at, index = 0, start.item_index
        if start.offset == 0:
            at = self._blank(3 if self._more().startswith(codecs.BOM_UTF8) else 0) + self._is_array
        while (at := self._blank(at)) < len(self._data):
            if self._is_array and self._data[at : at + 1] == b"]":
                self._check_end(at + 1)
                return
            if index != start.item_index and self._is_array:
                at = self._comma(at, index)
            where = f"{self._path}#{index}"
            at, end = self._object(at, where)
            yield Value(self._data[at:end], where, Start(start.file_index, self._base + at, index))
            at, index = end, index + 1
        if self._is_array:
            raise InputError(f"{self._path}: the file is cut off within its array, after {index:,} values")

    def _object(self, at: int, where: str) -> tuple[int, int]:
        if self._data[at : at + 1] != b"{":
            shown = self._data[at : at + 40].decode("utf-8", "replace").split("\n")[0]
            raise InputError(f"{where}: expected a JSON object, which starts with '{{', but found {shown!r}")
        scan = _end_of_object(self._data, at)
        while not scan.end:
            if len(self._data) - at > self._stream.max_item_bytes:
                raise InputError(f"{where}: an object of more than {self._stream.max_item_bytes:,} bytes; split it")
            dropped = at
            if not self._more(at):
                raise InputError(f"{where}: not JSON: the file ends within this object")
            at = 0
            scan = _end_of_object(self._data, scan.at - dropped, scan.depth)
        return at, scan.end

    def _comma(self, at: int, index: int) -> int:
        if self._data[at : at + 1] != b",":
            raise InputError(f"{self._path}: not JSON: no comma after value {index - 1} of the array")
        return self._blank(at + 1)

    def _check_end(self, at: int) -> None:
        at = self._blank(at)
        if at < len(self._data):
            raise InputError(f"{self._path}: not JSON: more text after the end of the array")

    def _blank(self, at: int) -> int:
        """The first offset from `at` on that is not blank; the end of the data at the end of the file."""
        while True:
            found = _BLANK.match(self._data, at)
            assert found is not None
            if found.end() < len(self._data) or not self._more(found.end()):
                return found.end()
            at = 0

    def _more(self, keep_from: int = 0) -> bytes:
        """Read more, and then drop what precedes `keep_from`.

        Reads as much as is kept, so that an object that is scanned in pieces is copied a few times, not once per chunk.
        """
        kept = len(self._data) - keep_from
        more = self._stream.read(max(_CHUNK_BYTES, kept))
        if more:
            self._base += keep_from
            self._data = self._data[keep_from:] + more
        return more
