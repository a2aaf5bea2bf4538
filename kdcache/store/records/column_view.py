"""Views of an Arrow column's values, one sequence at a time: nothing is copied, and little Python runs for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError

NULL_BYTES = -1
"""What stands for the length of a null in bytes."""


class ColumnView:
    """NumPy views of one Arrow column, sliced per sequence without copying; null gives None."""

    def __init__(self, values: NDArray[Any], offsets_S1: NDArray[np.integer], valid_S: NDArray[np.bool_] | None) -> None:
        self.values, self.offsets_S1, self.valid_S = values, offsets_S1, valid_S
        # Plain numbers and a view of bytes: a sequence is looked at once per epoch, and NumPy's own indexing would take longer
        # than decoding a short one.
        self._offsets = offsets_S1.tolist()
        self._bytes, self._item_bytes = values.view(np.uint8).data, values.dtype.itemsize
        self._address: int = values.__array_interface__["data"][0]

    def __getitem__(self, index: int) -> NDArray[Any] | None:
        if self.valid_S is not None and not self.valid_S[index]:
            return None
        return self.values[self._offsets[index] : self._offsets[index + 1]]

    def values_of(self, index: int) -> NDArray[Any]:
        """A sequence's values; what lies under a null where it is one."""
        return self.values[self._offsets[index] : self._offsets[index + 1]]

    @property
    def lengths_S(self) -> NDArray[np.integer]:
        """How many values each sequence has, (S,); what lies under a null counts."""
        return np.diff(self.offsets_S1)

    def address(self, index: int) -> int:
        """Where a sequence's values lie in memory; valid as long as this view exists."""
        return self._address + self._offsets[index] * self._item_bytes

    def addresses(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each sequence's value: its address, valid as long as this view exists, and its bytes, NULL_BYTES for null; (S,) each.

        Both come from the offsets as they were when this view was made.
        """
        bytes_S1 = np.array(self._offsets, np.int64) * self._item_bytes
        num_bytes_S = np.diff(bytes_S1)
        if self.valid_S is not None:
            num_bytes_S[~self.valid_S] = NULL_BYTES
        return self._address + bytes_S1[:-1], num_bytes_S

    def value_bytes(self, index: int) -> memoryview | None:
        """The bytes of a sequence's value; None for null."""
        if self.valid_S is not None and not self.valid_S[index]:
            return None
        return self._bytes[self._offsets[index] * self._item_bytes : self._offsets[index + 1] * self._item_bytes]


def column_view(column: pa.Array) -> ColumnView:
    """Views of a validated column, not to be written: lists as typed arrays (bools unpacked to one byte each), strings and
    binary as uint8.

    Raises:
        CorruptCacheError: a null inside a list.
    """
    if column.offset:
        raise ValueError("columns are read as whole record batches")
    valid_S = np.asarray(column.is_valid()) if column.null_count else None
    if pa.types.is_list(column.type):
        offsets_S1 = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1) if len(column) else np.zeros(1, np.int32)
        if column.values.null_count:
            raise CorruptCacheError("a list holds nulls")
        values = column.values.to_numpy(zero_copy_only=not pa.types.is_boolean(column.type.value_type))
        values.flags.writeable = False  # bools are unpacked once for all sequences: writing there would change what others read
        return ColumnView(values, offsets_S1, valid_S)
    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        values = np.frombuffer(column.buffers()[1] or b"", np.uint8, len(column) * width)
        return ColumnView(values, np.arange(len(column) + 1) * width, valid_S)
    if pa.types.is_integer(column.type):
        return ColumnView(column.to_numpy(), np.arange(len(column) + 1), valid_S)
    offset_type = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    offsets_S1 = np.frombuffer(column.buffers()[1], offset_type, len(column) + 1) if len(column) else np.zeros(1, offset_type)
    data = column.buffers()[2]
    return ColumnView(np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8), offsets_S1, valid_S)


class SequenceValues(Mapping[str, Any]):
    """One sequence's values of some columns, each sliced when it is asked for."""

    __slots__ = ("_index", "_names", "_views")

    def __init__(self, views: Mapping[str, ColumnView], names: Sequence[str], index: int) -> None:
        self._views, self._names, self._index = views, names, index

    def __getitem__(self, name: str) -> Any:
        return self._views[name][self._index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
