"""Fewer entries from a random selection: its estimates, and entries that stop being exact, are sampled once more.

Whatever was kept stands for its token without bias, and the second draw is independent of the first
(`systematic.operation_seed`), so that what is kept of it does as well: E[E[second | first]] = E[first] = p.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kdcache.derive.reduction.entries import Entries, rebuilt, sum_per_position
from kdcache.derive.reduction.systematic import systematic_counts
from kdcache.format.record import Distributions

KnownTargets = tuple[NDArray[np.int32], NDArray[np.float32]]
"""(P,) ids and (P,) logprobs of all targets; those that are not exact entries are kept apart."""


def reduce_threshold(
    d: Distributions, targets: KnownTargets, taus: tuple[float, float], u_P: NDArray[np.float64]
) -> Distributions:
    """Reduce `threshold` to a larger tau: exact entries that reach it stay; every other entry of value v (an exact one its
    probability, an estimate the old tau) is kept with probability v / tau, as an estimate of tau.

    Args:
        taus: the old one and the new, larger one.
        u_P: a uniform for each position.
    """
    old, tau = taus
    entries = Entries.of(d)
    stays_E = entries.is_exact_E & (entries.logprobs_E >= math.log(tau))
    values_E = np.where(entries.is_exact_E, np.exp(entries.logprobs_E), old)
    counts_E = systematic_counts(np.where(stays_E, 0.0, values_E / tau), d.token_ids_E, d.offsets_P1, u_P)
    joins_tail_E = entries.is_exact_E & ~stays_E
    tail_P = d.tail_mass_P + sum_per_position(values_E[joins_tail_E], entries.positions_E[joins_tail_E], d.num_positions)
    logprobs_E = np.where(stays_E, entries.logprobs_E, math.log(tau))
    made = Entries(entries.positions_E, entries.token_ids_E, logprobs_E, stays_E).taken(stays_E | (counts_E > 0))
    return rebuilt(d, made, tail_P, targets, has_estimates=True)


def reduce_draws(d: Distributions, targets: KnownTargets, *, k: int, num_draws: int, u_P: NDArray[np.float64]) -> Distributions:
    """Reduce `sampled` or `top_k_sampled` to fewer draws, and the latter to k exact entries: every other entry of value v
    becomes v num_draws / R draws, rounded up or down at random, R the mass of all that is not exact.

    Together they are num_draws again, as independent draws would be, and their variance is less.
    """
    entries = Entries.of(d)
    rank_E = np.arange(d.num_entries) - np.repeat(d.offsets_P1[:-1], d.num_entries_P)
    stays_E = entries.is_exact_E & (rank_E < k)
    values_E = np.where(stays_E, 0.0, np.exp(entries.logprobs_E))
    joins_tail_E = entries.is_exact_E & ~stays_E
    tail_P = d.tail_mass_P + sum_per_position(values_E[joins_tail_E], entries.positions_E[joins_tail_E], d.num_positions)
    # Not the entries' own sum: a mixture's is 1 in the mean alone, and dividing by it would bias.
    rest_P = tail_P if k > 0 else np.ones(d.num_positions)
    rest_E = rest_P[entries.positions_E]
    weights_E = np.divide(values_E * num_draws, rest_E, out=np.zeros(d.num_entries), where=rest_E > 0)
    counts_E = np.minimum(systematic_counts(weights_E, d.token_ids_E, d.offsets_P1, u_P), num_draws)
    with np.errstate(divide="ignore"):
        drawn_E = np.log(np.maximum(counts_E, 1) / num_draws) + np.log(rest_E)
    made = Entries(entries.positions_E, entries.token_ids_E, np.where(stays_E, entries.logprobs_E, drawn_E), stays_E)
    return rebuilt(d, made.taken(stays_E | (counts_E > 0)), tail_P, targets, has_estimates=True)
