"""Levels for logprobs: few near probability 0, many near 1, where an error costs most. What `quantized` and `archive` store.

With b bits, code c from 0 to L = 2^b - 2 is the logprob -R (c / L)^2, R = 4 b nats; code L + 1 is -inf. So code 0 is
probability 1, steps grow with the square root of the logprob, and order is kept. A logprob below -R becomes -R.

Rounding goes to the nearest code, but no position gains mass by it: where the probabilities of its exact entries and its tail
would sum to more than 1 (or than they did), entries that were rounded up go one level down; and the room that is left below
1 is filled by entries that were rounded down, so that little mass is lost, see `fit_reference`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

LEAST_BITS, MOST_BITS = 4, 8
TAIL_BITS = 8
"""Tails and targets outside the support are one byte each whatever the entries are."""


@cache
def level_logprobs(bits: int) -> NDArray[np.float32]:
    """(2^bits,) the logprob of each code; correctly rounded quotients of integers, so the same on every machine."""
    last = 2**bits - 2
    codes = np.arange(last + 1, dtype=np.float64)
    logprobs = np.append(-(codes * codes * (4 * bits)) / (last * last), -np.inf).astype(np.float32)
    logprobs[0] = 0.0
    logprobs.flags.writeable = False
    return logprobs


@cache
def level_masses(bits: int) -> NDArray[np.float64]:
    """(2^bits,) the probability of each code."""
    masses = np.exp(level_logprobs(bits).astype(np.float64))
    masses.flags.writeable = False
    return masses


def nearest_codes(logprobs: NDArray[np.floating], bits: int) -> NDArray[np.uint8]:
    """The nearest code of each logprob: nearest in the square root, where levels are evenly spaced."""
    last = 2**bits - 2
    scaled = np.sqrt(np.maximum(-np.asarray(logprobs, np.float64), 0.0) / (4 * bits)) * last
    return np.where(np.isinf(scaled), last + 1, np.minimum(np.rint(scaled), last)).astype(np.uint8)


def max_level_error(logprobs: NDArray[np.floating], bits: int) -> NDArray[np.float64]:
    """Elementwise bound on |level - logprob|: one step, as the nearest code may be left; beyond R what is cut off."""
    scale, size = (2**bits - 2) / np.sqrt(4 * bits), np.abs(np.asarray(logprobs, np.float64))
    step = 2 * np.sqrt(size) / scale + 1 / scale**2 + size * 2.0**-22
    return np.where(size > 4 * bits, np.maximum(step, size - 4 * bits), step)


def max_half_error(logprobs: NDArray[np.floating]) -> NDArray[np.float64]:
    """Elementwise bound on |float16 - logprob|: half a unit of the last digit, 11 bits of precision for normal numbers, steps
    of 2^-24 below 2^-14; beyond 65504 there is none."""
    size = np.abs(np.asarray(logprobs, np.float64))
    return np.where(size > 65504, np.inf, np.maximum(size * 2.0**-11, 2.0**-25))


def fit_reference(
    codes: list[int], tail_code: int, logprobs: list[float], tail_mass: float, bits: int
) -> tuple[list[int], int]:
    """The codes of one position's exact entries and of its tail, moved by at most one so that they sum to nearly 1 but no more.

    The obvious way; `_numba_levels` holds the fast one. While the sum is above both 1 and what it was before rounding, one
    entry goes down a level, none to -inf: of those that rounding raised, the last of its code (so that order is kept), the one
    that takes away least and enough, or, where none is enough, most; among equals the first; the tail comes after all entries.
    Then, from the first entry to the last, each that is below its own probability and the first of its code goes up a level
    where there is room.

    Args:
        codes: nearest codes, rising.
        logprobs: what they stand for.
    """
    tables = [level_masses(bits)] * len(codes) + [level_masses(TAIL_BITS)]
    true = [*np.exp(np.array(logprobs, np.float64)).tolist(), tail_mass]
    codes, most = [*codes, tail_code], max(1.0, sum(true))

    def above() -> float:
        # The entries first: float64 sums depend on their order.
        return sum(float(t[c]) for t, c in zip(tables, codes, strict=True)) - most

    while above() > 0 and (chosen := _to_lower(codes, tables, true, above())) is not None:
        codes[chosen] += 1
    room = -above()
    for e in range(len(codes) - 1):
        code, table = codes[e], tables[e]
        is_first = e == 0 or codes[e - 1] != code
        if is_first and code > 0 and table[code] < true[e] and table[code - 1] - table[code] <= room:
            codes[e] -= 1
            room -= float(table[code - 1] - table[code])
    return codes[:-1], codes[-1]


def _to_lower(codes: list[int], tables: list[NDArray[np.float64]], true: list[float], above: float) -> int | None:
    takes = {}
    for e, (code, table) in enumerate(zip(codes, tables, strict=True)):
        is_last = e >= len(codes) - 2 or codes[e + 1] != code
        if is_last and table[code] > true[e] and code + 2 < len(table):
            takes[e] = float(table[code] - table[code + 1])
    enough = [e for e in takes if takes[e] >= above]
    if enough:
        return min(enough, key=takes.__getitem__)
    return max(takes, key=takes.__getitem__, default=None)
