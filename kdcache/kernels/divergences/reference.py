"""Every divergence as a function of bucket masses, with its derivative: plain NumPy, the formulas and where they are from.

A function gets log P (teacher) and log Q (student) of every bucket and gives L, (P,), and h = dL / dlog Q, (P, K+1); how these
two become the gradient with respect to the logits is in `kdcache.kernels.reference`. Because the Q of a position add up to 1,
c Q_b may be added to every h_b of a position without changing that gradient; where it makes h small near Q = P, this is done
and noted.

A bucket that does not exist (padding; the tail of a support that is the whole vocabulary) has log P = log Q = -inf and adds
nothing. 0 log 0 = 0. NaN in log Q comes out as NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.kernels import divergences as d

Floats = NDArray[np.floating[Any]]
Terms = tuple[Floats, Floats]
"""(P,) losses in nats (or as the docstring says), and (P, K+1) h."""


def compute(
    divergence: d.Divergence,
    log_p_PK1: Floats,
    log_q_PK1: Floats,
    estimates_PK1: NDArray[np.bool_] | None = None,
    targets_PK1: NDArray[np.bool_] | None = None,
) -> Terms:
    """L and h of a divergence, in the dtype of the masses.

    An option that is (P,) means: each position by itself, with its own number.

    Args:
        divergence: which.
        log_p_PK1: the teacher's.
        log_q_PK1: the student's.
        estimates_PK1: which entries are estimates, None for none.
        targets_PK1: which bucket holds the target id, None for none.
    """
    if divergence.arrays:
        return _position_by_position(divergence, log_p_PK1, log_q_PK1, (estimates_PK1, targets_PK1))
    if isinstance(divergence, d.TailAwareKL):
        estimates_PK1 = np.zeros(log_p_PK1.shape, bool) if estimates_PK1 is None else estimates_PK1
        return tail_aware_kl(divergence, log_p_PK1, log_q_PK1, estimates_PK1)
    if isinstance(divergence, (d.SelfEvolution, d.HardShare)):
        targets_PK1 = np.zeros(log_p_PK1.shape, bool) if targets_PK1 is None else targets_PK1
        if isinstance(divergence, d.HardShare):
            return hard_share(divergence, log_p_PK1, log_q_PK1, targets_PK1)
        return self_evolution(divergence, log_p_PK1, log_q_PK1, targets_PK1)
    formula = _FORMULAS.get(type(divergence), type(divergence).in_numpy)
    return formula(divergence, log_p_PK1, log_q_PK1)


def _position_by_position(
    divergence: d.Divergence, log_p_PK1: Floats, log_q_PK1: Floats, flags: tuple[NDArray[np.bool_] | None, ...]
) -> Terms:
    losses_P, h_PK1 = np.zeros(len(log_p_PK1), log_p_PK1.dtype), np.zeros_like(log_p_PK1)
    for i in range(len(log_p_PK1)):
        here, one = divergence.map(lambda option_P, i=i: float(option_P[i])), slice(i, i + 1)
        own = [None if flag_PK1 is None else flag_PK1[one] for flag_PK1 in flags]
        losses_P[one], h_PK1[one] = compute(here, log_p_PK1[one], log_q_PK1[one], *own)
    return losses_P, h_PK1


def forward_kl(_: d.Divergence, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """L = sum P log(P / Q); h = -P. Hinton et al., arXiv 1503.02531."""
    p_PK1 = np.exp(log_p_PK1)
    return _times(p_PK1, log_p_PK1 - log_q_PK1).sum(axis=1), -p_PK1


def reverse_kl(options: d.ReverseKL | d.JensenShannon | d.AdaptiveKL, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """L = sum Q log(Q / P) with P at least the floor; h = Q log(Q / P), which is Q (log(Q / P) + 1) less Q."""
    h_PK1 = _times(np.exp(log_q_PK1), log_q_PK1 - np.maximum(log_p_PK1, np.log(options.floor)))
    return h_PK1.sum(axis=1), h_PK1


def jensen_shannon(options: d.JensenShannon, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """With M = b P + (1 - b) Q: L = KL(P || M) / (1 - b) + KL(Q || M) / b; h = Q log(Q / M) / b, less a multiple of Q.

    The generalised JSD of GKD (arXiv 2306.13649), b KL(P || M) + (1 - b) KL(Q || M), vanishes towards b = 0 and 1. Over
    b (1 - b) it becomes the forward KL at 0 and the reverse KL at 1, which are computed as such there. With `gkd_scale` it is
    GKD's own.
    """
    if options.beta == 0:
        return forward_kl(options, log_p_PK1, log_q_PK1)
    if options.beta == 1:
        return reverse_kl(options, log_p_PK1, log_q_PK1)
    log_m_PK1 = _log_mix(options.beta, log_p_PK1, log_q_PK1)
    h_PK1 = options.factor * _times(np.exp(log_q_PK1), log_q_PK1 - log_m_PK1) / options.beta
    losses_PK1 = options.factor * _times(np.exp(log_p_PK1), log_p_PK1 - log_m_PK1) / (1 - options.beta) + h_PK1
    return losses_PK1.sum(axis=1), h_PK1


def skew_kl(options: d.SkewKL, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """With M = s P + (1 - s) Q: L = sum P log(P / M); h = -(1 - s) P Q / M. DistiLLM, arXiv 2402.03898, section 3.1."""
    log_m_PK1 = _log_mix(options.skew, log_p_PK1, log_q_PK1)
    p_PK1 = np.exp(log_p_PK1)
    h_PK1 = -(1 - options.skew) * _times(p_PK1, np.exp(log_q_PK1 - log_m_PK1))
    return _times(p_PK1, log_p_PK1 - log_m_PK1).sum(axis=1), h_PK1


def skew_reverse_kl(options: d.SkewReverseKL, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """With M = (1 - s) P + s Q: L = sum Q log(Q / M); h = Q (log(Q / M) - s Q / M), less Q. As `skew_kl`."""
    log_m_PK1 = _log_mix(1 - options.skew, log_p_PK1, log_q_PK1)
    q_PK1 = np.exp(log_q_PK1)
    losses_PK1 = _times(q_PK1, log_q_PK1 - log_m_PK1)
    return losses_PK1.sum(axis=1), losses_PK1 - options.skew * _times(q_PK1, np.exp(log_q_PK1 - log_m_PK1))


def self_evolution(options: d.SelfEvolution, log_p_PK1: Floats, log_q_PK1: Floats, targets_PK1: NDArray[np.bool_]) -> Terms:
    """With G = l P + (1 - l) E, E the target id's bucket, M = (1 - mu) Q + mu G: L = sum P log(P / M); h = -(1 - mu) P Q / M.

    mu = max_share d / (d + softness) where d = KL(G || Q) > threshold and there is a target id, else 0; constant. Our
    reconstruction of Self-Evolution KD, arXiv 2412.15303, whose equations could not be read.
    """
    log_g_PK1, gap_P = _guide(options, log_p_PK1, log_q_PK1, targets_PK1)
    is_hard_P1 = (targets_PK1.any(axis=1) & (gap_P > options.threshold))[:, None]
    # 1 - s / (d + s): 1 at an infinite gap.
    mu_P1 = np.where(is_hard_P1, options.max_share * (1 - options.softness / (gap_P[:, None] + options.softness)), 0)
    mu_P1, p_PK1 = mu_P1.astype(log_p_PK1.dtype), np.exp(log_p_PK1)
    mixed_PK1 = np.logaddexp(log_q_PK1 + np.log1p(-mu_P1), log_g_PK1 + np.log(mu_P1))
    log_m_PK1 = np.where(mu_P1 > 0, mixed_PK1, log_q_PK1)
    h_PK1 = -(1 - mu_P1) * _times(p_PK1, np.where(mu_P1 > 0, np.exp(log_q_PK1 - log_m_PK1), 1))
    return _times(p_PK1, log_p_PK1 - log_m_PK1).sum(axis=1), h_PK1


def hard_share(options: d.HardShare, log_p_PK1: Floats, log_q_PK1: Floats, targets_PK1: NDArray[np.bool_]) -> Terms:
    """1 where `self_evolution` with the same options has d above its threshold and a target id, else 0; h = 0."""
    _, gap_P = _guide(options, log_p_PK1, log_q_PK1, targets_PK1)
    is_hard_P = (targets_PK1.any(axis=1) & (gap_P > options.threshold)).astype(log_p_PK1.dtype)
    return is_hard_P, np.zeros_like(log_p_PK1)


def _guide(
    options: d.SelfEvolution | d.HardShare, log_p_PK1: Floats, log_q_PK1: Floats, targets_PK1: NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    """log G of `self_evolution`, and (P,) KL(G || Q)."""
    log_g_PK1 = np.log(options.lam * np.exp(log_p_PK1) + (1 - options.lam) * targets_PK1)
    return log_g_PK1, _times(np.exp(log_g_PK1), log_g_PK1 - log_q_PK1).sum(axis=1)


def adaptive_kl(options: d.AdaptiveKL, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """L = (g_head FKL + g_rest RKL) / (g_head + g_rest), g = sum |P - Q| over a part; no derivative goes through g.

    The head: by falling P, the entries up to a running sum of `head_mass`, and always the first; never the tail bucket. arXiv
    2404.02657, section 5, and its code. Half each where teacher and student are equal.
    """
    gap_PK1 = np.abs(np.exp(log_p_PK1) - np.exp(log_q_PK1))
    head_PK1 = _head(np.exp(log_p_PK1[:, :-1]), options.head_mass)
    g_head_P, g_P = np.where(head_PK1, gap_PK1, 0).sum(axis=1), gap_PK1.sum(axis=1)
    share_P = np.where(g_P == 0, 0.5, g_head_P / np.where(g_P == 0, 1, g_P)).astype(gap_PK1.dtype)
    forward_P, forward_PK1 = forward_kl(options, log_p_PK1, log_q_PK1)
    reverse_P, reverse_PK1 = reverse_kl(options, log_p_PK1, log_q_PK1)
    h_PK1 = share_P[:, None] * forward_PK1 + (1 - share_P)[:, None] * reverse_PK1
    return share_P * forward_P + (1 - share_P) * reverse_P, h_PK1


def total_variation(_: d.Divergence, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """L = 1/2 sum |P - Q|; h = Q sign(Q - P) / 2. Not in nats."""
    q_PK1 = np.exp(log_q_PK1)
    gap_PK1 = q_PK1 - np.exp(log_p_PK1)
    return np.abs(gap_PK1).sum(axis=1) / 2, q_PK1 * np.sign(gap_PK1) / 2


def hellinger(_: d.Divergence, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """L = 1/2 sum (sqrt P - sqrt Q)^2; h = sqrt Q (sqrt Q - sqrt P) / 2. Not in nats."""
    root_q_PK1 = np.exp(log_q_PK1 / 2)
    gap_PK1 = root_q_PK1 - np.exp(log_p_PK1 / 2)
    return (gap_PK1**2).sum(axis=1) / 2, root_q_PK1 * gap_PK1 / 2


def alpha_beta(options: d.AlphaBeta, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """L = -1/(a b) sum (P^a Q^b - a/(a+b) P^(a+b) - b/(a+b) Q^(a+b)); h = Q^b (Q^a - P^a) / a. Not in nats.

    Cichocki et al. 2011; ABKD, arXiv 2505.04560, definition 3.1.
    """
    a, b = options.a, options.b
    p_a_PK1, q_b_PK1 = np.exp(a * log_p_PK1), np.exp(b * log_q_PK1)
    p_ab_PK1, q_ab_PK1 = np.exp((a + b) * log_p_PK1), np.exp((a + b) * log_q_PK1)
    losses_PK1 = (a * p_ab_PK1 + b * q_ab_PK1) / (a + b) - p_a_PK1 * q_b_PK1
    return losses_PK1.sum(axis=1) / (a * b), (q_ab_PK1 - p_a_PK1 * q_b_PK1) / a


def decoupled_top_k(options: d.DecoupledTopK, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """L = KL(Bernoulli(m) || Bernoulli(Q_S)) + m T^2 KL(p_T || q_T), where m and Q_S are the masses of the support S, and
    p_T = softmax(log P / T), q_T = softmax(log Q / T) over S.

    h = -m Q_b / Q_S + m T (q_T - p_T) on S, -r for the tail. LFM2 technical report, arXiv 2511.23404, section 3, which states
    the temperature for the second term only; its square is here as for every temperature.
    """
    temperature = options.inner_temperature
    u_PK, w_PK = log_p_PK1[:, :-1], log_q_PK1[:, :-1]
    m_P, r_P = np.exp(u_PK).sum(axis=1), np.exp(log_p_PK1[:, -1])
    inside_PK = w_PK - logsumexp(w_PK)[:, None]
    log_p_T_PK = u_PK / temperature - logsumexp(u_PK / temperature)[:, None]
    log_q_T_PK = w_PK / temperature - logsumexp(w_PK / temperature)[:, None]
    p_T_PK = np.where(m_P[:, None] > 0, np.exp(log_p_T_PK), 0)
    inner_P = _times(p_T_PK, log_p_T_PK - log_q_T_PK).sum(axis=1)
    losses_P = _times(m_P, np.log(m_P) - logsumexp(w_PK)) + _times(r_P, log_p_PK1[:, -1] - log_q_PK1[:, -1])
    h_PK = _times(m_P[:, None], temperature * (np.exp(log_q_T_PK) - p_T_PK) - np.exp(inside_PK))
    return losses_P + m_P * temperature**2 * inner_P, np.concatenate([h_PK, -r_P[:, None]], axis=1)


def tail_aware_kl(options: d.TailAwareKL, log_p_PK1: Floats, log_q_PK1: Floats, estimates_PK1: NDArray[np.bool_]) -> Terms:
    """L = KL of the head's entries and one tail bucket + w r KL(p within the tail || q within the tail).

    Exact entries are the head; the tail is all else, its student mass Q_T includes the estimates' ids, and r is its exact mass.
    With the whole tail at hand the second term is sum over the tail of p_j log(p_j / r) - p_j log(q_j / Q_T), which for given r
    and head depends on the student only through sum p_j log(q_j / Q_T): linear in the p_j. Estimates t_j with E[t_j] = p_j put
    instead therefore give its derivative by every logit, w (s q_j / Q_T - t_j) with s = sum t, the right expectation,
    E[s] = r. Its value here is w (sum t_j log(t_j / s) - t_j log(q_j / Q_T)) >= 0: the first part is not linear in the p_j, and
    the value so too high by a number that the student does not change. h = -p_j on the head; (w s - r) q_j / Q_T - w t_j for
    estimates; (w s - r) times its share of Q_T for the rest of the tail.

    Tail-aware KD, arXiv 2602.20816, from a dense teacher; there w is 2 over the mean of r in the sequence. From samples by the
    argument above.
    """
    w, p_PK1 = log_p_PK1.dtype.type(options.tail_weight), np.exp(log_p_PK1)
    in_tail_PK1 = estimates_PK1.copy()
    in_tail_PK1[:, -1] = True
    head_PK1, t_PK1 = np.where(in_tail_PK1, 0, p_PK1), np.where(estimates_PK1, p_PK1, 0)
    r_P1, s_P1 = p_PK1[:, -1:], t_PK1.sum(axis=1, keepdims=True)
    log_tail_P1 = logsumexp(np.where(in_tail_PK1, log_q_PK1, -np.inf))[:, None]
    losses_P = _times(head_PK1, log_p_PK1 - log_q_PK1).sum(axis=1) + _times(r_P1, log_p_PK1[:, -1:] - log_tail_P1)[:, 0]
    log_within_PK1 = np.where(np.isneginf(log_q_PK1), -np.inf, log_q_PK1 - log_tail_P1)
    within_P = _times(t_PK1, log_p_PK1 - log_within_PK1).sum(axis=1) - _times(s_P1, np.log(s_P1))[:, 0]
    share_PK1 = np.where(in_tail_PK1, np.exp(log_q_PK1 - log_tail_P1), 0)
    # A tail that the student cannot give is, as in the forward KL, one bucket of mass 0.
    share_PK1 = np.where(np.isneginf(log_tail_P1), np.arange(share_PK1.shape[1]) == share_PK1.shape[1] - 1, share_PK1)
    h_PK1 = (w * s_P1 - r_P1) * share_PK1 - head_PK1 - w * t_PK1
    return losses_P + np.where(s_P1[:, 0] == 0, 0, w * within_P), h_PK1


def centered_mse(_: d.Divergence, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """L = mean over S of (dz - mean dz)^2, dz = log Q - log P; h = 2 (dz - mean dz) / |S|. Squared nats.

    Normalisers cancel in the centring, so these are logits. Entries of P = 0 are left out. Without the centring, the
    limit of KD at high temperature, arXiv 1503.02531, section 2.1.
    """
    compared_PK1, gap_PK1 = _support_gap(log_p_PK1, log_q_PK1)
    count_P1 = np.maximum(compared_PK1.sum(axis=1, keepdims=True), 1)
    gap_PK1 = np.where(compared_PK1, gap_PK1 - gap_PK1.sum(axis=1, keepdims=True) / count_P1, 0)
    return (gap_PK1**2).sum(axis=1) / count_P1[:, 0], 2 * gap_PK1 / count_P1


def hinge_ranking(options: d.HingeRanking, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """Mean over the pairs of S with P_i > P_j of max(0, margin - (z_i - z_j)). Pairs with a P of 0 are left out."""

    def pair(gap: Floats) -> tuple[Floats, Floats]:
        return np.maximum(options.margin - gap, 0), np.where(np.isnan(gap), gap, np.where(gap < options.margin, -1, 0))

    return _over_pairs(pair, log_p_PK1, log_q_PK1)


def logistic_ranking(_: d.Divergence, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """Mean over the pairs of S with P_i > P_j of log(1 + exp(-(z_i - z_j))). Burges et al. 2005, RankNet."""

    def pair(gap: Floats) -> tuple[Floats, Floats]:
        return np.logaddexp(0, -gap), -np.exp(-np.logaddexp(0, gap))

    return _over_pairs(pair, log_p_PK1, log_q_PK1)


def soft_spearman(options: d.SoftSpearman, log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """1 - the correlation of `soft_ranks` of log P and log Q over S. RLKD, arXiv 2409.12545, over S instead of a union of tops.

    0 where fewer than two entries or equal ones leave the teacher without an order; 1, without gradient, where the
    student's entries are all equal.
    """
    losses_P, h_PK1 = np.zeros(len(log_p_PK1), log_p_PK1.dtype), np.zeros_like(log_p_PK1)
    for position in range(len(log_p_PK1)):
        inside = np.flatnonzero(np.isfinite(log_p_PK1[position, :-1]))
        if len(inside) > 1:
            strength = options.strength
            losses_P[position], h_PK1[position, inside] = _spearman(
                log_p_PK1[position, inside], log_q_PK1[position, inside], strength
            )
    return losses_P, h_PK1


def _spearman(log_p_K: Floats, log_q_K: Floats, strength: float) -> tuple[Any, Floats]:
    teacher_K, ranks_K, block_K = soft_ranks(log_p_K, strength)[0], *soft_ranks(log_q_K, strength)
    teacher_K, ranks_K = teacher_K - teacher_K.mean(), ranks_K - ranks_K.mean()
    if not teacher_K.any():
        return ranks_K.sum() * 0, ranks_K * 0
    if not ranks_K.any():
        return 1, ranks_K
    length = np.sqrt((ranks_K**2).sum())
    teacher_K = teacher_K / np.sqrt((teacher_K**2).sum())
    correlation = (teacher_K * ranks_K).sum() / length
    upstream_K = (correlation * ranks_K / length - teacher_K) / length
    means_K = np.array([upstream_K[block_K == block].mean() for block in block_K])
    return 1 - correlation, (upstream_K - means_K) / strength


def soft_ranks(values_K: Floats, strength: float) -> tuple[Floats, NDArray[np.int64]]:
    """Ranks from 1 (smallest) to K, softened: the projection of values / strength onto the permutahedron of (1, ..., K).

    Blondel et al. 2020, "Fast differentiable sorting and ranking": with s the sorted values and w = (K, ..., 1), s - v, where
    v is the isotonic (falling) regression of s - w by pooling adjacent violators.

    Returns:
        (K,) ranks, and (K,) the pool of each: the derivative by values / strength is 1 less the pool's average.
    """
    order = np.argsort(-values_K, kind="stable")
    y_K = (values_K / strength)[order] - np.arange(len(values_K), 0, -1, dtype=values_K.dtype)
    pools: list[list[int]] = []
    for rank in range(len(y_K)):
        pools.append([rank])
        while len(pools) > 1 and y_K[pools[-2]].mean() <= y_K[pools[-1]].mean():
            pools[-2:] = [pools[-2] + pools[-1]]
    ranks_K, pool_K = np.empty_like(values_K), np.empty(len(values_K), np.int64)
    for pool, ranks in enumerate(pools):
        ranks_K[order[ranks]] = (values_K / strength)[order[ranks]] - y_K[ranks].mean()
        pool_K[order[ranks]] = pool
    return ranks_K, pool_K


def logsumexp(values_PK: Floats) -> Floats:
    """log(sum(exp(x))) of each position; -inf for a position without finite numbers or without columns."""
    top_P = values_PK.max(axis=1, initial=-np.inf)
    shift_P = np.where(np.isneginf(top_P), 0, top_P)
    return np.log(np.exp(values_PK - shift_P[:, None]).sum(axis=1)) + shift_P


def _times(mass: Floats, factor: Floats) -> Floats:
    """mass * factor; 0 where the mass is 0, also where the factor is infinite."""
    return np.where(mass == 0, 0, mass * factor)


def _log_mix(share: float, log_p_PK1: Floats, log_q_PK1: Floats) -> Floats:
    """log(share * P + (1 - share) * Q)."""
    with_share_PK1 = log_p_PK1 + np.log(share).astype(log_p_PK1.dtype) if share > 0 else np.full_like(log_p_PK1, -np.inf)
    return np.logaddexp(with_share_PK1, log_q_PK1 + np.log1p(-share).astype(log_p_PK1.dtype))


def _head(p_PK: Floats, head_mass: float) -> NDArray[np.bool_]:
    """(P, K+1): see `adaptive_kl`."""
    order_PK = np.argsort(-p_PK, axis=1, kind="stable")
    sorted_PK = np.take_along_axis(p_PK, order_PK, axis=1)
    in_head_PK = sorted_PK.cumsum(axis=1) <= head_mass
    in_head_PK[:, :1] = True
    head_PK1 = np.zeros((len(p_PK), p_PK.shape[1] + 1), bool)
    np.put_along_axis(head_PK1, order_PK, in_head_PK, axis=1)
    return head_PK1


def _support_gap(log_p_PK1: Floats, log_q_PK1: Floats) -> tuple[NDArray[np.bool_], Floats]:
    """(P, K+1) which entries have a logit on both sides, and log Q - log P, 0 for the others and the tail."""
    compared_PK1 = log_p_PK1 > -np.inf
    compared_PK1[:, -1] = False
    return compared_PK1, np.where(compared_PK1, log_q_PK1 - np.where(compared_PK1, log_p_PK1, 0), 0)


def _over_pairs(pair: Callable[[Floats], tuple[Floats, Floats]], log_p_PK1: Floats, log_q_PK1: Floats) -> Terms:
    """The mean of pair(z_i - z_j) over pairs with P_i > P_j > 0, and its derivative; pair gives value and derivative."""
    u_PK = np.where(np.isneginf(log_p_PK1[:, :-1]), np.nan, log_p_PK1[:, :-1])
    better_PKK = u_PK[:, :, None] > u_PK[:, None, :]
    values_PKK, slopes_PKK = pair(log_q_PK1[:, :-1, None] - log_q_PK1[:, None, :-1])
    count_P = np.maximum(better_PKK.sum(axis=(1, 2)), 1)
    losses_P = np.where(better_PKK, values_PKK, 0).sum(axis=(1, 2)) / count_P
    slopes_PKK = np.where(better_PKK, slopes_PKK, 0)
    h_PK1 = np.zeros_like(log_p_PK1)
    h_PK1[:, :-1] = (slopes_PKK.sum(axis=2) - slopes_PKK.sum(axis=1)) / count_P[:, None]
    return losses_P, h_PK1


_FORMULAS: dict[type[d.Divergence], Callable[..., Terms]] = {
    d.ForwardKL: forward_kl,
    d.ReverseKL: reverse_kl,
    d.JensenShannon: jensen_shannon,
    d.SkewKL: skew_kl,
    d.SkewReverseKL: skew_reverse_kl,
    d.AdaptiveKL: adaptive_kl,
    d.TotalVariation: total_variation,
    d.Hellinger: hellinger,
    d.AlphaBeta: alpha_beta,
    d.DecoupledTopK: decoupled_top_k,
    d.CenteredMSE: centered_mse,
    d.HingeRanking: hinge_ranking,
    d.LogisticRanking: logistic_ranking,
    d.SoftSpearman: soft_spearman,
}
