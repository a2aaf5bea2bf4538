"""Pairs of answers to one prompt, which order and packing move about as one: pure functions of groups and preferences.

A bundle is a pair, its chosen answer first, or a sequence without one. Bundles are ordered by their first sequence in the
cache.
Of a group with several chosen and rejected answers the first chosen one goes with the first rejected one, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHOSEN, REJECTED = 1, 2
"""Codes of `kdcache.format.record.PREFERENCES`."""


@dataclass(frozen=True, slots=True, eq=False)
class Bundles:
    """The bundles of a cache, or of several together.

    Attributes:
        firsts: (number of bundles,) int64: the chosen answer, or the sequence that has no partner.
        seconds: (number of bundles,) int64: the rejected answer, -1 for a sequence without a partner.
    """

    firsts: NDArray[np.int64]
    seconds: NDArray[np.int64]

    @property
    def num_sequences(self) -> int:
        """Both answers of each pair, and those alone."""
        return len(self) + self.num_pairs

    def __len__(self) -> int:
        return len(self.firsts)

    @property
    def num_pairs(self) -> int:
        """Bundles that are pairs."""
        return int(np.count_nonzero(self.seconds >= 0))

    def num_tokens(self, num_tokens_S: NDArray[np.integer]) -> NDArray[np.int64]:
        """(number of bundles,) tokens of both answers together."""
        lengths_S = num_tokens_S.astype(np.int64)
        return lengths_S[self.firsts] + np.where(self.seconds >= 0, lengths_S[self.seconds], 0)

    def shard_sizes(self, shard_sizes_C: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bundles of each shard: of that of the bundle's first sequence in the cache."""
        leading = np.where(self.seconds >= 0, np.minimum(self.firsts, self.seconds), self.firsts)
        ends_C = np.cumsum(shard_sizes_C)
        return np.bincount(np.searchsorted(ends_C, leading, "right"), minlength=len(ends_C)).astype(np.int64)

    def sequences(self, bundles: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sequences of some bundles, in their order."""
        both = np.stack([self.firsts[bundles], self.seconds[bundles]], axis=1).reshape(-1)
        return both[both >= 0]

    def partners_S(self, num_sequences: int) -> NDArray[np.int64]:
        """(S,) int64: the rejected answer that goes with each chosen one; -1 for every other sequence."""
        partners_S, is_pair = np.full(num_sequences, -1, np.int64), self.seconds >= 0
        partners_S[self.firsts[is_pair]] = self.seconds[is_pair]
        return partners_S


def find_bundles(groups: NDArray[np.uint8], preferences_S: NDArray[np.uint8]) -> Bundles:
    """The bundles of a cache.

    Args:
        groups: (S, 16) the group of each sequence, all zeros for none.
        preferences_S: (S,) codes of PREFERENCES.
    """
    names_S = np.ascontiguousarray(groups).view("V16")[:, 0]
    group_S = np.unique(names_S, return_inverse=True)[1].reshape(-1) if len(names_S) else np.zeros(0, np.int64)
    has_group_S = groups.any(axis=1)
    chosen, rejected = (np.flatnonzero(has_group_S & (preferences_S == code)) for code in (CHOSEN, REJECTED))
    _, ours, theirs = np.intersect1d(_keys(group_S, chosen), _keys(group_S, rejected), return_indices=True)
    pairs = np.stack([chosen[ours], rejected[theirs]], axis=1)
    alone = np.setdiff1d(np.arange(len(group_S)), pairs)
    firsts, seconds = np.concatenate([pairs[:, 0], alone]), np.concatenate([pairs[:, 1], np.full(len(alone), -1)])
    order = np.argsort(np.concatenate([pairs.min(axis=1), alone]) if len(pairs) else alone, kind="stable")
    return Bundles(firsts[order].astype(np.int64), seconds[order].astype(np.int64))


def find_bundles_reference(groups: Sequence[bytes], preferences: Sequence[int]) -> list[tuple[int, int]]:
    """(first, second or -1) of each bundle, as one would explain it: the definition that `find_bundles` is compared with."""
    waiting: dict[tuple[bytes, int], list[int]] = {}
    for index, (group, code) in enumerate(zip(groups, preferences, strict=True)):
        if any(group) and code:
            waiting.setdefault((group, code), []).append(index)
    pairs = [
        pair
        for (group, code), chosen in waiting.items()
        if code == CHOSEN
        for pair in zip(chosen, waiting.get((group, REJECTED), []), strict=False)
    ]
    paired = {index for pair in pairs for index in pair}
    bundles = pairs + [(index, -1) for index in range(len(groups)) if index not in paired]
    return sorted(bundles, key=lambda bundle: min(index for index in bundle if index >= 0))


def joined(parts: Sequence[Bundles], sizes: Sequence[int]) -> Bundles:
    """The bundles of several caches together.

    Args:
        parts: of each cache.
        sizes: sequences of each cache.
    """
    bases = np.cumsum([0, *sizes])[:-1]
    firsts = [part.firsts + base for part, base in zip(parts, bases, strict=True)]
    seconds = [np.where(part.seconds >= 0, part.seconds + base, -1) for part, base in zip(parts, bases, strict=True)]
    return Bundles(np.concatenate(firsts), np.concatenate(seconds))


def pairs_in(sequences: NDArray[np.int64], partners_S: NDArray[np.int64]) -> NDArray[np.int64]:
    """(number of pairs, 2) int64: which of a batch's sequences are the chosen and the rejected answer of a pair.

    Args:
        sequences: of the batch, row after row; the two answers of a pair stand next to each other.
        partners_S: see `Bundles.partners_S`.
    """
    chosen = np.flatnonzero(partners_S[sequences[:-1]] == sequences[1:]) if len(sequences) > 1 else np.zeros(0, np.int64)
    return np.stack([chosen, chosen + 1], axis=1).astype(np.int64)


def _keys(group_S: NDArray[np.int64], members: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number for each member: equal for the n-th members of one group."""
    order = np.argsort(group_S[members], kind="stable")
    sorted_groups = group_S[members][order]
    starts = np.searchsorted(sorted_groups, sorted_groups, "left")
    ranks = np.empty(len(members), np.int64)
    ranks[order] = np.arange(len(members)) - starts
    return group_S[members] * (len(group_S) + 1) + ranks
