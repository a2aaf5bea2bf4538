"""Sequences of a cache on a disk as addresses, for a compiled loop that decodes a whole batch; who reads them checks them.

Shape letters: R rows of any record batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.base import Codec
from kdcache.format.manifest import SelectionInfo
from kdcache.store.records.batch import BatchReader


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
