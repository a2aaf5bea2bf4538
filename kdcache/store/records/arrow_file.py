"""Open Arrow files of a cache that may be hostile: memory-mapped, and refused where Arrow would allocate what they claim."""

from __future__ import annotations

import struct
from pathlib import Path

import pyarrow as pa

from kdcache.errors import CorruptCacheError
from kdcache.format.arrow_messages import is_compressed, record_batch_spans
from kdcache.store.files.disk_errors import read_error
from kdcache.store.files.regular import regular_file


def open_arrow_file(path: Path) -> pa.RecordBatchFileReader:
    """Map an Arrow IPC file. What is read from it are views of the map, which lives as long as they do; no descriptor is kept.

    Raises:
        CorruptCacheError: cannot be read, is not an Arrow file, or has compressed buffers or dictionaries.
    """
    try:
        with pa.memory_map(str(regular_file(path))) as file:
            data = file.read_buffer()
    except (pa.ArrowException, OSError) as error:
        raise read_error(path, error, "cannot be read as an Arrow file") from error
    return open_arrow_buffer(data, where=str(path))


def open_arrow_buffer(data: pa.Buffer, *, where: str) -> pa.RecordBatchFileReader:
    """Open an Arrow IPC file that is in memory; see `open_arrow_file`."""
    try:
        reader = pa.ipc.open_file(data)  # verifies the footer
        if _has_compression_or_dictionaries(memoryview(data)):
            raise CorruptCacheError(
                f"{where}: has compressed buffers or dictionaries, or another metadata version than V5, as no file of a cache"
            )
    except (pa.ArrowException, OSError, struct.error) as error:
        raise CorruptCacheError(f"{where}: cannot be read as an Arrow file: {error}") from error
    return reader


def _has_compression_or_dictionaries(data: memoryview) -> bool:
    messages = record_batch_spans(data, len(data))
    return messages is None or any(is_compressed(data[message.offset :]) for message in messages)
