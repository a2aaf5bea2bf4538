"""Items of text files: a whole file, its lines, or JSON values on its lines.

Lines end at \\n alone and are counted from 1, so that numbers agree with an editor's and a byte offset is enough to start at.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kdcache.errors import InputError
from kdcache.inputs.content import Fields, Item, Place, parse_content, parse_domain


def read_txt(path: str, file: int, start: Place) -> Iterator[Item]:
    """The one item of a file: all of it."""
    if start.number:
        return
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    yield Item(_decode(data.removeprefix(codecs.BOM_UTF8), path, first_line=1), path, Place(file, 0, 0))


def read_lines(path: str, file: int, start: Place) -> Iterator[Item]:
    """An item for each line, without its line end; a blank line is an empty item."""
    for line, place in _lines(path, file, start):
        number = place.number + 1
        yield Item(_decode(line, path, first_line=number).removesuffix("\r"), f"{path}:{number}", place)


def read_jsonl(path: str, file: int, start: Place, *, fields: Fields) -> Iterator[Item]:
    """An item for each JSON object; blank lines between them are no items.

    Raises:
        InputError: a line that is no JSON object, that lacks a field, or whose field is of the wrong type.
    """
    decoder = msgspec.json.Decoder()
    for line, place in _lines(path, file, start):
        if not line.strip():
            continue
        where = f"{path}:{place.number + 1}"
        try:
            value = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise InputError(f"{where}: holds a {type(value).__name__}, but a JSON object was expected")
        for name in fields.names:
            if name not in value:
                there = ", ".join(map(repr, value)) or "none"
                raise InputError(f"{where}: no field {name!r}; the line has {there} (see {fields.option(name)})")
        content = parse_content(value[fields.content], fields.kind, f"{where}: field {fields.content!r}")
        domain = parse_domain(value[fields.domain], f"{where}: field {fields.domain!r}") if fields.domain else ""
        yield Item(content, where, place, domain)


def _lines(path: str, file: int, start: Place) -> Iterator[tuple[bytes, Place]]:
    offset, number = start.offset, start.number
    try:
        with open(path, "rb") as stream:
            stream.seek(offset)
            for line in stream:
                content = line.removesuffix(b"\n")
                yield content.removeprefix(codecs.BOM_UTF8) if offset == 0 else content, Place(file, offset, number)
                offset, number = offset + len(line), number + 1
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _decode(data: bytes, path: str, *, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise InputError(
            f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); convert the file to UTF-8"
        ) from error
