"""What a Parquet file says of its own size, held against any real data before a value is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from kdcache.errors import InputError
from kdcache.inputs.formats.arrow_files import FREE_BYTES
from kdcache.inputs.formats.open_file import MAX_INFLATION

MAX_VALUES_PER_ROW = 2**27
"""Values of one column in one row: a row of 10^5 positions of 350 packed bytes has 2^25."""

MAX_RUN = 2**16
"""Values for each byte of a column, compressed: a run of one value takes some bytes, however long it is."""

FREE_VALUES = 2**24


def check_parquet(metadata: Any, where: str) -> None:
    """Raise InputError where runs of one value, or compressed pages, would become more than any real data.

    Args:
        metadata: `pyarrow.parquet.FileMetaData`.
        where: for messages.
    """
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            name, values, packed = column.path_in_schema, column.num_values, max(column.total_compressed_size, 1)
            if values > MAX_VALUES_PER_ROW * max(group.num_rows, 1) or (values > FREE_VALUES and values > MAX_RUN * packed):
                raise InputError(
                    f"{where}: column {name!r} holds {values:,} values in {group.num_rows:,} rows and {packed:,} bytes, as no "
                    "real data does"
                )
            inflated = column.total_uncompressed_size
            if inflated > FREE_BYTES and inflated > MAX_INFLATION * packed:
                raise InputError(
                    f"{where}: column {name!r} is {inflated:,} bytes in {packed:,} compressed ones, more than {MAX_INFLATION} "
                    "times as many, as of no real data; where it is sound, write it without compression"
                )


def rows_at_once(metadata: Any, columns: Collection[str], num_bytes: int, most: int) -> int:
    """How many rows to read at once: a page may name one text of its dictionary again and again, which takes no bytes in the
    file, and all of them here. Were every text as long as its whole column, they would still be within the bounds.

    Args:
        metadata: as `check_parquet`.
        columns: those that are read.
        num_bytes: of the file.
        most: rows, whatever the texts.
    """
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    longest = max((sum(_text_bytes(group, columns)) for group in groups), default=0)
    return max(1, min(most, max(FREE_BYTES, MAX_INFLATION * num_bytes) // max(longest, 1)))


def _text_bytes(group: Any, columns: Collection[str]) -> Iterator[int]:
    for column in map(group.column, range(group.num_columns)):
        if column.physical_type == "BYTE_ARRAY" and column.path_in_schema.partition(".")[0] in columns:
            yield column.total_uncompressed_size
