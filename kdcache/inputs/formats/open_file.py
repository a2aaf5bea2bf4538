"""Text files as streams of bytes; gzip and zstd are recognised by content, whatever the name ends in."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from kdcache.errors import InputError
from kdcache.shown import first_line

MAX_ITEM_BYTES, MAX_INFLATED_ITEM_BYTES = 2**30, 2**28
"""Most bytes of a line or a JSON value, in a plain and in a compressed file; the latter also of a compressed file that is one
text. More is refused, not held in memory."""
MAX_INFLATION = 250
"""Most bytes that a compressed byte may become, beyond the first FREE_BYTES: text comes to 3 to 50, a bomb to 1,000."""
FREE_BYTES = 2**30

GIT_LFS = b"version https://git-lfs.github.com/spec/"
"""How a file begins that only points to its content in a Git repository."""

_GZIP, _ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
_FOREIGN = {
    b"BZh": "bzip2 data: decompress it, or compress it with gzip or zstd",
    b"\xfd7zXZ\0": "xz data: decompress it, or compress it with gzip or zstd",
    b"\x04\x22\x4d\x18": "lz4 data: decompress it, or compress it with gzip or zstd",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"ARROW1\0\0": "an Arrow file: set input.format to 'arrow'",
    b"PAR1\x15": "a Parquet file: set input.format to 'parquet'",
    b"\xff\xfe\0\0": "UTF-32 text: convert it to UTF-8",
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8",
    b"\0\0\xfe\xff": "UTF-32 text: convert it to UTF-8",
    GIT_LFS: "a Git LFS pointer instead of the data: fetch it (git lfs pull)",
    _GZIP: "compressed twice: decompress it once",
    _ZSTD: "compressed twice: decompress it once",
}
"""How files begin that are not text, and what to do with them."""


class TextStream(io.BufferedReader):
    """The bytes of a file; `seek` and `tell` count decompressed ones.

    Attributes:
        layout: how its JSON values are laid out, once that has been found.
    """

    layout: str | None = None

    @property
    def is_compressed(self) -> bool:
        """Whether the bytes are decompressed while they are read."""
        return isinstance(self.raw, _Inflated)

    @property
    def max_item_bytes(self) -> int:
        """Most bytes of one item, see MAX_ITEM_BYTES."""
        return MAX_INFLATED_ITEM_BYTES if self.is_compressed else MAX_ITEM_BYTES


class TextFiles:
    """Opens text files. The compressed one read last stays open, as it only goes forward and units come in order."""

    def __init__(self) -> None:
        self._kept: tuple[str, TextStream] | None = None

    @contextmanager
    def open(self, path: str) -> Iterator[TextStream]:
        """Open the file; call `seek` before reading.

        Raises:
            InputError: it cannot be opened or decompressed, or is not text.
        """
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] != path:
            kept[1].close()
            kept = None
        stream = kept[1] if kept is not None else _open(path)
        try:
            yield stream
        except BaseException as error:
            # A generator that is not read to its end leaves by GeneratorExit, and the stream is as good as before.
            if not isinstance(error, GeneratorExit):
                stream.close()
            if isinstance(error, OSError):
                raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
            raise
        finally:
            if not stream.closed and stream.is_compressed:
                self.close()
                self._kept = path, stream
            else:
                stream.close()

    def close(self) -> None:
        """Close the file that is open."""
        if self._kept is not None:
            self._kept[1].close()
        self._kept = None


def _open(path: str) -> TextStream:
    try:
        plain = open(path, "rb", buffering=0)  # noqa: SIM115 (its reader closes it)
        head = plain.read(4)
        codec = _codec(head)
        plain.seek(0)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if codec is not None:
        plain.close()
        plain = _Inflated(path, codec)
    stream = TextStream(plain, 2**18)
    head = stream.peek(512)
    for beginning, what in _FOREIGN.items():
        if head.startswith(beginning):
            stream.close()
            raise InputError(f"{path}: holds {what}")
    if head[257:262] == b"ustar":
        stream.close()
        raise InputError(f"{path}: holds a tar archive: unpack it")
    return stream


def _codec(head: bytes) -> str | None:
    if head.startswith(_GZIP):
        return "gzip"
    # A file may begin with frames that hold no data.
    is_skippable = len(head) == 4 and head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5
    return "zstd" if head == _ZSTD or is_skippable else None


class _Inflated(io.RawIOBase):
    """The content of a compressed file. Memory: the codec's window (zstd: at most 128 MiB) and what a read asks for."""

    def __init__(self, path: str, codec: str) -> None:
        super().__init__()
        self._path, self._codec = path, codec
        self._begin()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            num_bytes = self._inflated.readinto(buffer)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self._path}: not a whole {self._codec} file: {first_line(error)}") from error
        self._offset += num_bytes
        if self._offset > FREE_BYTES and self._offset > MAX_INFLATION * self._packed.tell():
            raise InputError(
                f"{self._path}: more than {MAX_INFLATION} bytes come out of each byte of this {self._codec} file, "
                "more than text needs; if the file is sound, decompress it first"
            )
        return num_bytes

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        target = offset if whence == os.SEEK_SET else self._offset + offset
        if whence == os.SEEK_END:
            raise io.UnsupportedOperation("the end of a compressed file is not known")
        if target < self._offset:
            self._end()
            self._begin()
        chunk = memoryview(bytearray(2**18))
        while self._offset < target and self.readinto(chunk[: target - self._offset]):
            pass
        return self._offset

    def close(self) -> None:
        if not self.closed:
            self._end()
        super().close()

    def _begin(self) -> None:
        self._packed = pa.OSFile(self._path)
        self._inflated = pa.CompressedInputStream(self._packed, self._codec)
        self._offset = 0

    def _end(self) -> None:
        self._inflated.close()
        self._packed.close()
