"""The local order: shards in a shuffled order, a few at a time, their sequences mixed. For caches that are read from afar:
what is read in a stretch of the epoch lies in `local_shards` shards.

The shards are permuted by the keyed bijection of `order.py`. Each group of several of them, one after another in that order,
is a range of ranks; within it a bijection of its own, keyed by the group's number, says which of the group's sequences
comes when. Memory: a few numbers per shard, nothing per sequence.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.loader.order.shuffle import Order, derived_seed, sequence_at_reference, sequences_at

_SHARDS, _GROUP = 1, 2


class LocalOrder:
    """The order in which one epoch reads a cache, group by group; `Order` for the shards and for each group.

    Args:
        shard_sizes_C: (C,) sequences of each shard, in the cache's order; shards of none are passed over.
        local_shards: shards in a group; the last group has what is left.
        seed, epoch: as for Order.
    """

    def __init__(self, shard_sizes_C: NDArray[np.int64], local_shards: int, seed: int, epoch: int) -> None:
        self.seed, self.epoch = seed, epoch
        sizes_C = np.asarray(shard_sizes_C, np.int64)
        firsts_C = np.cumsum(sizes_C) - sizes_C
        sizes_C, firsts_C = sizes_C[sizes_C > 0], firsts_C[sizes_C > 0]
        shards_C = sequences_at(Order(len(sizes_C), derived_seed(seed, _SHARDS), epoch), 0, len(sizes_C))
        self._firsts_C = firsts_C[shards_C]
        self._starts_C1 = np.append(0, np.cumsum(sizes_C[shards_C]))
        self._local_shards = local_shards
        self._group_starts_1 = np.append(self._starts_C1[:-1:local_shards], self._starts_C1[-1])

    @property
    def num_sequences(self) -> int:
        """Of the cache."""
        return int(self._starts_C1[-1])

    def group_order(self, group: int) -> Order:
        """The bijection of a group's own ranks."""
        size = int(self._group_starts_1[group + 1] - self._group_starts_1[group])
        return Order(size, derived_seed(self.seed, _GROUP, group), self.epoch)

    def sequences_at(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start,) int64, the sequences at ranks start..stop-1 of the order.

        Raises:
            IndexError: not 0 <= start <= stop <= num_sequences.
        """
        if not 0 <= start <= stop <= self.num_sequences:
            raise IndexError(f"ranks {start}:{stop} are not within an order of {self.num_sequences} sequences")
        parts = [np.zeros(0, np.int64)]
        group = int(np.searchsorted(self._group_starts_1, start, "right")) - 1
        while start < stop:
            first, end = int(self._group_starts_1[group]), int(self._group_starts_1[group + 1])
            ranks_S = first + sequences_at(self.group_order(group), start - first, min(stop, end) - first)
            parts.append(self._in_shards(ranks_S))
            start, group = end, group + 1
        return np.concatenate(parts)

    def sequence_at_reference(self, rank: int) -> int:
        """The sequence at one rank, by writing out its group: the definition that `sequences_at` is compared with."""
        shards = list(range(len(self._firsts_C)))
        groups = [shards[i : i + self._local_shards] for i in range(0, len(shards), self._local_shards)]
        for group, members in enumerate(groups):
            spans = [(self._firsts_C[c], self._starts_C1[c + 1] - self._starts_C1[c]) for c in members]
            sequences = [int(first) + i for first, size in spans for i in range(int(size))]
            if rank < len(sequences):
                return sequences[sequence_at_reference(self.group_order(group), rank)]
            rank -= len(sequences)
        raise IndexError(rank)

    def _in_shards(self, ranks_S: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sequences at ranks of the shuffled shards laid one after another."""
        shards_S = np.searchsorted(self._starts_C1, ranks_S, "right") - 1
        return self._firsts_C[shards_S] + ranks_S - self._starts_C1[shards_S]
