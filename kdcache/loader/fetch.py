"""Tell caches in object stores what is read next, so that it is fetched before a batch waits for it. Disks are not told."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.config.loader import LoaderConfig
from kdcache.loader.base import Reader

SequencesOf = Callable[[int], NDArray[np.int64]]


class Fetcher:
    """The remote ones among the caches that a loader numbers together.

    Args:
        readers: in their order.
        config: of the loader.
        num_workers: processes that share the epoch, each with a Fetcher of its own over the same folder for blocks.
    """

    def __init__(self, readers: Sequence[Reader], config: LoaderConfig, num_workers: int = 1) -> None:
        ends = np.cumsum([len(reader) for reader in readers])
        self._remote: list[tuple[int, int, Any]] = [
            (int(end) - len(reader), int(end), reader)
            for end, reader in zip(ends, readers, strict=True)
            if getattr(reader, "is_remote", False)
        ]
        self._config, self._num_workers = config, num_workers
        # Given out and perhaps not read yet: what threads are ahead of the consumer.
        self._num_behind = config.prefetch_batches + config.num_threads + 1
        self._num_ahead = 2 * self._num_behind

    def telling(self, numbers: Iterable[int], sequences_of: SequencesOf) -> Iterator[int]:
        """The numbers of batches as they come, each given when the caches know what it and those behind it read.

        Raises:
            ConfigError: at once, when a cache cannot keep what is read ahead; says the size needed.
        """
        if not self._remote:
            return iter(numbers)
        numbers = iter(numbers)
        first = list(islice(numbers, self._num_ahead))
        self._reserve([sequences_of(number) for number in first])
        return self._tell(chain(first, numbers), sequences_of)

    def _tell(self, numbers: Iterator[int], sequences_of: SequencesOf) -> Iterator[int]:
        behind: deque[NDArray[np.int64]] = deque(maxlen=self._num_behind)
        coming: deque[tuple[int, NDArray[np.int64]]] = deque()
        more = True
        while more or coming:
            while more and len(coming) < self._num_ahead:
                number = next(numbers, None)
                more = number is not None
                if number is not None:
                    coming.append((number, sequences_of(number)))
            if not coming:
                return
            window = np.concatenate([*behind, *(sequences for _, sequences in coming)])
            for reader, own in self._split(window):
                reader.prefetch(own)
            number, sequences = coming.popleft()
            behind.append(sequences)
            yield number

    def _reserve(self, window: Sequence[NDArray[np.int64]]) -> None:
        """That what is wanted at one time can be kept: caches and workers with one folder for blocks share its room.

        Workers read the same shards of a local order, but other record batches of a global one. Ranks of this machine are
        not known here; see `RemoteConfig.block_dir`.
        """
        needs: dict[Any, int] = defaultdict(int)
        readers: dict[Any, Any] = {}
        for reader, own in self._split(np.concatenate([np.zeros(0, np.int64), *window])):
            room = reader.block_dir or id(reader)
            readers[room] = reader
            if self._config.order == "local":
                needs[room] += reader.largest_shards_bytes(self._config.local_shards)
            else:
                needs[room] += reader.window_bytes(own) * (1 if reader.block_dir is None else self._num_workers)
        for room, reader in readers.items():
            reader.reserve(needs[room])

    def _split(self, sequences: NDArray[np.int64]) -> Iterator[tuple[Any, NDArray[np.int64]]]:
        """The remote caches, and their own among the sequences, numbered as they number them."""
        for start, end, reader in self._remote:
            yield reader, sequences[(sequences >= start) & (sequences < end)] - start
