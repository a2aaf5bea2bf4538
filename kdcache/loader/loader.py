"""The loader: one rank's batches of an epoch, the same whatever the threads, and resumable after any of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.config.loader import LoaderConfig
from kdcache.errors import ConfigError, StateError
from kdcache.loader.batches.batch import Batch
from kdcache.loader.batches.buffers import Allocate, BufferPool, plain_memory
from kdcache.loader.cache import Cache
from kdcache.loader.caches import CacheLike, CacheSet
from kdcache.loader.checks import check_config, check_epoch, check_ranks
from kdcache.loader.prefetch import Fetcher, prefetch
from kdcache.loader.read import read_rows
from kdcache.loader.report import EpochCheck, EpochReport
from kdcache.loader.rows.layout import BatchRows, EpochCounts, EpochLayout
from kdcache.loader.state import LoaderState, as_json, parse_state, stream_config
from kdcache.shown import get_logger

_log = get_logger(__name__)

_BATCHES_BEFORE_WARNING = 10


class Loader:
    """Iterates over one rank's share of the global batches of a cache, or of a mixture of several.

    `for batch in loader` reads from where the loader stands to the end of the epoch; a second loop reads the next
    epoch, and one after a `break` goes on after the last batch it gave. `state_dict` counts batches that were given, not those
    that threads have read ahead, and is the same on all ranks.

    Args:
        caches: an address, an open cache (`kdcache.open`, or a selection of it), or a list of them; how a list is mixed is said
            in `config.mix`. What is opened here is closed by `close`; open caches stay the caller's, to be closed after the
            loader.
        config: what a batch holds, and in which order.
        rank, world_size: this loader takes the rank-th of world_size equal parts of each global batch, contiguous rows. Ranks
            that share a copy of the model (tensor or context parallel) take the same rank here.
        epoch: to begin with.

    Raises:
        ConfigError: a setting out of range, a sequence longer than a row, ranks that cannot share a batch, an empty cache.
        MismatchError: caches of different tokenizers, vocabularies or selections.
        CacheNotFoundError, CorruptCacheError: an address without a cache.
    """

    def __init__(
        self,
        caches: CacheLike | Sequence[CacheLike],
        config: LoaderConfig = LoaderConfig(),  # noqa: B008 - frozen
        *,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
    ) -> None:
        check_epoch(epoch)
        check_ranks(config, rank, world_size)
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self._caches = CacheSet(caches, config)
        self._epoch = epoch
        self._next_batch = 0
        self._closed = False
        self._ahead: Generator[_Read, None, None] | None = None
        self._num_moves = 0
        self._report = EpochReport(epoch)
        self._make_transients()

    def _make_transients(self) -> None:
        """What is made again from the caches and the config rather than pickled."""
        self._tables = self._caches.tables()
        check_config(self.config, self._tables)
        self._layout = EpochLayout(self._tables, self.config, self._epoch)
        self.use_buffers()

    @property
    def caches(self) -> Sequence[Cache]:
        """The caches, in their order."""
        return self._caches.caches

    @property
    def epoch(self) -> int:
        """The epoch that is being read; after its loop, the one that comes next."""
        return self._epoch

    def num_batches(self, epoch: int) -> int:
        """Batches of a whole epoch; packed epochs differ a little in them."""
        return self._layout_of(epoch).num_batches

    def counts(self) -> EpochCounts:
        """What `epoch` holds, all ranks together."""
        return self._layout.counts()

    def report(self) -> EpochReport:
        """What this rank was given of the epoch that is being read; after its loop, of the one that ended, which was
        checked."""
        return self._report

    def __len__(self) -> int:
        """Batches of the whole epoch, those before a resumed start included; differs a little between packed epochs."""
        return self._layout.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def iterate(self, *, first: int = 0, step: int = 1) -> Iterator[Batch]:
        """Every `step`-th batch from the `first`-th one ahead: `step` workers with `first` 0..step-1 share an epoch in turns.

        Raises (also while it runs):
            StateError: the loader is closed, or was moved or iterated over again in the meantime.
            CorruptCacheError: at the batch with the damaged record; the state then still names that batch.
        """
        self._move()
        if not self._layout.has_batch(self._next_batch):  # a loop was left after the epoch's last batch
            self._enter(self._epoch + 1)
        start, layout = self._next_batch + first, self._layout
        if step > 1 or not self._report.ends_at(self._epoch, self._next_batch):
            self._report = EpochReport(self._epoch, self._next_batch)
        self._ahead = prefetch(
            lambda index: self._read(layout, index),
            Fetcher(self._caches, self.config, step).telling(
                takewhile(layout.has_batch, count(start, step)), lambda index: self._sequences(layout, index)
            ),
            num_threads=self.config.num_threads,
            look_ahead=self.config.prefetch_batches,
        )
        return self._iterate(self._ahead, self._num_moves, EpochCheck() if start == 0 and step == 1 else None)

    def state_dict(self) -> dict[str, Any]:
        """JSON: all that a loader on the same cache with the same config needs to go on after the last batch given."""
        return as_json(self._state())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where a state says. Ranks, world size and threads may differ from those it was saved under.

        Raises:
            StateError: not a state, or one of another cache, of another config or of another version.
        """
        saved = parse_state(state, here=self._state())
        layout = self._layout_of(saved.epoch)
        if not layout.has_batch(saved.next_batch):
            raise StateError(
                f"the loader state names batch {saved.next_batch} of epoch {saved.epoch}, which has {layout.num_batches}"
            )
        self._move()
        self._layout, self._epoch, self._next_batch = layout, saved.epoch, saved.next_batch

    def sources_before(self, state: dict[str, Any]) -> list[str]:
        """Where the sequences of the batch before a state came from, in the cache's words: this rank's part of it.

        Args:
            state: as `state_dict` and `TorchBatch.state` give it.

        Raises:
            StateError: see load_state_dict.
        """
        saved = parse_state(state, here=self._state())
        epoch, index = saved.epoch, saved.next_batch - 1
        if index < 0:  # the last one of the epoch before
            epoch -= 1
            index = self._layout_of(epoch).num_batches - 1 if epoch >= 0 else -1
        if index < 0:
            return []
        return [self._caches.record(int(n)).sequence.source for n in self._sequences(self._layout_of(epoch), index)]

    def set_epoch(self, epoch: int) -> None:
        """Stand at the start of an epoch; in the epoch that is being read, stay, so that a resumed loop may call this too."""
        check_epoch(epoch)
        if epoch != self._epoch:
            self._move()
            self._enter(epoch)

    def close(self) -> None:
        """End a running loop and its threads, and close the caches that were opened here. May be called twice."""
        if not self._closed:
            self._move()
            self._closed = True
            self._caches.close()

    def ask_for(self, config: LoaderConfig) -> None:
        """Read with another config from the next loop on, which differs in what batches hold: features, roles, domains.

        Raises:
            ConfigError: it decides otherwise which positions are in each batch, or a cache lacks what it asks for.
        """
        if config == self.config:
            return
        asked, made = stream_config(config), stream_config(self.config)
        if asked != made:
            name = next(name for name in (asked | made) if asked.get(name) != made.get(name))
            raise ConfigError(
                f"loader.{name} is {getattr(self.config, name)!r}, and {getattr(config, name)!r}, which is needed, gives other "
                f"batches; make the loader with {name} {getattr(config, name)!r}"
            )
        self._move()
        self._caches.ask_for(config)
        self.config = config

    def use_buffers(self, *, allocate: Allocate | None = None) -> None:
        """Take the memory of further batches' large arrays from `allocate`, as pinned memory; it is used again, see
        `buffers.py`.

        A pickled loader begins again with plain memory.
        """
        self._pool = BufferPool(self._num_buffers, allocate or plain_memory)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        transient = {"_ahead", "_tables", "_layout", "_pool"}
        return {name: value for name, value in self.__dict__.items() if name not in transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ahead = None
        self._make_transients()

    @property
    def _num_buffers(self) -> int:
        """Buffers that are in use while the consumer holds two batches, two arrays each, and one more batch."""
        return 2 * (self.config.prefetch_batches * (self.config.num_threads > 0) + self.config.num_threads + 3)

    def _iterate(
        self, ahead: Generator[_Read, None, None], move: int, check: EpochCheck | None
    ) -> Generator[Batch, None, None]:
        try:
            self._check_not_moved(move)
            for read in ahead:
                if check is not None:
                    check.add(read.sequences)
                self._next_batch = read.index + 1
                self._report = self._report.plus(read.batch, read.num_tokens)
                if self._report.num_batches == _BATCHES_BEFORE_WARNING:
                    self._warn_if_all_masked()
                yield read.batch
                del read  # so that the pool has its memory before the next batch is waited for
                self._check_not_moved(move)
        finally:
            # Not left to the garbage collector: the caches may be closed right after this.
            ahead.close()
        if check is not None:
            check.raise_unless_all(self._layout, self._report if self.world_size == 1 else None)
        self._report = replace(self._report, is_complete=True)
        if self._report.num_batches < _BATCHES_BEFORE_WARNING:
            self._warn_if_all_masked()
        _log.info("%s", self._report)
        self._enter(self._epoch + 1)

    def _warn_if_all_masked(self) -> None:
        # No error: another rank may have positions, and would wait for this one for ever.
        if self._report.num_masked and not self._report.num_positions:
            _log.warning(
                "loader.mask has left out all %d positions of the first %d batches; look which roles the cache holds: %s",
                self._report.num_masked,
                self._report.num_batches,
                self.config.mask,
            )

    def _layout_of(self, epoch: int) -> EpochLayout:
        return self._layout if epoch == self._epoch else EpochLayout(self._tables, self.config, epoch)

    def _sequences(self, layout: EpochLayout, index: int) -> NDArray[np.int64]:
        """What this rank reads for a batch."""
        return np.concatenate(self._share(layout.batch(index)))

    def _share(self, batch: BatchRows) -> list[NDArray[np.int64]]:
        share = len(batch.rows) // self.world_size
        return batch.rows[self.rank * share : (self.rank + 1) * share]

    def _read(self, layout: EpochLayout, index: int) -> _Read:
        batch = layout.batch(index)
        read = read_rows(self._caches, self._share(batch), batch.seq_len, self.config.mask, self._pool)
        return _Read(index, np.concatenate(batch.rows), read, read.num_tokens)

    def _state(self) -> LoaderState:
        at_end = self._next_batch > 0 and not self._layout.has_batch(self._next_batch)
        return LoaderState(
            snapshots=tuple(self._caches.snapshots),
            config=stream_config(self.config),
            seed=self.config.seed,
            epoch=self._epoch + 1 if at_end else self._epoch,
            next_batch=0 if at_end else self._next_batch,
        )

    def _enter(self, epoch: int) -> None:
        self._layout = self._layout_of(epoch)
        self._epoch, self._next_batch = epoch, 0

    def _move(self) -> None:
        """End the loop that is running, if there is one: the loader is about to move."""
        if self._closed:
            raise StateError("the loader is closed; make another one")
        self._num_moves += 1
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _check_not_moved(self, move: int) -> None:
        if move != self._num_moves:
            raise StateError(
                "the loader was closed, moved or iterated over again while this loop over it ran: use one at a time"
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """A batch that was read ahead: its index, the sequences that all ranks together get in it, and this rank's share."""

    index: int
    sequences: NDArray[np.int64]
    batch: Batch
    num_tokens: int
