"""Arrow IPC files and streams of others, opened within bounds: no more is decompressed than any real data comes to."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from kdcache.errors import InputError
from kdcache.format.arrow_messages import JoinedStreamsError, message_sizes
from kdcache.inputs.open_file import MAX_INFLATION

FREE_BYTES = 2**26
"""That a record batch may claim, whatever the factor: those of real files are smaller."""

_FILE_MAGIC = b"ARROW1"


def open_arrow(source: Any, where: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema and the record batches, validated in full, of an open IPC file (Feather too) or stream.

    Args:
        source: a `pyarrow.NativeFile`, best a memory map.
        where: for messages.

    Raises:
        InputError: buffers that claim more than any real data, or messages that overlap. What Arrow raises is the caller's to
            translate; offsets are checked before a batch is handed out, since Arrow follows them out of their buffer.
    """
    data = source.read_buffer()
    check_inflation(memoryview(data), where)
    is_file = data.slice(0, len(_FILE_MAGIC)).to_pybytes() == _FILE_MAGIC
    reader: Any = pa.ipc.open_file(data) if is_file else pa.ipc.open_stream(data)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
    return reader.schema, map(_validated, batches)


def check_inflation(data: memoryview, where: str) -> None:
    """Raise InputError where the data's compressed buffers claim to be more than any real ones, or are no Arrow messages."""
    total = 0
    try:
        for packed, claimed in message_sizes(data):
            total += claimed
            if claimed > FREE_BYTES and claimed > MAX_INFLATION * packed:
                raise InputError(
                    f"{where}: {claimed:,} bytes are to come out of {packed:,} compressed ones, more than {MAX_INFLATION} "
                    "times as many, as of no real data; where it is sound, write it without compression"
                )
    except JoinedStreamsError as error:
        raise InputError(
            f"{where}: more data follows the end of its Arrow stream, as where files were joined into one: keep them apart"
        ) from error
    except struct.error as error:
        raise InputError(f"{where}: not a readable Arrow IPC file or stream: a message leaves the file, or is none") from error
    if total > FREE_BYTES and total > MAX_INFLATION * len(data):
        raise InputError(f"{where}: {total:,} bytes are to come out of a file of {len(data):,}, as of no real data")


def _validated(batch: pa.RecordBatch) -> pa.RecordBatch:
    batch.validate(full=True)
    return batch
