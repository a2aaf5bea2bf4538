"""The definition of the ranking loss: position by position, in plain NumPy and float64. Slow."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.kernels.divergences.reference import soft_ranks

Floats = NDArray[np.floating[Any]]


def ranking_loss_and_gradient(
    logits_PV: Floats, entries: list[dict[int, float]], tail_mass_P: Floats, *, top: int, strength: float
) -> tuple[Floats, Floats]:
    """(P,) losses, and (P, V) gradients of their sum.

    At each position: the ids are the teacher's top united with the student's; a and b their soft ranks by the teacher's
    logprobs and by the student's logits, less their means; L = 1 - <a, b> / (|a| |b|). An id without an entry has half of the
    most that it can have, min(least entry, tail mass). L is 0 where a is 0, and 1 where b is; no gradient there.

    Args:
        logits_PV: the student's.
        entries: of each position, id -> the teacher's logprob, exact.
        tail_mass_P: mass of all other ids.
        top: ids of each side.
        strength: of the soft ranks.
    """
    losses_P, gradients_PV = np.zeros(len(logits_PV)), np.zeros(logits_PV.shape)
    for position, (z_V, own) in enumerate(zip(logits_PV.astype(np.float64), entries, strict=True)):
        first = sorted(own, key=lambda token_id: -own[token_id])[:top]
        union = sorted({*first, *np.argsort(-z_V, kind="stable")[:top].tolist()})
        with np.errstate(divide="ignore"):
            below = min(*own.values(), float(np.log(tail_mass_P[position]))) - np.log(2)
        log_p_K = np.array([own.get(token_id, below) for token_id in union])
        losses_P[position], gradients_PV[position, union] = _spearman(log_p_K, z_V[union], strength)
    return losses_P, gradients_PV


def _spearman(log_p_K: Floats, z_K: Floats, strength: float) -> tuple[float, Floats]:
    """The derivative of a soft rank by value / strength is 1 less the average over its pool."""
    a_K, (ranks_K, pool_K) = soft_ranks(log_p_K, strength)[0], soft_ranks(z_K, strength)
    a_K, b_K = a_K - a_K.mean(), ranks_K - ranks_K.mean()
    if not a_K.any() or not b_K.any():
        return float(a_K.any()), np.zeros(len(z_K))
    a_K, length = a_K / np.sqrt((a_K**2).sum()), np.sqrt((b_K**2).sum())
    rho = float((a_K * b_K).sum() / length)
    slope_K = (rho * b_K / length - a_K) / length
    averages_K = np.array([slope_K[pool_K == pool].mean() for pool in pool_K])
    return 1 - rho, (slope_K - averages_K) / strength
