"""Items of Parquet and Arrow files: one per line of the table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdcache.errors import InputError
from kdcache.inputs.content import Fields, Item, Start, parse_item, parse_marks
from kdcache.inputs.formats.arrow_files import check_inflation, check_num_values, check_views
from kdcache.inputs.formats.base import FileFormat, InputFile
from kdcache.inputs.formats.open_file import GIT_LFS
from kdcache.inputs.formats.parquet_bounds import check_parquet, items_at_once
from kdcache.shown import first_line

_ITEMS_PER_READ = 1024
_ARROW_FILE_MAGIC = b"ARROW1"
_ARROW_STREAM_MAGIC = b"\xff\xff\xff\xff"


def read_parquet(file: InputFile) -> Iterator[Item]:
    """Yield the items of a Parquet file; its groups before the start are not read.

    Raises:
        InputError: the file is damaged, lacks the column, or a column or cell has the wrong type.
    """
    path, start, fields = file.path, file.start, file.fields
    try:
        _refuse_pointer(path)
        with pq.ParquetFile(path) as table:
            _check_columns(table.schema_arrow, path, fields)
            check_parquet(table.metadata, path)
            groups, first_item = _groups_from(table.metadata, start.offset)
            columns = fields.read_names(table.schema_arrow.names)
            num_items = items_at_once(table.metadata, columns, os.path.getsize(path), _ITEMS_PER_READ)
            batches = table.iter_batches(batch_size=num_items, row_groups=groups, columns=columns)
            yield from _items(batches, path, start, first_item, fields)
    except InputError:
        raise
    except Exception as error:  # for a damaged file Arrow raises anything: KeyError, TypeError, OverflowError, ...
        raise InputError(f"{path}: not a readable Parquet file: {first_line(error)}") from error


def read_arrow(file: InputFile) -> Iterator[Item]:
    """Yield the items of an Arrow IPC file (as Feather, or a cache of ours) or stream (as `datasets` writes).

    Raises:
        InputError: as `read_parquet`.
    """
    path, start, fields = file.path, file.start, file.fields
    try:
        _refuse_pointer(path)
        with pa.memory_map(path) as source:
            is_file = source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
            source.seek(0)
            check_inflation(memoryview(source.read_buffer()), path)
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            _check_columns(reader.schema, path, fields)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
            yield from _items(_while_whole(batches, path, source.size()), path, start, 0, fields)
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(f"{path}: not a readable Arrow IPC file or stream: {first_line(error)}") from error


def table_columns(path: str) -> tuple[str | None, list[str]]:
    """Tell what a file is by its first bytes (`parquet`, `arrow`, or None for no table), and its columns.

    Raises:
        InputError: a table that is damaged, or a file that cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(8)
        if head.startswith(b"PAR1"):
            return "parquet", list(pq.read_schema(path).names)
        if head.startswith((_ARROW_FILE_MAGIC, _ARROW_STREAM_MAGIC)):
            opened = pa.ipc.open_file if head.startswith(_ARROW_FILE_MAGIC) else pa.ipc.open_stream
            with pa.memory_map(path) as source:
                return "arrow", list(opened(source).schema.names)
    except Exception as error:  # as above
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error
    return None, []


def column_values(column: pa.Array, kind: str) -> list[Any]:
    """Convert a column to one Python value per item; ids become arrays, without a Python object per token."""
    if isinstance(column.type, pa.BaseExtensionType):
        return column_values(column.storage, kind)
    if pa.types.is_dictionary(column.type):
        return _picked(column_values(column.dictionary, kind), column.indices)
    if pa.types.is_run_end_encoded(column.type):
        return _picked(column_values(column.values, kind), _runs(column))
    if kind == "text" and _is_binary(column.type):
        column = column.cast(pa.large_string())
    types = pa.types
    is_list = types.is_list(column.type) or types.is_large_list(column.type)
    if kind == "messages":
        return column.to_pylist(maps_as_pydicts="strict")
    if kind != "ids" or not is_list or not types.is_integer(column.type.value_type):
        return column.to_pylist()
    cells = [cell.values for cell in column]
    return [None if cell is None else cell.to_numpy() if not cell.null_count else cell.to_pylist() for cell in cells]


def item_of(item: Mapping[str, Any], fields: Fields, source: str, start: Start) -> Item:
    """Make an item of its cells; raises InputError where they have the wrong type."""
    content = parse_item(item, fields, source, "column", is_table=True)
    return Item(content, source, start, **parse_marks(item, fields, f"{source}: column"))


def item_values(table: Any, fields: Fields) -> Iterator[dict[str, Any]]:
    """Yield what is read of each item of a record batch, by name."""
    names = fields.read_names(table.schema.names)
    kinds = [fields.kind if name not in fields.mark_names or name == fields.content else "text" for name in names]
    columns = [column_values(table.column(name), kind) for name, kind in zip(names, kinds, strict=True)]
    for cells in zip(*columns, strict=True):
        yield dict(zip(names, cells, strict=True))


def _refuse_pointer(path: str) -> None:
    with open(path, "rb") as file:
        if file.read(len(GIT_LFS)) == GIT_LFS:
            raise InputError(f"{path}: holds a Git LFS pointer instead of the data: fetch it (git lfs pull)")


def _items(batches: Iterator[Any], path: str, start: Start, first_item: int, fields: Fields) -> Iterator[Item]:
    item = first_item
    for batch in batches:
        skipped = min(max(start.offset - item, 0), batch.num_rows)
        if skipped < batch.num_rows:
            used = batch.select(fields.read_names(batch.schema.names)).slice(skipped)
            # Arrow would follow offsets out of a buffer, which ends the process.
            _validate(used, path, item + skipped)
            check_num_values(used.columns, os.path.getsize(path), path)
            for index, values in enumerate(item_values(used, fields), item + skipped):
                yield item_of(values, fields, f"{path}#{index}", Start(start.file_index, index, index))
        item += batch.num_rows


def _validate(batch: Any, path: str, first_item: int) -> None:
    """Raise pa.ArrowInvalid for offsets that lead nowhere, and InputError, with the item, for text that is not UTF-8."""
    types = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    check_views(batch.columns, os.path.getsize(path), path)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.type not in types and not _is_binary(column.type):
            continue
        data = column.cast(types.get(column.type, column.type))
        data.validate(full=True)
        check_num_values([data], os.path.getsize(path), path)
        try:
            data.cast(pa.large_string())
        except pa.ArrowInvalid:
            for item, cell in enumerate(data.to_pylist(), first_item):
                _check_text(cell, f"{path}#{item}: column {name!r}")
    batch.validate(full=True)


def _check_text(cell: bytes | None, where: str) -> None:
    try:
        (cell or b"").decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte 0x{error.object[error.start]:02x})") from error


def _while_whole(batches: Iterator[Any], path: str, num_bytes: int) -> Iterator[Any]:
    """Yield the batches while the file keeps its size: a mapped file that was cut would end the process."""
    while True:
        if os.stat(path).st_size < num_bytes:
            raise InputError(f"{path}: was cut while it was being read; write it again")
        batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _groups_from(metadata: Any, start: int) -> tuple[list[int], int]:
    item = 0
    for group in range(metadata.num_row_groups):
        num_items = metadata.row_group(group).num_rows
        if start < item + num_items:
            return list(range(group, metadata.num_row_groups)), item
        item += num_items
    return [], item


def _check_columns(schema: pa.Schema, path: str, fields: Fields) -> None:
    check_names(schema.names, path, fields)
    for name in fields.content_names(schema.names):
        column_type = schema.field(name).type
        if not _fits(column_type, fields.kind):
            wanted = {"text": "text", "messages": "a list of {role, content}", "ids": "a list of integers"}[fields.kind]
            raise InputError(f"{path}: column {name!r} has the type {column_type}, but content {fields.kind!r} needs {wanted}")


def check_names(names: Sequence[str], where: str, fields: Fields) -> None:
    """Raise InputError if a column that is read is missing, or is there twice."""
    for name in fields.read_names(names):
        if name not in names:
            columns = f"the columns are {', '.join(map(repr, names))}" if names else "it has no columns"
            raise InputError(f"{where}: no column {name!r}; {columns} ({fields.advice(name, names)})")
        if names.count(name) > 1:
            raise InputError(f"{where}: {names.count(name)} columns are named {name!r}; rename all but one of them")


def _fits(column_type: pa.DataType, kind: str) -> bool:
    types = pa.types
    column_type = _plain_type(column_type)
    if types.is_null(column_type):
        return True
    is_text = types.is_string(column_type) or types.is_large_string(column_type) or types.is_string_view(column_type)
    if kind == "text":
        return is_text or _is_binary(column_type)
    if kind == "messages" and (is_text or types.is_struct(column_type)):
        return True
    if not _is_list(column_type):
        return False
    entry_type = _plain_type(column_type.value_type)
    return types.is_integer(entry_type) if kind == "ids" else types.is_struct(entry_type)


def _is_list(column_type: pa.DataType) -> bool:
    types = pa.types
    if types.is_list(column_type) or types.is_large_list(column_type) or types.is_fixed_size_list(column_type):
        return True
    return types.is_list_view(column_type) or types.is_large_list_view(column_type)


def _is_binary(column_type: pa.DataType) -> bool:
    """Whether these are bytes, as which some writers store text: it is text if they are UTF-8."""
    types = pa.types
    return types.is_binary(column_type) or types.is_large_binary(column_type) or types.is_binary_view(column_type)


def _plain_type(column_type: pa.DataType) -> pa.DataType:
    """Give the type of the values: a dictionary's, a run's, an extension's storage."""
    types = pa.types
    while True:
        if types.is_dictionary(column_type) or types.is_run_end_encoded(column_type):
            column_type = column_type.value_type
        elif isinstance(column_type, pa.BaseExtensionType):
            column_type = column_type.storage_type
        else:
            return column_type


def _picked(values: list[Any], indices: pa.Array) -> list[Any]:
    # Arrow's own decoding lacks some types, such as views.
    return [None if index is None else values[index] for index in indices.to_pylist()]


def _runs(column: Any) -> pa.Array:
    """Give the index of each item's run."""
    run_indices = pa.array(range(len(column.values)), pa.int64())
    run_type = pa.run_end_encoded(column.run_ends.type, pa.int64())
    runs = pa.RunEndEncodedArray.from_buffers(run_type, len(column), [None], 0, column.offset, [column.run_ends, run_indices])
    return pc.call_function("run_end_decode", [runs])


PARQUET = FileFormat(read_parquet, (".parquet",))
ARROW = FileFormat(read_arrow, (".arrow", ".feather", ".ipc"))
