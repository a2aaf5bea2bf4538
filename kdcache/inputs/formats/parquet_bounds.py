"""Bounds on what a Parquet file says of its own size, checked before a value is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from kdcache.errors import InputError
from kdcache.inputs.formats.arrow_files import FREE_BYTES
from kdcache.inputs.formats.open_file import MAX_INFLATION

MAX_VALUES_PER_ITEM = 2**27
"""Values of one column in one item: an item of 10^5 positions of 350 packed bytes has 2^25."""

MAX_RUN = 2**16
"""Values for each byte of a column, compressed: a run of one value takes some bytes, however long it is."""

FREE_VALUES = 2**24


def check_parquet(metadata: Any, where: str) -> None:
    """Raise InputError if runs of one value, or compressed pages, would become more than real data does.

    Args:
        metadata: `pyarrow.parquet.FileMetaData`.
        where: for messages.
    """
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            name, values, packed = column.path_in_schema, column.num_values, max(column.total_compressed_size, 1)
            if values > MAX_VALUES_PER_ITEM * max(group.num_rows, 1) or (values > FREE_VALUES and values > MAX_RUN * packed):
                raise InputError(
                    f"{where}: column {name!r} claims to hold {values:,} values in {group.num_rows:,} items and "
                    f"{packed:,} bytes, more than real data needs"
                )
            inflated = column.total_uncompressed_size
            if inflated > FREE_BYTES and inflated > MAX_INFLATION * packed:
                raise InputError(
                    f"{where}: column {name!r} claims to hold {inflated:,} bytes in {packed:,} compressed ones, more than "
                    f"{MAX_INFLATION} times as many and more than real data needs; if the file is sound, write it without "
                    "compression"
                )


def items_at_once(metadata: Any, columns: Collection[str], num_bytes: int, most: int) -> int:
    """Say how many items to read at once, so that memory stays bounded.

    A page may name one text of its dictionary many times, which takes no bytes in the file, and all of them here. Even if every
    text were as long as its whole column, this many would be within the bounds.

    Args:
        metadata: as `check_parquet`.
        columns: those that are read.
        num_bytes: of the file.
        most: items, whatever the texts.
    """
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    longest = max((sum(_text_bytes(group, columns)) for group in groups), default=0)
    return max(1, min(most, max(FREE_BYTES, MAX_INFLATION * num_bytes) // max(longest, 1)))


def _text_bytes(group: Any, columns: Collection[str]) -> Iterator[int]:
    for column in map(group.column, range(group.num_columns)):
        if column.physical_type == "BYTE_ARRAY" and column.path_in_schema.partition(".")[0] in columns:
            yield column.total_uncompressed_size
