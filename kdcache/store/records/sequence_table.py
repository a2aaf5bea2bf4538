"""Where the values of a record batch's rows lie in memory, as numbers: what a compiled loop reads rows by.

Shape letters: S rows of a record batch, C columns of the digest, R rows of any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.base import Codec
from kdcache.format.manifest import SelectionInfo
from kdcache.store.records.column_view import ColumnView

if TYPE_CHECKING:
    from kdcache.store.records.batch import BatchReader

NUM_TOKENS, NUM_POSITIONS, ROW_DIGEST, ROW_BYTES = range(4)
"""Places of a row's own numbers, behind two of each column."""
NUM_OF_ROW = 4
_LENGTH_BYTES = 8


def row_table(views: Mapping[str, ColumnView], numbers: Mapping[int, Sequence[int]]) -> NDArray[np.int64] | None:
    """(S, 2 C + 4) int64: of each column in order the address of the row's value and its number of bytes, NULL_BYTES for null;
    then its numbers of tokens and of positions, its digest (the bits of a uint64), and how many bytes that covers.

    The values stay where the views have them. None where one is not aligned, as no writer of ours leaves it.

    Args:
        views: of the columns, in the digest's order.
        numbers: the last four but for the bytes, (S,) each.
    """
    num_rows = len(numbers[NUM_TOKENS])
    table = np.empty((num_rows, 2 * len(views) + NUM_OF_ROW), np.int64)
    for column, view in enumerate(views.values()):
        table[:, 2 * column], table[:, 2 * column + 1] = view.places()
        if (table[:, 2 * column] % view.values.itemsize).any():
            return None
    own = table[:, 2 * len(views) :]
    for place, values in numbers.items():
        own[:, place] = np.asarray(values, np.uint64).view(np.int64)
    own[:, ROW_BYTES] = np.maximum(table[:, 1 : 2 * len(views) : 2], 0).sum(axis=1) + _LENGTH_BYTES * len(views)
    return table


@dataclass(frozen=True, slots=True, eq=False)
class RowFormat:
    """What all rows of a cache have in common; one object per cache that is open.

    Attributes:
        names: of the columns, in the table's order.
        codec: of the entries.
        selection, fixed: of the cache, and entries of every position by it, or None.
        verify: whether the rows' digests are to be checked.
    """

    names: tuple[str, ...]
    codec: Codec
    selection: SelectionInfo
    fixed: int | None
    verify: bool


@dataclass(frozen=True, slots=True, eq=False)
class MappedRows:
    """Some rows of a cache on a disk, checked to be there but not to be whole: that is for who reads them.

    Attributes:
        format: of all of them.
        places_RJ: (R, 4) int64: address of each row's line of a `row_table`, which lasts as long as this object; address of the
            key that the index has for it; numbers of tokens and of positions that the index has for it.
        batches, rows: of each, where it is.
    """

    format: RowFormat
    places_RJ: NDArray[np.int64]
    batches: Sequence[BatchReader]
    rows: Sequence[int]

    def most_entries(self) -> int:
        """Of any position, as the rows say that are not checked yet: not to be believed without a bound."""
        return max(batch.most_entries(row) for batch, row in zip(self.batches, self.rows, strict=True))

    def is_whole(self, number: int) -> bool:
        """Whether the digest of the number-th of them is right, as the definition has it."""
        return self.batches[number].is_whole(self.rows[number])
