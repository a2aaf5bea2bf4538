"""Packing: which sequences share a row and which rows a batch, from their lengths alone. Pure functions; no record is read.

Each buffer of `packing_buffer` sequences of the epoch's order is treated by itself. `first_fit`: a sequence goes into the first
row of its buffer that has room for it, or opens a new one. `BLOCK_BUFFERS` buffers are packed at once. One sequence per row:
`batching.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdcache.config.loader import LoaderConfig

PACKING_VERSION = 1
"""Goes up with any change of what `pack_block` and `batch_block` return; part of a loader's state."""

BLOCK_BUFFERS = 16


@dataclass(frozen=True, slots=True)
class Packing:
    """How rows are filled: the fields of LoaderConfig that decide it."""

    kind: Literal["first_fit", "none"]
    seq_len: int
    buffer: int

    @classmethod
    def of(cls, config: LoaderConfig) -> Packing:
        """As the config says; where batches are cut within buffers, a buffer is whole batches."""
        buffer = config.packing_buffer
        if cuts_batches(config):
            buffer = -(-buffer // config.batch_rows) * config.batch_rows
        return cls(config.packing, config.seq_len, buffer)

    @property
    def block_sequences(self) -> int:
        """Places of the order that one block covers."""
        return BLOCK_BUFFERS * self.buffer


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of one block, in the order in which the stream has them.

    Attributes:
        sequences_S: (S,) int64, the sequences, row after row.
        starts_B1: (B+1,) int64; row r holds sequences_S[starts_B1[r]:starts_B1[r + 1]].
        batches_N1: (N+1,) int64; batch n is rows batches_N1[n]:batches_N1[n + 1]. None where batches are cut from the stream of
            all rows, `batch_rows` at a time, and may begin in one block and end in the next.
    """

    sequences_S: NDArray[np.int64]
    starts_B1: NDArray[np.int64]
    batches_N1: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.starts_B1) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        return self.sequences_S[self.starts_B1[row] : self.starts_B1[row + 1]]


def cuts_batches(config: LoaderConfig) -> bool:
    """Whether batches are cut within buffers, by the lengths of their sequences."""
    return config.group_by_length or config.max_batch_tokens is not None or config.pad_to == "longest"


def pack_block(sequences_S: NDArray[np.int64], lengths_S: NDArray[np.int64], packing: Packing) -> Rows:
    """The rows of one block of the epoch.

    Args:
        sequences_S: (S,) the sequences at the block's ranks of the order.
        lengths_S: (S,) their tokens, each in [1, seq_len].
        packing: how rows are filled.
    """
    if packing.kind == "none":
        return Rows(sequences_S, np.arange(len(sequences_S) + 1))
    # Imported on use: numba takes 0.4 s, and a loader is made where nothing is packed, too.
    from kdcache.loader.rows._numba_packing import first_fit

    rows_S = first_fit(lengths_S, packing.seq_len, packing.buffer)
    by_row_S = np.argsort(rows_S, kind="stable")
    starts_B1 = np.append(0, np.cumsum(np.bincount(rows_S)))
    return Rows(sequences_S[by_row_S], starts_B1)


def first_fit_reference(lengths_S: list[int], seq_len: int) -> list[int]:
    """First fit of one buffer, as one would explain it: the definition that `_numba_packing.first_fit` is compared with."""
    filled: list[int] = []
    rows: list[int] = []
    for length in lengths_S:
        row = next((r for r, tokens in enumerate(filled) if tokens + length <= seq_len), len(filled))
        if row == len(filled):
            filled.append(0)
        filled[row] += length
        rows.append(row)
    return rows
