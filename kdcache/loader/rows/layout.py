"""The layout of an epoch: rows and batches by index, computed as they are asked for; bounded memory, no record is read."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.config.loader import LoaderConfig
from kdcache.loader.order.mix import CacheTable, EpochOrder
from kdcache.loader.order.pairs import joined
from kdcache.loader.rows.batching import batch_block, row_length
from kdcache.loader.rows.packing import Packing, Rows, cuts_batches, pack_block

_CACHED_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class EpochCounts:
    """What an epoch holds, all ranks together.

    Attributes:
        num_sequences: that are given; in an epoch of one cache each of its sequences, once.
        num_tokens: of these.
        num_rows: rows with a sequence.
        num_empty_rows: rows of no sequence and no weight that fill the last batch.
        num_batches: global batches.
        num_slots: rows x row length, without the empty rows.
        fill: share of these slots that hold a token, in [0, 1].
    """

    num_sequences: int
    num_tokens: int
    num_rows: int
    num_empty_rows: int
    num_batches: int
    num_slots: int
    fill: float


@dataclass(frozen=True, slots=True, eq=False)
class BatchRows:
    """A global batch before it is read.

    Attributes:
        rows: the sequences of each row, a multiple of `batch_rows` of them; those after the epoch's last row are empty.
        seq_len: T, the length of its rows.
    """

    rows: list[NDArray[np.int64]]
    seq_len: int


class EpochLayout:
    """Which sequences each row and each global batch of an epoch holds: a pure function of lengths, config and epoch.

    A block of rows is computed when a row of it is asked for, and the last few are kept; of all others only their counts are.
    Asking for batch b computes the blocks before b once (benchmarks/loader_scale.py: what a resume waits for). Safe to use from
    several threads.

    Args:
        caches: what is known of each cache, see `kdcache.loader.order.mix`.
        config: of the loader.
        epoch: >= 0.
    """

    def __init__(self, caches: Sequence[CacheTable], config: LoaderConfig, epoch: int) -> None:
        self._args = (caches, config, epoch)
        self._config, self._epoch = config, epoch
        self._packing = Packing.of(config)
        self._cuts_batches = cuts_batches(config)
        self.order = EpochOrder(caches, config, epoch)
        parts = [cache.bundles for cache in caches if cache.bundles is not None]
        self._bundles = joined(parts, [part.num_sequences for part in parts]) if parts else None
        # Of rows, batches, tokens and slots: how many there are before each block. One entry per block, 16 buffers.
        self._before: list[_Totals] = [_Totals()]
        self._blocks: OrderedDict[int, Rows] = OrderedDict()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Callable[..., EpochLayout], tuple[Any, ...]]:
        return EpochLayout, self._args

    @property
    def num_rows(self) -> int:
        """Rows with a sequence; computes the whole table of blocks."""
        return self._totals().rows

    @property
    def num_sequences(self) -> int:
        """Sequences of the epoch; of bundles that are pairs, which computes the whole table of blocks, both."""
        return self.order.num_sequences if self._bundles is None else self._totals().sequences

    def expected_sum(self) -> int | None:
        """The sum of the indices of all sequences of the epoch, where it can be known beforehand."""
        return self.order.expected_sum() if self._bundles is None else None

    @property
    def num_batches(self) -> int:
        """Global batches, the padded last one included; computes the whole table of blocks where lengths have a say in it."""
        if self._config.packing == "none" and self._config.max_batch_tokens is None:
            return -(-self.order.num_sequences // self._config.batch_rows)
        totals = self._totals()
        return totals.batches if self._cuts_batches else -(-totals.rows // self._config.batch_rows)

    def has_row(self, row: int) -> bool:
        """Whether the epoch has this row; computes the table no further than needed."""
        return row >= 0 and self._reaches("rows", row)

    def has_batch(self, index: int) -> bool:
        """Whether the epoch has this batch."""
        if self._cuts_batches:
            return index >= 0 and self._reaches("batches", index)
        return self.has_row(index * self._config.batch_rows)

    def row(self, row: int) -> NDArray[np.int64]:
        """The sequences of a row, in their order in it.

        Raises:
            IndexError: the epoch has no such row.
        """
        if not self.has_row(row):
            raise IndexError(f"row {row} is not in the epoch's {self.num_rows} rows")
        block = bisect_right(self._before, row, key=lambda totals: totals.rows) - 1
        return self._sequences(self._block(block)[row - self._before[block].rows])

    def batch(self, index: int) -> BatchRows:
        """A global batch; past the epoch's last row its rows are empty.

        Raises:
            IndexError: the epoch has no such batch.
        """
        if not self.has_batch(index):
            raise IndexError(f"batch {index} is not in the epoch's {self.num_batches} batches")
        if self._cuts_batches:
            return self._own_batch(index)
        first = index * self._config.batch_rows
        empty = np.zeros(0, np.int64)
        rows = [self.row(r) if self.has_row(r) else empty for r in range(first, first + self._config.batch_rows)]
        return BatchRows(rows, self._config.seq_len)

    def counts(self) -> EpochCounts:
        """What the whole epoch holds."""
        totals, num_batches, batch_rows = self._totals(), self.num_batches, self._config.batch_rows
        num_slots = totals.slots if self._cuts_batches else totals.rows * self._config.seq_len
        return EpochCounts(
            num_sequences=self.num_sequences,
            num_tokens=totals.tokens,
            num_rows=totals.rows,
            num_empty_rows=-totals.rows % batch_rows,
            num_batches=num_batches,
            num_slots=num_slots,
            fill=totals.tokens / max(1, num_slots),
        )

    def _sequences(self, bundles: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sequences that order and packing had as bundles."""
        return bundles if self._bundles is None else self._bundles.sequences(bundles)

    def _own_batch(self, index: int) -> BatchRows:
        block = bisect_right(self._before, index, key=lambda totals: totals.batches) - 1
        rows = self._block(block)
        assert rows.batches_N1 is not None
        first, end = rows.batches_N1[index - self._before[block].batches :][:2]
        sequences = [rows[r] for r in range(first, end)]
        longest = int(self.order.num_tokens(rows.sequences_S[rows.starts_B1[first] : rows.starts_B1[end]]).max())
        sequences += [np.zeros(0, np.int64)] * (-len(sequences) % self._config.batch_rows)
        return BatchRows(sequences, row_length(longest, self._config))

    def _reaches(self, what: str, index: int) -> bool:
        with self._lock:
            while getattr(self._before[-1], what) <= index:
                if not self._extend():
                    return False
        return True

    def _totals(self) -> _Totals:
        with self._lock:
            while self._extend():
                pass
            return self._before[-1]

    def _extend(self) -> bool:
        """Add one block to the table; False when it has them all."""
        block, before = len(self._before) - 1, self._before[-1]
        if block * self._packing.block_sequences >= self.order.num_sequences:
            return False
        rows = self._block(block)
        lengths_S = self.order.num_tokens(rows.sequences_S)
        num_batches = num_slots = 0
        if rows.batches_N1 is not None:
            num_batches = len(rows.batches_N1) - 1
            longest_N = np.maximum.reduceat(lengths_S, rows.batches_N1[:-1])
            sizes_N = np.diff(rows.batches_N1)
            num_slots = sum(int(n) * row_length(int(t), self._config) for n, t in zip(sizes_N, longest_N, strict=True))
        sizes = len(rows), num_batches, int(lengths_S.sum()), num_slots, len(self._sequences(rows.sequences_S))
        self._before.append(before.plus(*sizes))
        return True

    def _block(self, block: int) -> Rows:
        with self._lock:
            if block not in self._blocks:
                self._blocks[block] = self._make_block(block)
                if len(self._blocks) > _CACHED_BLOCKS:
                    self._blocks.popitem(last=False)
            self._blocks.move_to_end(block)
            return self._blocks[block]

    def _make_block(self, block: int) -> Rows:
        start = block * self._packing.block_sequences
        sequences_S = self.order.sequences_at(start, min(start + self._packing.block_sequences, self.order.num_sequences))
        lengths_S = self.order.num_tokens(sequences_S)
        if self._cuts_batches:
            rows = batch_block(sequences_S, lengths_S, self._config, epoch=self._epoch, block=block)
        else:
            rows = pack_block(sequences_S, lengths_S, self._packing)
        self._check_block(block, sequences_S, rows)
        return rows

    def _check_block(self, block: int, sequences_S: NDArray[np.int64], rows: Rows) -> None:
        """That nothing is lost or repeated is promised, so it is checked, in a pass over what was just computed."""
        tokens_B = np.add.reduceat(self.order.num_tokens(rows.sequences_S), rows.starts_B1[:-1])
        if (
            rows.starts_B1[-1] != len(sequences_S)
            or not np.array_equal(np.sort(rows.sequences_S), np.sort(sequences_S))
            or tokens_B.max() > self._packing.seq_len
        ):
            raise RuntimeError(f"packing of block {block} lost, repeated or overfilled something: a bug of kdcache")


@dataclass(frozen=True, slots=True)
class _Totals:
    """What the blocks up to some block hold together."""

    rows: int = 0
    batches: int = 0
    tokens: int = 0
    slots: int = 0
    sequences: int = 0

    def plus(self, rows: int, batches: int, tokens: int, slots: int, sequences: int) -> _Totals:
        counts = self.batches + batches, self.tokens + tokens, self.slots + slots, self.sequences + sequences
        return _Totals(self.rows + rows, *counts)
