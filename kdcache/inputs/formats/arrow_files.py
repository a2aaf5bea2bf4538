"""Arrow IPC files and streams of strangers, opened within bounds: nothing is decompressed beyond what real data needs."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdcache.errors import InputError
from kdcache.format.arrow_messages import JoinedStreamsError, message_sizes
from kdcache.inputs.formats.open_file import MAX_INFLATION

FREE_BYTES = 2**26
"""A record batch may claim this much, whatever the factor: those of real files are smaller."""

_FILE_MAGIC = b"ARROW1"


def open_arrow(source: Any, where: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Read the schema and the record batches, validated in full, of an open IPC file (Feather too) or stream.

    Args:
        source: a `pyarrow.NativeFile`, preferably a memory map.
        where: for messages.

    Raises:
        InputError: buffers that claim more than any real data, or messages that overlap. The caller translates what Arrow
            raises. Offsets are checked before a batch is handed out, since Arrow follows them out of their buffer.
    """
    data = source.read_buffer()
    check_inflation(memoryview(data), where)
    is_file = data.slice(0, len(_FILE_MAGIC)).to_pybytes() == _FILE_MAGIC
    reader: Any = pa.ipc.open_file(data) if is_file else pa.ipc.open_stream(data)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
    return reader.schema, (_validated(batch, data.size, where) for batch in batches)


def check_inflation(data: memoryview, where: str) -> None:
    """Raise InputError if compressed buffers claim more than any real ones, or are not Arrow messages."""
    total = 0
    try:
        for packed, claimed in message_sizes(data):
            total += claimed
            if claimed > FREE_BYTES and claimed > MAX_INFLATION * packed:
                raise InputError(
                    f"{where}: {packed:,} compressed bytes claim to hold {claimed:,}, more than {MAX_INFLATION} times as many "
                    "and more than real data needs; if the file is sound, write it without compression"
                )
    except JoinedStreamsError as error:
        raise InputError(
            f"{where}: more data follows the end of its Arrow stream, as where files were joined into one: keep them apart"
        ) from error
    except struct.error as error:
        raise InputError(f"{where}: not a readable Arrow IPC file or stream: a message leaves the file, or is none") from error
    if total > FREE_BYTES and total > MAX_INFLATION * len(data):
        raise InputError(f"{where}: a file of {len(data):,} bytes claims to hold {total:,}, more than real data needs")


def _validated(batch: pa.RecordBatch, num_bytes: int, where: str) -> pa.RecordBatch:
    check_views(batch.columns, num_bytes, where)
    batch.validate(full=True)
    check_num_values(batch.columns, num_bytes, where)
    return batch


def check_num_values(columns: Iterable[Any], num_bytes: int, where: str) -> None:
    """Raise InputError if validated columns would become more values than real ones of their file do.

    Items and values of nothing, runs, and views of the same bytes take no room in a file.

    Args:
        columns: arrays of `pyarrow`.
        num_bytes: size of their file.
        where: for messages.
    """
    num_values = sum(_num_values(column, is_whole=True) for column in columns)
    if num_values > FREE_BYTES and num_values > MAX_INFLATION * num_bytes:
        raise InputError(
            f"{where}: a file of {num_bytes:,} bytes claims to hold {num_values:,} values, more than real data needs"
        )


def check_views(columns: Iterable[Any], num_bytes: int, where: str) -> None:
    """Raise as `check_num_values`, before full validation reads every byte of every view."""
    views = [column for column in columns if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type)]
    for column in views:
        column.validate()
    check_num_values(views, num_bytes, where)


def _num_values(column: Any, *, is_whole: bool = False) -> int:
    """Count the values of an array at every level, and the bytes of its texts.

    A whole column's dictionary makes each text once, however many items have it; one inside of lists makes it for each of them.
    """
    types, kind = pa.types, column.type
    if isinstance(kind, pa.BaseExtensionType):
        return _num_values(column.storage, is_whole=is_whole)
    if types.is_dictionary(kind):
        num_values = len(column) + _num_values(column.dictionary)
        return num_values if is_whole else num_values + _picked_bytes(column)
    if types.is_run_end_encoded(kind):
        return len(column) + _num_values(column.values)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        lengths = np.frombuffer(column.buffers()[1] or b"", np.int32)[::4][column.offset : column.offset + len(column)]
        return len(column) + int(lengths.astype(np.int64).sum())
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        # A value may be in every view.
        widest = _num_values(column.values) // max(len(column.values), 1) + 1
        return len(column) + int(column.sizes.to_numpy().astype(np.int64).sum()) * widest
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return len(column) + _num_values(column.flatten())
    if types.is_map(kind):
        return len(column) + _num_values(column.keys) + _num_values(column.items)
    if types.is_struct(kind):
        return len(column) + sum(map(_num_values, column.flatten()))
    return len(column)


def _picked_bytes(column: Any) -> int:
    """Count the bytes of the texts that a dictionary's indices name, each as often as it is named."""
    kind = column.dictionary.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return 0
    lengths = pc.call_function("binary_length", [column.dictionary]).cast(pa.int64())
    return pc.call_function("sum", [lengths.take(column.indices)]).as_py() or 0
