"""Work that is done ahead: by threads, handed out in order; and by object stores, which are told what is read next."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kdcache.config.loader import LoaderConfig
from kdcache.loader.caches import CacheSet
from kdcache.store.remote.look_ahead import LookAhead

SequencesOf = Callable[[int], NDArray[np.int64]]
Task = TypeVar("Task")
Result = TypeVar("Result")

THREAD_NAME = "kdcache-prefetch"


def prefetch(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, num_threads: int, look_ahead: int
) -> Generator[Result, None, None]:
    """`map(function, tasks)` with at most `look_ahead` results computed before they are asked for.

    An exception of `function` comes out in place of its task's result, after all results before it. When the generator ends, is
    closed or is collected, tasks that have not begun are dropped, and those that have are waited for: after that none of its
    threads touches anything.

    Args:
        function: called from `num_threads` threads; from the caller's for `num_threads` 0.
        tasks: drawn by the caller's thread, no further ahead than the results.
        num_threads: >= 0.
        look_ahead: >= 1.
    """
    if num_threads == 0:
        for task in tasks:
            yield function(task)
        return
    ours: set[int] = set()
    pool = ThreadPoolExecutor(num_threads, THREAD_NAME, initializer=lambda: ours.add(threading.get_ident()))
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) > look_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # The garbage collector may run this in one of the pool's own threads, which cannot wait for itself.
        pool.shutdown(wait=threading.get_ident() not in ours, cancel_futures=True)


class Fetcher:
    """Tells caches in object stores what is read next, so that it is fetched before a batch waits for it.

    Args:
        caches: that the loader reads.
        config: of the loader.
        num_workers: processes that share the epoch, each with a Fetcher of its own over the same folder for blocks.
    """

    def __init__(self, caches: CacheSet, config: LoaderConfig, num_workers: int = 1) -> None:
        self._caches, self._is_remote = caches, any(cache.reader.ahead is not None for cache in caches.caches)
        self._config, self._num_workers = config, num_workers
        # Batches that were given out and perhaps not read yet: threads are ahead of the consumer.
        self._num_given = config.prefetch_batches + config.num_threads + 1
        self._num_ahead = 2 * self._num_given

    def telling(self, batches: Iterable[int], sequences_of: SequencesOf) -> Iterator[int]:
        """The indices of batches as they come, each once the caches know what it and the next ones read.

        Raises:
            ConfigError: at once, when a cache cannot keep what is read ahead; says the size needed.
        """
        if not self._is_remote:
            return iter(batches)
        batches = iter(batches)
        first = list(islice(batches, self._num_ahead))
        self._reserve([sequences_of(batch) for batch in first])
        return self._tell(chain(first, batches), sequences_of)

    def _tell(self, batches: Iterator[int], sequences_of: SequencesOf) -> Iterator[int]:
        given: deque[NDArray[np.int64]] = deque(maxlen=self._num_given)
        coming: deque[tuple[int, NDArray[np.int64]]] = deque()
        more = True
        while more or coming:
            while more and len(coming) < self._num_ahead:
                batch = next(batches, None)
                more = batch is not None
                if batch is not None:
                    coming.append((batch, sequences_of(batch)))
            if not coming:
                return
            for ahead, own in self._remote([*given, *(sequences for _, sequences in coming)]):
                ahead.prefetch(own)
            batch, sequences = coming.popleft()
            given.append(sequences)
            yield batch

    def _reserve(self, wanted: Sequence[NDArray[np.int64]]) -> None:
        """Check that what is wanted at one time can be kept: caches and workers with one folder for blocks share its room.

        Workers read the same shards in local order, but different record batches in global order. Other ranks of this machine
        are not known here; see `RemoteConfig.block_dir`.
        """
        needs: dict[str | int, int] = defaultdict(int)
        rooms: dict[str | int, LookAhead] = {}
        for ahead, own in self._remote(wanted):
            room = ahead.block_dir or id(ahead)
            rooms[room] = ahead
            if self._config.order == "local":
                needs[room] += ahead.largest_shards_bytes(self._config.local_shards)
            else:
                needs[room] += ahead.ahead_bytes(own) * (1 if ahead.block_dir is None else self._num_workers)
        for room, ahead in rooms.items():
            ahead.reserve(needs[room])

    def _remote(self, sequences: Sequence[NDArray[np.int64]]) -> Iterator[tuple[LookAhead, NDArray[np.int64]]]:
        """What fetches each remote cache, and its own among the sequences, by their indices there."""
        for _, reader, own in self._caches.by_reader(np.concatenate([np.zeros(0, np.int64), *sequences])):
            if reader.ahead is not None:
                yield reader.ahead, own
