"""Items of Parquet and Arrow files: one per row, from one column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.errors import InputError
from kdcache.inputs.content import Fields, Item, Place, parse_content, parse_domain

_ROWS_PER_READ = 1024
_ARROW_FILE_MAGIC = b"ARROW1"


def read_parquet(path: str, file: int, start: Place, *, fields: Fields) -> Iterator[Item]:
    """An item for each row; row groups before the start are not read.

    Raises:
        InputError: not a whole Parquet file, no such column, or a column or cell of the wrong type.
    """
    try:
        with pq.ParquetFile(path) as table:
            _check_columns(table.schema_arrow, path, fields)
            groups, first_row = _groups_from(table.metadata, start.offset)
            batches = table.iter_batches(batch_size=_ROWS_PER_READ, row_groups=groups, columns=fields.names)
            yield from _rows(batches, path, Place(file, start.offset, start.number), first_row, fields)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {_one_line(error)}") from error


def read_arrow(path: str, file: int, start: Place, *, fields: Fields) -> Iterator[Item]:
    """An item for each row of an Arrow IPC file (as Feather, or a cache of ours) or stream (as `datasets` writes).

    Raises:
        InputError: as `read_parquet`.
    """
    try:
        with pa.memory_map(path) as source:
            is_file = source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            _check_columns(reader.schema, path, fields)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
            yield from _rows(batches, path, Place(file, start.offset, start.number), 0, fields)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable Arrow IPC file or stream: {_one_line(error)}") from error


def column_values(column: pa.Array, kind: str) -> list[Any]:
    """One Python value per row; ids as arrays, which costs no Python object per token."""
    if kind != "ids" or not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return column.to_pylist()
    cells = [cell.values for cell in column]
    return [None if cell is None else cell.to_numpy() if not cell.null_count else cell.to_pylist() for cell in cells]


def item_of(value: Any, domain: Any, fields: Fields, source: str, place: Place) -> Item:
    """The item of a row's cells; raises InputError where they are not what they are to be."""
    content = parse_content(value, fields.kind, f"{source}: column {fields.content!r}")
    return Item(content, source, place, parse_domain(domain, f"{source}: column {fields.domain!r}"))


def row_values(table: Any, fields: Fields) -> Iterator[tuple[Any, Any]]:
    """Content and domain (None where none is read) of each row of a record batch or of a table's chunk."""
    values = column_values(table.column(fields.content), fields.kind)
    yield from zip(values, repeat(None) if fields.domain is None else table.column(fields.domain).to_pylist(), strict=False)


def _rows(batches: Iterator[Any], path: str, start: Place, first_row: int, fields: Fields) -> Iterator[Item]:
    row = first_row
    for batch in batches:
        skipped = min(max(start.offset - row, 0), batch.num_rows)
        for index, (value, domain) in enumerate(row_values(batch.slice(skipped), fields), row + skipped):
            yield item_of(value, domain, fields, f"{path}#{index}", Place(start.file, index, index))
        row += batch.num_rows


def _groups_from(metadata: Any, start: int) -> tuple[list[int], int]:
    row = 0
    for group in range(metadata.num_row_groups):
        num_rows = metadata.row_group(group).num_rows
        if start < row + num_rows:
            return list(range(group, metadata.num_row_groups)), row
        row += num_rows
    return [], row


def _check_columns(schema: pa.Schema, path: str, fields: Fields) -> None:
    check_names(schema.names, path, fields)
    column_type = schema.field(fields.content).type
    if not _fits(column_type, fields.kind):
        wanted = {"text": "text", "messages": "a list of {role, content}", "ids": "a list of integers"}[fields.kind]
        raise InputError(
            f"{path}: column {fields.content!r} is of type {column_type}, but content {fields.kind!r} needs {wanted}"
        )


def check_names(names: Sequence[str], where: str, fields: Fields) -> None:
    """Raise InputError where a column that is to be read is not there."""
    for name in fields.names:
        if name not in names:
            raise InputError(
                f"{where}: no column {name!r}; the columns are {', '.join(map(repr, names))} (see {fields.option(name)})"
            )


def _fits(column_type: pa.DataType, kind: str) -> bool:
    types = pa.types
    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    if types.is_null(column_type):
        return True
    if kind == "text":
        return types.is_string(column_type) or types.is_large_string(column_type) or types.is_string_view(column_type)
    if not (types.is_list(column_type) or types.is_large_list(column_type) or types.is_fixed_size_list(column_type)):
        return False
    return types.is_integer(column_type.value_type) if kind == "ids" else types.is_struct(column_type.value_type)


def _one_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
