"""`levels.fit_reference` in a compiled loop over positions, GIL released."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.levels import TAIL_BITS, level_masses, nearest_codes
from kdcache.compiled import compiled, inlined


def codes_within_one(
    logprobs: NDArray[np.float32], num_exact_P: NDArray[np.int64], tail_mass_P: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Codes of the exact entries and (P,) codes of the tails, whose probabilities sum to no more than 1, or than they did.

    Args:
        logprobs: of the exact entries, position by position.
        num_exact_P: how many of them are each position's.
        bits: of the entries' codes.
    """
    starts_P1 = np.concatenate([[0], np.cumsum(num_exact_P)]).astype(np.int64)
    true_masses = np.exp(np.ascontiguousarray(logprobs, np.float64))
    true_P = np.ascontiguousarray(tail_mass_P, np.float64)
    with np.errstate(divide="ignore"):
        tail_codes_P = nearest_codes(np.log(true_P), TAIL_BITS)
    codes = nearest_codes(logprobs, bits)
    _fit(codes, tail_codes_P, true_masses, true_P, starts_P1, level_masses(bits), level_masses(TAIL_BITS))
    return codes, tail_codes_P


@inlined
def _is_better(gain, gained, above, chosen):
    if chosen < 0:
        return True
    if gain >= above:
        return gained < above or gain < gained
    return gained < above and gain > gained


_MASSES = "Array(float64, 1, 'C', readonly=True)"


@compiled(f"void(uint8[::1], uint8[::1], float64[::1], float64[::1], int64[::1], {_MASSES}, {_MASSES})")
def _fit(codes, tail_codes, true, true_tails, starts, masses, tail_masses):
    for p in range(tail_codes.shape[0]):
        start, end = starts[p], starts[p + 1]
        most = 0.0
        for e in range(start, end):
            most += true[e]
        most = max(1.0, most + true_tails[p])
        while True:
            total = 0.0
            for e in range(start, end):
                total += masses[codes[e]]
            tail = tail_codes[p]
            above = total + tail_masses[tail] - most
            if not above > 0.0:
                break
            chosen, gained = np.int64(-1), 0.0
            for e in range(start, end):
                code = np.int64(codes[e])
                is_last = e == end - 1 or codes[e + 1] != codes[e]
                if is_last and masses[code] > true[e] and code + 2 < masses.shape[0]:
                    gain = masses[code] - masses[code + 1]
                    if _is_better(gain, gained, above, chosen):
                        chosen, gained = e, gain
            if tail_masses[tail] > true_tails[p] and tail + 2 < tail_masses.shape[0]:
                gain = tail_masses[tail] - tail_masses[tail + 1]
                if _is_better(gain, gained, above, chosen):
                    chosen, gained = end, gain
            if chosen < 0:
                break
            if chosen == end:
                tail_codes[p] += np.uint8(1)
            else:
                codes[chosen] += np.uint8(1)
        room = -above
        for e in range(start, end):
            code = np.int64(codes[e])
            is_first = e == start or codes[e - 1] != codes[e]
            if is_first and code > 0 and masses[code] < true[e] and masses[code - 1] - masses[code] <= room:
                codes[e] -= np.uint8(1)
                room -= masses[code - 1] - masses[code]
