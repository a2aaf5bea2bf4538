"""Every divergence as a function of bucket masses in torch, differentiable as often as one likes.

Shape letters: P positions (rows), K entries per position (padded), B = K + 1 buckets: the entries, and the tail last. Formulas
and sources are those of `kdcache.kernels.reference_divergences`; only the values are here. Derivatives are autograd's, or those
of `torch_slopes`, which shares the parts without an underscore.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kdcache.kernels import divergences as d


@dataclass(frozen=True, slots=True, eq=False)
class Masses:
    """Both sides' buckets, (P, B), the tail last. Where both are 0, as at padding, both logs are 0: no NaN comes of it.

    `is_estimate_PB`: which entries are estimates; None where none is, and for divergences that do not ask.
    """

    log_p_PB: Tensor
    p_PB: Tensor
    log_q_PB: Tensor
    q_PB: Tensor
    is_estimate_PB: Tensor | None = None

    @classmethod
    def of(cls, log_p_PB: Tensor, log_q_PB: Tensor, is_estimate_PB: Tensor | None = None) -> Masses:
        """From logs in which a mass of 0 is -inf."""
        neither_PB = torch.isneginf(log_p_PB) & torch.isneginf(log_q_PB)
        log_p_PB, log_q_PB = (
            log_p_PB.masked_fill(neither_PB, 0.0),
            log_q_PB.masked_fill(neither_PB, 0.0),
        )
        p_PB, q_PB = (log.exp().masked_fill(neither_PB, 0.0) for log in (log_p_PB, log_q_PB))
        return cls(log_p_PB, p_PB, log_q_PB, q_PB, is_estimate_PB)


def compute(divergence: d.Divergence, masses: Masses) -> Tensor:
    """(P,) losses."""
    formula = _FORMULAS.get(type(divergence))
    return divergence.in_torch(masses)[0] if formula is None else formula(divergence, masses)


def forward_kl(_: d.Divergence, x: Masses) -> Tensor:
    return _times(x.p_PB, x.log_p_PB - x.log_q_PB).sum(dim=1)


def reverse_kl(options: d.ReverseKL | d.JensenShannon | d.AdaptiveKL, x: Masses) -> Tensor:
    return _times(x.q_PB, x.log_q_PB - x.log_p_PB.clamp_min(math.log(options.floor))).sum(dim=1)


def jensen_shannon(options: d.JensenShannon, x: Masses) -> Tensor:
    if options.beta in (0, 1):
        return reverse_kl(options, x) if options.beta else forward_kl(options, x)
    log_m_PB = log_mix(options.beta, x)
    forward_PB = _times(x.p_PB, x.log_p_PB - log_m_PB) / (1 - options.beta)
    return options.factor * (forward_PB + _times(x.q_PB, x.log_q_PB - log_m_PB) / options.beta).sum(dim=1)


def skew_kl(options: d.SkewKL, x: Masses) -> Tensor:
    log_m_PB = log_mix(options.skew, x) if options.skew > 0 else x.log_q_PB
    return _times(x.p_PB, x.log_p_PB - log_m_PB).sum(dim=1)


def skew_reverse_kl(options: d.SkewReverseKL, x: Masses) -> Tensor:
    return _times_q(x, x.log_q_PB - log_mix(1 - options.skew, x)).sum(dim=1)


def adaptive_kl(options: d.AdaptiveKL, x: Masses) -> Tensor:
    share_P = head_share(options, x)
    return share_P * forward_kl(options, x) + (1 - share_P) * reverse_kl(options, x)


def head_share(options: d.AdaptiveKL, x: Masses) -> Tensor:
    """(P,) the weight of the forward KL; a constant."""
    gap_PB = (x.p_PB - x.q_PB).detach().abs()
    order_PK = x.p_PB[:, :-1].argsort(dim=1, descending=True, stable=True)
    in_head_PK = x.p_PB.gather(1, order_PK).cumsum(dim=1) <= options.head_mass
    first_PK = torch.arange(order_PK.shape[1], device=gap_PB.device) == 0
    g_head_P = torch.where(in_head_PK | first_PK, gap_PB.gather(1, order_PK), 0.0).sum(dim=1)
    g_P = gap_PB.sum(dim=1)
    return torch.where(g_P == 0, 0.5, g_head_P / torch.where(g_P == 0, 1.0, g_P))


def total_variation(_: d.Divergence, x: Masses) -> Tensor:
    return (x.p_PB - x.q_PB).abs().sum(dim=1) / 2


def hellinger(_: d.Divergence, x: Masses) -> Tensor:
    return ((x.log_q_PB / 2).exp() - (x.log_p_PB / 2).exp()).square().sum(dim=1) / 2


def alpha_beta(options: d.AlphaBeta, x: Masses) -> Tensor:
    a, b = options.a, options.b
    both_PB = (a * ((a + b) * x.log_p_PB).exp() + b * ((a + b) * x.log_q_PB).exp()) / (a + b)
    return (both_PB - (a * x.log_p_PB).exp() * (b * x.log_q_PB).exp()).sum(dim=1) / (a * b)


def decoupled_top_k(options: d.DecoupledTopK, x: Masses) -> Tensor:
    if x.p_PB.shape[1] == 1:
        return forward_kl(options, x)
    t, m_P, r_P = options.inner_temperature, x.p_PB[:, :-1].sum(dim=1), x.p_PB[:, -1]
    u_PK, w_PK = decoupled_logits(x, m_P[:, None])
    inner = Masses.of((u_PK / t).log_softmax(dim=1), (w_PK / t).log_softmax(dim=1))
    inner_P = _times(inner.p_PB, inner.log_p_PB - inner.log_q_PB).sum(dim=1)
    outer_P = _times(m_P, m_P.masked_fill(m_P == 0, 1.0).log() - w_PK.logsumexp(dim=1))
    return outer_P + _times(r_P, x.log_p_PB[:, -1] - x.log_q_PB[:, -1]) + t * t * m_P * inner_P


def decoupled_logits(x: Masses, m_P1: Tensor) -> tuple[Tensor, Tensor]:
    """(P, K) log masses of both sides on the support, -inf for 0.

    Rows without mass on the support get entries of 0: their softmax exists, and is multiplied by m = 0.
    """
    stored_PK, empty_P1 = (x.p_PB > 0)[:, :-1], m_P1 == 0
    u_PK = x.log_p_PB[:, :-1].masked_fill(~stored_PK & ~empty_P1, -torch.inf).masked_fill(empty_P1, 0.0)
    w_PK = x.log_q_PB[:, :-1].masked_fill((x.q_PB == 0)[:, :-1] & ~stored_PK & ~empty_P1, -torch.inf)
    return u_PK, w_PK.masked_fill(empty_P1, 0.0)


def tail_aware_kl(options: d.TailAwareKL, x: Masses) -> Tensor:
    parts = tail_parts(x)
    head_P = _times(parts.head_p_PB, x.log_p_PB - x.log_q_PB).sum(dim=1)
    outer_P = _times(parts.r_P, x.log_p_PB[:, -1] - parts.tail_lse_P)
    log_within_PB = torch.where(torch.isneginf(x.log_q_PB), -torch.inf, x.log_q_PB - parts.tail_lse_P[:, None])
    within_PB = _times(parts.estimates_PB, x.log_p_PB - log_within_PB)
    log_s_P = parts.estimates_PB.sum(dim=1).masked_fill(parts.s_P == 0, 1.0).log()
    return head_P + outer_P + options.tail_weight * (within_PB.sum(dim=1) - parts.s_P * log_s_P)


@dataclass(frozen=True, slots=True, eq=False)
class TailParts:
    """The teacher's head and estimates, 0 elsewhere, r and the estimates' sum s; log of the student's whole tail."""

    head_p_PB: Tensor
    estimates_PB: Tensor
    r_P: Tensor
    s_P: Tensor
    in_tail_PB: Tensor
    tail_lse_P: Tensor


def tail_parts(x: Masses) -> TailParts:
    """What `tail_aware_kl` and its slope are made of."""
    is_last_PB = torch.zeros_like(x.p_PB, dtype=torch.bool)
    is_last_PB[:, -1] = True
    is_estimate_PB = torch.zeros_like(is_last_PB) if x.is_estimate_PB is None else x.is_estimate_PB & ~is_last_PB
    absent_PB = (x.p_PB == 0) & (x.log_p_PB == 0)
    in_tail_PB = (is_estimate_PB | is_last_PB) & ~absent_PB
    tail_PB = x.log_q_PB.masked_fill(~in_tail_PB, -torch.inf)
    unreachable_P = torch.isneginf(tail_PB.detach().amax(dim=1))
    # The derivative of logsumexp is NaN where everything is -inf.
    lse_P = tail_PB.masked_fill(unreachable_P[:, None], 0.0).logsumexp(dim=1).masked_fill(unreachable_P, -torch.inf)
    estimates_PB = x.p_PB.masked_fill(~is_estimate_PB, 0.0)
    head_p_PB = x.p_PB.masked_fill(is_estimate_PB | is_last_PB, 0.0)
    return TailParts(head_p_PB, estimates_PB, x.p_PB[:, -1], estimates_PB.sum(dim=1), in_tail_PB, lse_P)


def centered_mse(_: d.Divergence, x: Masses) -> Tensor:
    gap_PK, count_P = centered_gap(x)
    return gap_PK.square().sum(dim=1) / count_P


def centered_gap(x: Masses) -> tuple[Tensor, Tensor]:
    """(P, K) log Q - log P about its mean over the compared entries, 0 at others; (P,) how many there are, at least 1."""
    compared_PK = (x.p_PB > 0)[:, :-1]
    count_P = compared_PK.sum(dim=1).clamp_min(1)
    gap_PK = torch.where(compared_PK, (x.log_q_PB - x.log_p_PB)[:, :-1], 0.0)
    return torch.where(compared_PK, gap_PK - (gap_PK.sum(dim=1) / count_P)[:, None], 0.0), count_P


def hinge_ranking(options: d.HingeRanking, x: Masses) -> Tensor:
    return _over_pairs(lambda gap: (options.margin - gap).relu(), x)


def logistic_ranking(_: d.Divergence, x: Masses) -> Tensor:
    return _over_pairs(lambda gap: -logsigmoid(gap), x)


def soft_spearman(options: d.SoftSpearman, x: Masses) -> Tensor:
    teacher_PK, student_PK, _ = centered_ranks(options, x)
    ordered_P, spread_P = (teacher_PK != 0).any(dim=1), (student_PK != 0).any(dim=1)
    squares_P = torch.where(spread_P, student_PK.square().sum(dim=1), 1.0) * teacher_PK.square().sum(dim=1)
    correlation_P = (teacher_PK * student_PK).sum(dim=1) * torch.where(ordered_P, squares_P, 1.0).rsqrt()
    return torch.where(
        ordered_P,
        1 - torch.where(spread_P, correlation_P, 0.0),
        student_PK.sum(dim=1) * 0,
    )


def centered_ranks(options: d.SoftSpearman, x: Masses) -> tuple[Tensor, Tensor, Tensor]:
    """(P, K) the teacher's and the student's soft ranks about their means, 0 where not compared, and the levels of the
    student's pools."""
    compared_PK = (x.p_PB > 0)[:, :-1]
    count_P1 = compared_PK.sum(dim=1, keepdim=True).clamp_min(1)

    def ranks_and_levels(values_PK: Tensor) -> tuple[Tensor, Tensor]:
        ranks_PK, levels_PK = soft_ranks(values_PK / options.strength, compared_PK)
        ranks_PK = torch.where(compared_PK, ranks_PK, 0.0)
        return torch.where(compared_PK, ranks_PK - ranks_PK.sum(dim=1, keepdim=True) / count_P1, 0.0), levels_PK

    return ranks_and_levels(x.log_p_PB[:, :-1])[0], *ranks_and_levels(x.log_q_PB[:, :-1])


def soft_ranks(values_PK: Tensor, compared_PK: Tensor) -> tuple[Tensor, Tensor]:
    """Soft ranks of the compared entries among themselves, strength 1, and the level of each one's pool; others mean nothing.

    The isotonic regression by the min-max formula v_i = min over j <= i of max over k >= i of mean(y_j..y_k): (P, K, K)
    instead of a loop over pools.
    """
    num_entries = values_PK.shape[1]
    if num_entries == 0:
        return values_PK, values_PK
    order_PK = values_PK.masked_fill(~compared_PK, -torch.inf).argsort(dim=1, descending=True, stable=True)
    valid_PK = compared_PK.gather(1, order_PK)
    sorted_PK = torch.where(valid_PK, values_PK.gather(1, order_PK), 0.0)
    place_K = torch.arange(num_entries, device=values_PK.device)
    y_PK = torch.where(valid_PK, sorted_PK - (valid_PK.sum(dim=1, keepdim=True) - place_K), 0.0)
    sums_PK = y_PK.cumsum(dim=1)
    lengths_KK = place_K[None, :] - place_K[:, None] + 1
    means_PKK = (sums_PK[:, None, :] - (sums_PK - y_PK)[:, :, None]) / lengths_KK.clamp_min(1)
    usable_PKK = (lengths_KK > 0) & valid_PK[:, None, :] & valid_PK[:, :, None]
    highest_PKK = means_PKK.masked_fill(~usable_PKK, -torch.inf).flip(2).cummax(dim=2).values.flip(2)
    isotonic_PK = torch.where(valid_PK, highest_PKK.masked_fill(~usable_PKK, torch.inf).amin(dim=1), 0.0)
    ranks_PK = torch.where(valid_PK, sorted_PK - isotonic_PK, 0.0)
    zeros_PK = torch.zeros_like(values_PK)
    return zeros_PK.scatter(1, order_PK, ranks_PK), zeros_PK.scatter(1, order_PK, isotonic_PK)


def _times(mass: Tensor, factor: Tensor) -> Tensor:
    """mass * factor; 0 where the mass is 0. The factor is taken out before the product: else its gradient would be NaN."""
    return mass * factor.masked_fill(mass == 0, 0.0)


def _times_q(x: Masses, factor: Tensor) -> Tensor:
    """Q * factor, less a term whose sum over a row has no derivative: it is Q - 1, and leaves h without its multiple of Q."""
    return _times(x.q_PB, factor) - (x.q_PB - x.q_PB.detach())


def log_mix(share: float, x: Masses) -> Tensor:
    """log(share P + (1 - share) Q)."""
    return torch.logaddexp(x.log_p_PB + math.log(share), x.log_q_PB + math.log1p(-share))


def compared_pairs(x: Masses) -> tuple[Tensor, Tensor]:
    """(P, K, K) whether i is to be ranked above j, and log Q_i - log Q_j there, 0 elsewhere."""
    u_PK, w_PK = x.log_p_PB[:, :-1], x.log_q_PB[:, :-1]
    compared_PK = (x.p_PB > 0)[:, :-1]
    better_PKK = (u_PK[:, :, None] > u_PK[:, None, :]) & compared_PK[:, :, None] & compared_PK[:, None, :]
    return better_PKK, torch.where(better_PKK, w_PK[:, :, None] - w_PK[:, None, :], 0.0)


def _over_pairs(pair: Callable[[Tensor], Tensor], x: Masses) -> Tensor:
    better_PKK, gap_PKK = compared_pairs(x)
    total_P = torch.where(better_PKK, pair(gap_PKK), 0.0).sum(dim=(1, 2))
    return total_P / better_PKK.sum(dim=(1, 2)).clamp_min(1)


_FORMULAS: dict[type[d.Divergence], Callable[..., Tensor]] = {
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
    d.TailAwareKL: tail_aware_kl,
    d.CenteredMSE: centered_mse,
    d.HingeRanking: hinge_ranking,
    d.LogisticRanking: logistic_ranking,
    d.SoftSpearman: soft_spearman,
}
