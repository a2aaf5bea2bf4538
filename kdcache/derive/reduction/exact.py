"""Fewer exact entries: the first ones stay, the others join the tail."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.derive.reduction.entries import Entries, rebuilt, sum_per_position
from kdcache.format.record import Distributions


def reduce_exact(
    d: Distributions, targets: tuple[NDArray[np.int32], NDArray[np.float32]], *, k: int, p: float | None = None
) -> Distributions:
    """Keep the most probable entries until their mass reaches p (None: all), at most k.

    Args:
        d: of `top_k` or `top_p_k`: all entries exact.
        targets: (P,) ids and logprobs of all targets; those that are no longer an entry are kept apart.
    """
    entries = Entries.of(d)
    mass_E = np.exp(entries.logprobs_E)
    rank_E = np.arange(d.num_entries) - np.repeat(d.offsets_P1[:-1], d.num_entries_P)
    keep_E = rank_E < k
    if p is not None:
        sums = np.concatenate([[0.0], np.cumsum(mass_E)])
        before_E = sums[:-1] - np.repeat(sums[d.offsets_P1[:-1]], d.num_entries_P)
        keep_E &= before_E < p
    dropped_P = sum_per_position(mass_E[~keep_E], entries.positions_E[~keep_E], d.num_positions)
    return rebuilt(d, entries.taken(keep_E), d.tail_mass_P + dropped_P, targets, has_estimates=False)
