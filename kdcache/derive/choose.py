"""Choose sequences by index, by key or at random: pure functions of a cache's index. S counts the sequences of all sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.derive.reduction.systematic import operation_seed
from kdcache.errors import ConfigError, InputError
from kdcache.format.record import KEY_BYTES
from kdcache.teacher.select.uniforms import GOLDEN, MASK, mix64


@dataclass(frozen=True, kw_only=True)
class Select:
    """Sequences by index or key; whatever either names is taken once, in the order of the sources.

    Attributes:
        ranges: (first, end) of each range of indexes, end not included; they count through all sources, from 0.
        keys: 16 bytes each. Equal texts have equal keys, and all of them are taken.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    keys: tuple[bytes, ...] = ()


def selected(select: Select, keys_S: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(S,) whether a sequence is taken.

    Args:
        keys_S: (S, 16) uint8.

    Raises:
        ConfigError: a range outside the sequences, a key that is not 16 bytes. InputError: a key that no sequence has.
    """
    taken_S = np.zeros(len(keys_S), bool)
    for first, end in select.ranges:
        if not 0 <= first < end <= len(keys_S):
            raise ConfigError(
                f"select: {first}:{end} is not among the {len(keys_S):,} sequences; expected FIRST:END with "
                f"0 <= FIRST < END <= {len(keys_S)}"
            )
        taken_S[first:end] = True
    if select.keys:
        taken_S |= _by_key(select.keys, keys_S)
    return taken_S


def _by_key(keys: Sequence[bytes], keys_S: NDArray[np.uint8]) -> NDArray[np.bool_]:
    for key in keys:
        if len(key) != KEY_BYTES:
            raise ConfigError(f"select: the key {key.hex()!r} has {len(key)} bytes, expected {KEY_BYTES}")
    asked, there_S = np.unique(np.frombuffer(b"".join(keys), f"S{KEY_BYTES}")), as_keys(keys_S)
    taken_S = np.isin(there_S, asked)
    missing = asked[~np.isin(asked, there_S[taken_S])]
    if len(missing):
        raise InputError(
            f"select: no sequence has the key {missing[0].ljust(KEY_BYTES, bytes(1)).hex()} "
            f"({len(missing):,} of {len(asked):,} keys are in none of the sources)"
        )
    return taken_S


def as_keys(keys_S: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """(S,) keys as one value each, comparable as the keys are."""
    return np.ascontiguousarray(keys_S).view(f"S{KEY_BYTES}").reshape(-1)


def sampled(fraction: float, seed: int, keys_S: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(S,) whether a sequence is in a random sample without replacement of round(fraction S) of them.

    The sample has the smallest hashes of (seed, key): it does not depend on the order, and a larger fraction contains a
    smaller one.

    Raises:
        ConfigError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction: {fraction!r} is given, expected one above 0 and at most 1")
    words_S2 = np.ascontiguousarray(keys_S).view("<u8")
    hashes_S = np.full(len(keys_S), (operation_seed("sample", seed) + GOLDEN) & MASK, np.uint64)
    for word in range(2):
        hashes_S = mix64(hashes_S ^ words_S2[:, word])
    taken_S = np.zeros(len(keys_S), bool)
    taken_S[np.argsort(hashes_S, kind="stable")[: round(fraction * len(keys_S))]] = True
    return taken_S
