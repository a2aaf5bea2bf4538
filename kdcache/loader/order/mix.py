"""The order of an epoch over one cache or several: which sequence comes at each rank.

Sequences of all caches are numbered together: sequence i of cache c is number `bases[c] + i`.

An epoch takes `counts[c]` sequences from cache c and spreads them evenly: the j-th of them has the key (2 j + 1) / (2
counts[c]), a float64 division, and ranks go by rising key, among equals by the cache's number. So in any stretch of the epoch
each cache has its share, to within one sequence, and all of them end together. Which sequence the j-th is: cache c goes through
its own order pass after pass whatever the epochs, so in epoch e it is number e counts[c] + j of that endless row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from kdcache.config.loader import LoaderConfig, MixConfig
from kdcache.errors import ConfigError
from kdcache.loader.order.local import LocalOrder
from kdcache.loader.order.pairs import Bundles
from kdcache.loader.order.shuffle import Order, derived_seed, sequences_at

_CACHE = 3


@dataclass(frozen=True, slots=True, eq=False)
class CacheTable:
    """What order and packing know of a cache: lengths from its index, and how its sequences lie in shards.

    Attributes:
        num_tokens_S: (S,) tokens of each sequence.
        shard_sizes_C: (C,) sequences of each shard, in the cache's order; they sum to S.
        bundles: where pairs of answers are kept together: S then counts these bundles, and not sequences.
    """

    num_tokens_S: NDArray[np.integer]
    shard_sizes_C: NDArray[np.int64]
    bundles: Bundles | None = None

    def of_bundles(self, bundles: Bundles) -> CacheTable:
        """The same of bundles instead of sequences."""
        return CacheTable(bundles.num_tokens(self.num_tokens_S), bundles.shard_sizes(self.shard_sizes_C), bundles)

    @classmethod
    def of_lengths(cls, num_tokens_S: NDArray[np.unsignedinteger]) -> CacheTable:
        """A cache of one shard."""
        return cls(num_tokens_S, np.array([len(num_tokens_S)], np.int64))


def epoch_counts(sizes: Sequence[int], mix: MixConfig) -> list[int]:
    """How many sequences of each cache an epoch takes; exact arithmetic, so that no platform rounds otherwise.

    Raises:
        ConfigError: not one weight or count per cache, or a weight so small that its cache would give nothing.
    """
    for name, values in (("weights", mix.weights), ("counts", mix.counts)):
        if values and len(values) != len(sizes):
            raise ConfigError(f"mix.{name} has {len(values)} numbers for {len(sizes)} caches; give one for each, in order")
    if mix.counts:
        return list(mix.counts)
    if not mix.weights:
        return list(sizes)
    weights = [Fraction(weight) for weight in mix.weights]
    passes = [size / weight for size, weight in zip(sizes, weights, strict=True)]
    factor = min(passes) if mix.epoch_ends == "first_exhausted" else max(passes)
    counts = [int(weight * factor) for weight in weights]
    if not all(counts):
        missing = counts.index(0)
        raise ConfigError(
            f"mix.weights gives cache {missing} no sequence in an epoch of {sum(counts)}; raise its weight "
            f"{mix.weights[missing]}, leave it out, or set mix.epoch_ends to all_exhausted"
        )
    return counts


class EpochOrder:
    """The order of one epoch; pure in its arguments. Safe to use from several threads.

    Args:
        caches: at least one.
        config: order, local_shards, shuffle, seed and mix matter.
        epoch: >= 0.
    """

    def __init__(self, caches: Sequence[CacheTable], config: LoaderConfig, epoch: int) -> None:
        self._caches, self._config, self._epoch = caches, config, epoch
        self.sizes = [len(cache.num_tokens_S) for cache in caches]
        self.bases = np.cumsum([0, *self.sizes])
        self.counts = epoch_counts(self.sizes, config.mix)
        self.num_sequences = sum(self.counts)
        self._passes: dict[tuple[int, int], Order | LocalOrder] = {}

    def sequences_at(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start,) int64, the numbers of the sequences at ranks start..stop-1.

        Raises:
            IndexError: not 0 <= start <= stop <= num_sequences.
        """
        if not 0 <= start <= stop <= self.num_sequences:
            raise IndexError(f"ranks {start}:{stop} are not within an order of {self.num_sequences} sequences")
        if len(self._caches) == 1:
            return self._of_cache(0, start, stop)
        spans = interleaved_spans(self.counts, start, stop)
        keys_S = np.concatenate([_keys(low, high, n) for (low, high), n in zip(spans, self.counts, strict=True)])
        caches_S = np.repeat(np.arange(len(spans)), [high - low for low, high in spans])
        sequences_S = np.concatenate([self._of_cache(c, low, high) for c, (low, high) in enumerate(spans)])
        skipped = start - sum(low for low, _ in spans)
        return sequences_S[np.lexsort((caches_S, keys_S))][skipped : skipped + stop - start]

    def num_tokens(self, indices_S: NDArray[np.int64]) -> NDArray[np.int64]:
        """(S,) int64, the tokens of these sequences."""
        if len(self._caches) == 1:
            return self._caches[0].num_tokens_S[indices_S].astype(np.int64)
        lengths_S = np.zeros(len(indices_S), np.int64)
        caches_S = np.searchsorted(self.bases, indices_S, "right") - 1
        for c, cache in enumerate(self._caches):
            is_its_S = caches_S == c
            lengths_S[is_its_S] = cache.num_tokens_S[indices_S[is_its_S] - self.bases[c]]
        return lengths_S

    def expected_sum(self) -> int | None:
        """The sum of the numbers of all sequences of the epoch, where it takes whole passes of each cache; else None."""
        if any(count % size for count, size in zip(self.counts, self.sizes, strict=True)):
            return None
        sums = [int(base) * size + size * (size - 1) // 2 for base, size in zip(self.bases, self.sizes, strict=False)]
        return sum(count // size * one for count, size, one in zip(self.counts, self.sizes, sums, strict=True))

    def _of_cache(self, cache: int, start: int, stop: int) -> NDArray[np.int64]:
        """Numbers start..stop-1 of a cache's share of the epoch."""
        size, before = self.sizes[cache], self._epoch * self.counts[cache]
        start, stop = before + start, before + stop
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            pass_index, rank = divmod(start, size)
            end = min(stop, (pass_index + 1) * size)
            parts.append(_ranks(self._pass(cache, pass_index), rank, rank + end - start))
            start = end
        return np.concatenate(parts) + self.bases[cache]

    def _pass(self, cache: int, index: int) -> Order | LocalOrder:
        if (cache, index) not in self._passes:
            config, seed = self._config, self._config.seed
            if len(self._caches) > 1:
                seed = derived_seed(seed, _CACHE, cache)
            if config.order == "local" and config.shuffle:
                sizes_C = self._caches[cache].shard_sizes_C
                self._passes[cache, index] = LocalOrder(sizes_C, config.local_shards, seed, index)
            else:
                self._passes[cache, index] = Order(self.sizes[cache], seed, index, config.shuffle)
        return self._passes[cache, index]


def interleaved_spans(counts: Sequence[int], start: int, stop: int) -> list[tuple[int, int]]:
    """For each cache a range of its share that surely covers ranks start..stop-1, such that all that comes before the ranges
    comes before `start`.

    Of n caches, the sequences with a key below x are x * num_sequences, give or take n / 2; so the one of rank p has its key
    within n / 2 + 1 ranks of p / num_sequences, and cache c has given its share of p by then, within n / 2 + 2.
    """
    total, slack = sum(counts), len(counts) + 3
    lows = [max(0, start * count // total - slack) for count in counts]
    highs = [min(count, stop * count // total + slack) for count in counts]
    return list(zip(lows, highs, strict=True))


def interleave_reference(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(cache, j) at each rank of an epoch, by sorting all of them: the definition that `EpochOrder` is compared with."""
    keys = [((2 * j + 1) / (2 * count), cache, j) for cache, count in enumerate(counts) for j in range(count)]
    return [(cache, j) for _, cache, j in sorted(keys)]


def _keys(low: int, high: int, count: int) -> NDArray[np.float64]:
    return (2 * np.arange(low, high, dtype=np.int64) + 1) / np.float64(2 * count)


def _ranks(order: Order | LocalOrder, start: int, stop: int) -> NDArray[np.int64]:
    return order.sequences_at(start, stop) if isinstance(order, LocalOrder) else sequences_at(order, start, stop)
