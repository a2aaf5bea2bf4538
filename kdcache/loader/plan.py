"""The plan of an epoch: rows and batches by number, computed as they are asked for; bounded memory, no record is read."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kdcache.config.loader import LoaderConfig
from kdcache.errors import ConfigError
from kdcache.loader.order import Order
from kdcache.loader.packing import Packing, Rows, pack_block

_CACHED_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class EpochCounts:
    """What an epoch holds, all ranks together.

    Attributes:
        num_sequences: each sequence of the cache, once.
        num_tokens: of all sequences.
        num_rows: rows with a sequence.
        num_empty_rows: rows of no sequence and no weight that fill the last batch.
        num_batches: global batches.
        fill: share of the rows' places that hold a token, in [0, 1].
    """

    num_sequences: int
    num_tokens: int
    num_rows: int
    num_empty_rows: int
    num_batches: int
    fill: float


class EpochPlan:
    """Which sequences each row and each global batch of an epoch holds: a pure function of lengths, options and epoch.

    A block of rows is computed when a row of it is asked for, and the last few are kept; of all others only the number of
    their first row is. Asking for batch b computes the blocks before b once: about a second per million sequences.
    Safe to use from several threads.
    """

    def __init__(self, lengths_S: NDArray[np.unsignedinteger], options: LoaderConfig, epoch: int) -> None:
        self._args = (lengths_S, options, epoch)
        self._lengths_S = lengths_S
        self._batch_rows = options.batch_rows
        self._packing = Packing(options.packing, options.seq_len, options.pack_window)
        self._order = Order(len(lengths_S), options.seed, epoch, options.shuffle)
        self._first_rows = [0]
        self._blocks: OrderedDict[int, Rows] = OrderedDict()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Callable[..., EpochPlan], tuple[Any, ...]]:
        return EpochPlan, self._args

    @property
    def num_rows(self) -> int:
        """Rows with a sequence; computes the whole table of first rows."""
        with self._lock:
            while self._extend():
                pass
            return self._first_rows[-1]

    @property
    def num_batches(self) -> int:
        """Global batches, the padded last one included; computes the whole table of first rows."""
        return -(-self.num_rows // self._batch_rows)

    def has_row(self, row: int) -> bool:
        """Whether the epoch has this row; computes the table no further than needed."""
        with self._lock:
            while self._first_rows[-1] <= row:
                if not self._extend():
                    return False
        return row >= 0

    def has_batch(self, number: int) -> bool:
        """Whether the epoch has this batch."""
        return self.has_row(number * self._batch_rows)

    def row(self, row: int) -> NDArray[np.int64]:
        """The sequences of a row, in their order in it.

        Raises:
            IndexError: the epoch has no such row.
        """
        if not self.has_row(row):
            raise IndexError(f"row {row} is not in the epoch's {self.num_rows} rows")
        block = bisect_right(self._first_rows, row) - 1
        return self._block(block)[row - self._first_rows[block]]

    def batch(self, number: int) -> list[NDArray[np.int64]]:
        """The `batch_rows` rows of a global batch; past the epoch's last row they are empty.

        Raises:
            IndexError: the epoch has no such batch.
        """
        if not self.has_batch(number):
            raise IndexError(f"batch {number} is not in the epoch's {self.num_batches} batches")
        first = number * self._batch_rows
        empty = np.zeros(0, np.int64)
        return [self.row(r) if self.has_row(r) else empty for r in range(first, first + self._batch_rows)]

    def counts(self) -> EpochCounts:
        """What the whole epoch holds."""
        num_rows, num_batches = self.num_rows, self.num_batches
        num_tokens = int(self._lengths_S.sum(dtype=np.int64))
        return EpochCounts(
            num_sequences=len(self._lengths_S),
            num_tokens=num_tokens,
            num_rows=num_rows,
            num_empty_rows=num_batches * self._batch_rows - num_rows,
            num_batches=num_batches,
            fill=num_tokens / max(1, num_rows * self._packing.seq_len),
        )

    def _extend(self) -> bool:
        """Add one block to the table of first rows; False when it has them all."""
        block = len(self._first_rows) - 1
        if block * self._packing.block_places >= self._order.num_sequences:
            return False
        self._first_rows.append(self._first_rows[-1] + len(self._block(block)))
        return True

    def _block(self, block: int) -> Rows:
        with self._lock:
            if block not in self._blocks:
                rows = pack_block(self._lengths_S, self._order, block, self._packing)
                self._check_block(block, rows)
                self._blocks[block] = rows
                if len(self._blocks) > _CACHED_BLOCKS:
                    self._blocks.popitem(last=False)
            self._blocks.move_to_end(block)
            return self._blocks[block]

    def _check_block(self, block: int, rows: Rows) -> None:
        """That nothing is lost or repeated is promised, so it is checked, in a pass over what was just computed."""
        places = min(self._packing.block_places, self._order.num_sequences - block * self._packing.block_places)
        tokens_R = np.add.reduceat(self._lengths_S[rows.sequences_M].astype(np.int64), rows.starts_R1[:-1])
        if len(np.unique(rows.sequences_M)) != places or rows.starts_R1[-1] != places or tokens_R.max() > self._packing.seq_len:
            raise RuntimeError(f"packing of block {block} lost, repeated or overfilled something: a bug of kdcache")


def check_options(options: LoaderConfig, lengths_S: NDArray[np.unsignedinteger]) -> None:
    """Raise ConfigError unless the options are in range and each sequence fits a row."""
    try:
        # Structs do not check the ranges of their fields when they are made in Python.
        msgspec.convert(msgspec.to_builtins(options), LoaderConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"loader options: {error}") from error
    if len(lengths_S) == 0:
        raise ConfigError("the cache holds no sequence, so there is nothing to load; finish the capture first")
    longest = int(lengths_S.max())
    if longest > options.seq_len:
        too_long = np.flatnonzero(lengths_S > options.seq_len)
        raise ConfigError(
            f"seq_len is {options.seq_len}, but {len(too_long)} of {len(lengths_S)} sequences are longer, the first of them "
            f"sequence {too_long[0]} with {lengths_S[too_long[0]]} tokens: raise seq_len to {longest}, or capture again with "
            f"input.window.size <= {options.seq_len}"
        )


def check_ranks(options: LoaderConfig, rank: int, world_size: int) -> None:
    """Raise ConfigError unless `rank` is one of `world_size` ranks that share a global batch equally."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank} of world_size {world_size}; expected 0 <= rank < world_size")
    if options.batch_rows % world_size:
        raise ConfigError(
            f"batch_rows is {options.batch_rows}, which {world_size} ranks cannot share equally; it counts the rows of the "
            f"global batch, so make it a multiple of world_size"
        )
