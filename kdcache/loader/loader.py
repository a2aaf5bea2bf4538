"""The loader: one rank's batches of an epoch, the same whatever the threads, and resumable after any of them."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import count, takewhile
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kdcache.config.loader import LoaderConfig
from kdcache.errors import ConfigError, StateError
from kdcache.loader.base import Reader
from kdcache.loader.batch import Batch
from kdcache.loader.plan import EpochCounts, EpochPlan, check_options, check_ranks
from kdcache.loader.prefetch import prefetch
from kdcache.loader.read import read_rows
from kdcache.loader.state import LoaderState, parse_state, stream_options

_log = logging.getLogger(__name__)


class Loader:
    """Iterates over one rank's share of the global batches.

    `for batch in loader` reads from the place where the loader stands to the end of the epoch; a second loop reads the next
    epoch, and one after a `break` goes on behind the last batch it gave. `state_dict` counts batches that were given, not those
    that threads have read ahead, and is the same on all ranks. The reader stays the caller's, to be closed after the loader.

    Args:
        reader: of the cache; see `kdcache.loader.base.Reader`.
        options: what a batch holds, and in which order.
        rank, world_size: this loader takes the rank-th of world_size equal parts of each global batch, contiguous rows. Ranks
            that share a copy of the model (tensor or context parallel) take the same rank here.
        epoch: to begin with.

    Raises:
        ConfigError: options out of range, a sequence longer than a row, ranks that cannot share a batch, an empty cache.
    """

    def __init__(self, reader: Reader, options: LoaderConfig, *, rank: int = 0, world_size: int = 1, epoch: int = 0) -> None:
        check_options(options, reader.num_tokens_S)
        check_ranks(options, rank, world_size)
        if epoch < 0:
            raise ConfigError(f"epoch is {epoch}, expected 0 or more")
        self.reader = reader
        self.options = options
        self.rank = rank
        self.world_size = world_size
        self._plan = EpochPlan(reader.num_tokens_S, options, epoch)
        self._epoch = epoch
        self._next_batch = 0
        self._snapshot = reader.snapshot
        self._closed = False
        self._ahead: Generator[_Read, None, None] | None = None
        self._num_moves = 0

    @property
    def epoch(self) -> int:
        """The epoch that is being read; behind its loop, the one that comes next."""
        return self._epoch

    @property
    def plan(self) -> EpochPlan:
        """Which sequences each batch of `epoch` holds."""
        return self._plan

    def counts(self) -> EpochCounts:
        """What `epoch` holds, all ranks together."""
        return self._plan.counts()

    def __len__(self) -> int:
        """Batches of the whole epoch, those before a resumed place included; differs a little between packed epochs."""
        return self._plan.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def iterate(self, *, first: int = 0, step: int = 1) -> Iterator[Batch]:
        """Every `step`-th batch from the `first`-th one ahead: `step` workers with `first` 0..step-1 share an epoch in turns.

        Raises (also while it runs):
            StateError: the loader is closed, or was moved or iterated over anew in the meantime.
            CorruptCacheError: at the batch with the damaged record; the state then still names that batch.
        """
        self._move()
        if not self._plan.has_batch(self._next_batch):  # a loop was left after the epoch's last batch
            self._enter(self._epoch + 1)
        start, plan = self._next_batch + first, self._plan
        self._ahead = prefetch(
            lambda number: self._read(plan, number),
            takewhile(plan.has_batch, count(start, step)),
            num_threads=self.options.num_threads,
            look_ahead=self.options.prefetch_batches,
        )
        return self._iterate(self._ahead, self._num_moves, is_whole=start == 0 and step == 1)

    def state_dict(self) -> dict[str, Any]:
        """JSON: all that a loader on the same cache with the same options needs to go on behind the last batch given."""
        return msgspec.to_builtins(self._state())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where a state says. Ranks, world size and threads may differ from those it was saved under.

        Raises:
            StateError: not a state, or one of another cache, of other options or of another version.
        """
        saved = parse_state(state, here=self._state())
        plan = EpochPlan(self.reader.num_tokens_S, self.options, saved.epoch)
        if not plan.has_batch(saved.next_batch):
            raise StateError(
                f"the loader state names batch {saved.next_batch} of epoch {saved.epoch}, which has {plan.num_batches}"
            )
        self._move()
        self._plan, self._epoch, self._next_batch = plan, saved.epoch, saved.next_batch

    def set_epoch(self, epoch: int) -> None:
        """Stand at the start of an epoch; in the epoch that is being read, stay, so that a resumed loop may call this too."""
        if epoch < 0:
            raise ConfigError(f"epoch is {epoch}, expected 0 or more")
        if epoch != self._epoch:
            self._move()
            self._enter(epoch)

    def close(self) -> None:
        """End a running loop and its threads. May be called twice."""
        if not self._closed:
            self._move()
            self._closed = True

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": None}

    def _iterate(self, ahead: Generator[_Read, None, None], move: int, *, is_whole: bool) -> Generator[Batch, None, None]:
        num_given = sum_given = 0
        try:
            self._check_not_moved(move)
            for read in ahead:
                num_given, sum_given = num_given + len(read.sequences), sum_given + int(read.sequences.sum())
                self._next_batch = read.number + 1
                yield read.batch
                self._check_not_moved(move)
        finally:
            # Not left to the garbage collector: the reader may be closed right after this.
            ahead.close()
        if is_whole:
            self._check_all_given(num_given, sum_given)
        self._enter(self._epoch + 1)

    def _read(self, plan: EpochPlan, number: int) -> _Read:
        rows = plan.batch(number)
        share = self.options.batch_rows // self.world_size
        mine = rows[self.rank * share : (self.rank + 1) * share]
        return _Read(number, np.concatenate(rows), read_rows(self.reader, mine, seq_len=self.options.seq_len))

    def _state(self) -> LoaderState:
        at_end = self._next_batch > 0 and not self._plan.has_batch(self._next_batch)
        return LoaderState(
            snapshot=self._snapshot,
            options=stream_options(self.options),
            seed=self.options.seed,
            epoch=self._epoch + 1 if at_end else self._epoch,
            next_batch=0 if at_end else self._next_batch,
        )

    def _enter(self, epoch: int) -> None:
        self._plan = EpochPlan(self.reader.num_tokens_S, self.options, epoch)
        self._epoch, self._next_batch = epoch, 0

    def _move(self) -> None:
        """End the loop that is running, if there is one: its place is about to be left."""
        if self._closed:
            raise StateError("the loader is closed; make another one")
        self._num_moves += 1
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _check_not_moved(self, move: int) -> None:
        if move != self._num_moves:
            raise StateError(
                "the loader was closed, moved or iterated over anew while this loop over it ran: use one at a time"
            )

    def _check_all_given(self, num_given: int, sum_given: int) -> None:
        """That all ranks together were given each sequence once, as far as a count and the sum of their numbers can tell."""
        expected = len(self.reader)
        if (num_given, sum_given) != (expected, expected * (expected - 1) // 2):
            raise RuntimeError(f"epoch {self._epoch} gave {num_given} sequences, the cache has {expected}: a bug of kdcache")
        _log.info("epoch %d: %s", self._epoch, self.counts())


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """A batch that was read ahead: its number, the sequences that all ranks together get in it, and this rank's share."""

    number: int
    sequences: NDArray[np.int64]
    batch: Batch
