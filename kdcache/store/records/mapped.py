"""Sequences of a cache on a disk as addresses, for a compiled loop that decodes a whole batch and checks what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.base import EntryFormat
from kdcache.format.manifest import SelectionInfo
from kdcache.store.records.batch import BatchReader

MAPPED_SEQUENCE = np.dtype([("line", np.int64), ("key", np.int64), ("num_tokens", np.int64), ("num_positions", np.int64)])
"""The address of the sequence's line of a `sequence_table`, and what the index says of it, its key by address."""


@dataclass(frozen=True, slots=True, eq=False)
class SequenceFormat:
    """What all sequences of a cache have in common; one object per open cache.

    Attributes:
        names: of the columns, in the order of the `sequence_table`.
        entries: how the codec's columns are read.
        selection: of the cache.
        fixed: entries of every position by the selection; None where their number varies.
        verify: whether the digests are to be checked.
    """

    names: tuple[str, ...]
    entries: EntryFormat
    selection: SelectionInfo
    fixed: int | None
    verify: bool


@dataclass(frozen=True, slots=True, eq=False)
class MappedSequences:
    """Some sequences of a cache on a disk. They are known to exist; checking their digests is left to the reader of them.

    Attributes:
        format: of all of them.
        table: (num sequences,) of MAPPED_SEQUENCE; valid as long as this object exists.
        batches, indices: the record batch of each, and its index in there.
    """

    format: SequenceFormat
    table: NDArray[np.void]
    batches: Sequence[BatchReader]
    indices: Sequence[int]

    def most_entries(self) -> int:
        """The most entries that any position claims. Nothing has checked the claim: it needs a bound."""
        return max(batch.most_entries(index) for batch, index in zip(self.batches, self.indices, strict=True))

    def is_whole(self, which: int) -> bool:
        """Whether the digest of one sequence is right, by the definition of digests."""
        return self.batches[which].is_whole(self.indices[which])
