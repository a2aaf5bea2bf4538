"""The random numbers of a selection: a function of seed, sequence key, position and index of the draw, and of nothing else.

They are therefore the same on every backend and route, whatever the batch, chunk, step or rank, and a second run stores the
same entries.

Version 1, on 64-bit words that wrap around, with G = 0x9E3779B97F4A7C15 and `mix64`, the finaliser of splitmix64:

- sequence:  s = mix64(mix64(mix64(seed + G) ^ k0) ^ k1), with the key's two little-endian words k0 and k1
- position:  p = mix64(s + G * (t + 1)), with the position t: `position_states`
- draw:      u = (mix64(p + G * (d + 1)) >> 11) / 2^53, in [0, 1), for d = 0, 1, ...: `uniforms_of`

Changing one bit of this changes what a resumed capture stores: it would have to be a new selection kind or a new parameter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""splitmix64's constants (Steele, Lea, Flood 2014, Figure 17)."""

MASK = 2**64 - 1


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64 bits: a bijection in which every bit of x moves about half of the bits of the result."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
        return x ^ (x >> np.uint64(31))


def position_states(seed: int, key: bytes, positions_P: NDArray[np.integer]) -> NDArray[np.uint64]:
    """(P,) uint64: the state from which the draws of each position follow.

    Args:
        seed: of the selection, a signed 64-bit integer.
        key: of the sequence, 16 bytes.
        positions_P: positions t in the sequence, >= 0.
    """
    state = mix64(np.array([(seed + GOLDEN) & MASK], np.uint64))
    for word in np.frombuffer(key, "<u8", count=2):
        state = mix64(state ^ word)
    with np.errstate(over="ignore"):
        return mix64(state + np.uint64(GOLDEN) * (positions_P.astype(np.uint64) + np.uint64(1)))


def uniforms_of(states_P: NDArray[np.uint64], num_draws: int) -> NDArray[np.float64]:
    """(P, num_draws) float64 in [0, 1): multiples of 2^-53."""
    draws = np.arange(1, num_draws + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        words = mix64(states_P[:, None] + np.uint64(GOLDEN) * draws)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
