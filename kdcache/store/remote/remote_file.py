"""Arrow files in an object store, read by byte ranges: the footer once, then the record batches that are asked for.

A reader of a cache takes whole record batches (`RemoteFile`); an index is made of a few small columns (`open_columns`).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from kdcache.errors import CorruptCacheError
from kdcache.format.arrow_messages import TRAILER_BYTES, MessageSpan, footer_bytes, is_compressed, record_batch_spans
from kdcache.store.files.location import RemotePath

TAIL_BYTES = 64 * 1024
"""Read first of each file: with a record batch of 4 MiB, the footer of a file of 10 GiB."""
READ_AHEAD_BYTES = 128 * 1024
"""Around a small column: the metadata of a record batch and the columns of its text are in front of everything else."""

ReadRange = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Layout:
    """What a footer says: the schema, and where each record batch is."""

    schema: pa.Schema
    messages: Sequence[MessageSpan]


def read_tail(read: ReadRange, num_bytes: int) -> bytes:
    """Read the end of a file of this many bytes, with its whole footer.

    Raises:
        CorruptCacheError: the file has no footer.
    """
    tail = read(max(0, num_bytes - TAIL_BYTES), num_bytes)
    try:
        needed = footer_bytes(memoryview(tail)) + TRAILER_BYTES
    except struct.error as error:
        raise CorruptCacheError(f"not an Arrow file: {error}") from error
    if needed > num_bytes:
        raise CorruptCacheError(f"not an Arrow file: a footer of {needed} bytes in a file of {num_bytes}")
    return tail if needed <= len(tail) else read(num_bytes - needed, num_bytes)


def parse_tail(tail: memoryview, num_bytes: int) -> Layout:
    """Parse the end of a file: what it says of the rest. Everything is checked to be inside the file.

    Raises:
        CorruptCacheError: no Arrow footer, dictionaries, or a record batch outside the file.
    """
    try:
        messages = record_batch_spans(tail, num_bytes)
        schema = pa.ipc.open_file(pa.PythonFile(_Ranges(_of_tail(tail, num_bytes), num_bytes, 1), mode="r")).schema
    except (pa.ArrowException, OSError, struct.error) as error:
        raise CorruptCacheError(f"not an Arrow file: {error}") from error
    if messages is None:
        raise CorruptCacheError("has dictionaries, which no file of a cache has")
    return Layout(schema, messages)


def parse_record_batch(block: pa.Buffer, schema: pa.Schema) -> pa.RecordBatch:
    """A record batch from its message: views of the block.

    Raises:
        CorruptCacheError: no record batch of this schema, or one with compressed buffers.
    """
    try:
        if is_compressed(memoryview(block)):
            raise CorruptCacheError("has compressed buffers, which no file of a cache has")
        return pa.ipc.read_record_batch(pa.ipc.read_message(block), schema)
    except (pa.ArrowException, OSError, EOFError, struct.error, ValueError) as error:
        if isinstance(error, CorruptCacheError):
            raise
        raise CorruptCacheError(f"not a record batch: {error}") from error


def open_columns(path: RemotePath, num_bytes: int, names: Sequence[str]) -> pa.RecordBatchFileReader:
    """Open a file of which only some columns are read, and what lies between them.

    Raises:
        CorruptCacheError: no Arrow file, or one with compressed buffers or dictionaries.
    """
    file = _Ranges(path.read_range, num_bytes, READ_AHEAD_BYTES)
    tail = memoryview(read_tail(file.read_range, num_bytes))
    layout = parse_tail(tail, num_bytes)
    for message in layout.messages:
        if is_compressed(memoryview(file.read_range(message.offset, message.offset + message.metadata_bytes))):
            raise CorruptCacheError(f"{path}: has compressed buffers, which no file of a cache has")
    columns = [layout.schema.get_field_index(name) for name in names]
    return pa.ipc.open_file(
        pa.PythonFile(file, mode="r"), options=pa.ipc.IpcReadOptions(included_fields=columns, use_threads=False)
    )


def _of_tail(tail: memoryview, num_bytes: int) -> ReadRange:
    first = num_bytes - len(tail)

    def read(start: int, stop: int) -> bytes:
        if start < first:
            raise OSError("the footer leaves the end of the file")
        return bytes(tail[start - first : stop - first])

    return read


class _Ranges(io.RawIOBase):
    """A file for Arrow to read at will; a miss brings `read_ahead` bytes."""

    def __init__(self, read: ReadRange, num_bytes: int, read_ahead: int) -> None:
        self._read, self._num_bytes, self._read_ahead = read, num_bytes, read_ahead
        self._at, self._kept = 0, {}

    def read_range(self, start: int, stop: int) -> bytes:
        for first, data in self._kept.items():
            if first <= start and stop <= first + len(data):
                return data[start - first : stop - first]
        data = self._read(start, min(self._num_bytes, max(stop, start + self._read_ahead)))
        self._kept[start] = data
        return data[: stop - start]

    def read(self, size: int = -1) -> bytes:
        stop = self._num_bytes if size < 0 else min(self._num_bytes, self._at + size)
        data = self.read_range(self._at, stop) if stop > self._at else b""
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True
