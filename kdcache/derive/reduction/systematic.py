"""Systematic sampling at every position at once: the one random step of all derived caches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.format.manifest import fingerprint
from kdcache.teacher.select.uniforms import position_states, uniforms_of


def systematic_counts(
    weights_E: NDArray[np.float64], token_ids_E: NDArray[np.int32], offsets_P1: NDArray[np.int64], u_P: NDArray[np.float64]
) -> NDArray[np.int64]:
    """(E,) how many of a position's points fall into each entry's interval of its cumulative weight.

    The intervals are adjacent, by rising id, and the points at u, u + 1, u + 2, ... (Madow 1949): an entry of weight w gets
    floor(w) or ceil(w) of them, and w in the mean over u, which is uniform in [0, 1).

    Args:
        weights_E: >= 0, in points.
        token_ids_E: distinct within a position.
        offsets_P1: see `Distributions`.
        u_P: one uniform for each position.
    """
    positions_E = np.repeat(np.arange(len(offsets_P1) - 1), np.diff(offsets_P1))
    order_E = np.lexsort((token_ids_E, positions_E))
    sums = np.concatenate([[0.0], np.cumsum(weights_E[order_E])])
    base_E, u_E = sums[offsets_P1[:-1]][positions_E], u_P[positions_E]
    counts_E = np.empty(len(positions_E), np.int64)
    counts_E[order_E] = (np.ceil((sums[1:] - base_E) - u_E) - np.ceil((sums[:-1] - base_E) - u_E)).astype(np.int64)
    return counts_E


def operation_seed(*facts: object) -> int:
    """A seed for one operation, different for each operation, its parameters and the history of what it is applied to.

    A second draw with the random numbers of the first would depend on what the first kept, and be biased.
    """
    return int(fingerprint(["kdcache.derive.v1", *facts])[:15], 16)


def position_uniforms(seed: int, key: bytes, positions_P: NDArray[np.integer]) -> NDArray[np.float64]:
    """(P,) a uniform in [0, 1) for each position: a function of (seed, sequence key, position) and of nothing else."""
    return uniforms_of(position_states(seed, key, positions_P), 1)[:, 0]
