"""h = dL / dlog Q of every divergence in torch, by the formulas of `kdcache.kernels.reference_divergences`.

Shape letters: P positions (rows), K entries per position (padded), B = K + 1 buckets: the entries, and the tail last.

`torch_divergences` has the values, from which autograd makes the same h. Closed forms because autograd cannot be asked within
an operator; they are also fewer launches on a device. As in the reference, multiples of Q may be left out of h.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdcache.kernels import divergences as d
from kdcache.loss import torch_divergences as values
from kdcache.loss.torch_divergences import Masses


def compute(divergence: d.Divergence, masses: Masses) -> Tensor:
    """(P, B) h."""
    slope = _SLOPES.get(type(divergence))
    return divergence.in_torch(masses)[1] if slope is None else slope(divergence, masses)


def forward_kl(_: d.Divergence, x: Masses) -> Tensor:
    return -x.p_PB


def reverse_kl(options: d.ReverseKL | d.JensenShannon | d.AdaptiveKL, x: Masses) -> Tensor:
    return _times(x.q_PB, x.log_q_PB - x.log_p_PB.clamp_min(math.log(options.floor)))


def jensen_shannon(options: d.JensenShannon, x: Masses) -> Tensor:
    if options.beta in (0, 1):
        return reverse_kl(options, x) if options.beta else forward_kl(options, x)
    return options.factor * _times(x.q_PB, x.log_q_PB - values.log_mix(options.beta, x)) / options.beta


def skew_kl(options: d.SkewKL, x: Masses) -> Tensor:
    log_m_PB = values.log_mix(options.skew, x) if options.skew > 0 else x.log_q_PB
    # Where both are beyond float64, as Q = M = 0, Q / M is 1 / (1 - skew).
    ratio_PB = torch.where(torch.isneginf(log_m_PB), 1 / (1 - options.skew), (x.log_q_PB - log_m_PB).exp())
    return -(1 - options.skew) * _times(x.p_PB, ratio_PB)


def skew_reverse_kl(options: d.SkewReverseKL, x: Masses) -> Tensor:
    gap_PB = x.log_q_PB - values.log_mix(1 - options.skew, x)
    return _times(x.q_PB, gap_PB - options.skew * gap_PB.exp())


def adaptive_kl(options: d.AdaptiveKL, x: Masses) -> Tensor:
    share_P1 = values.head_share(options, x)[:, None]
    return share_P1 * forward_kl(options, x) + (1 - share_P1) * reverse_kl(options, x)


def total_variation(_: d.Divergence, x: Masses) -> Tensor:
    gap_PB = x.q_PB - x.p_PB
    # torch.sign(NaN) is 0 on some devices.
    return x.q_PB * torch.where(gap_PB.isnan(), gap_PB, gap_PB.sign()) / 2


def hellinger(_: d.Divergence, x: Masses) -> Tensor:
    root_q_PB, root_p_PB = (x.log_q_PB / 2).exp(), (x.log_p_PB / 2).exp()
    return root_q_PB * (root_q_PB - root_p_PB) / 2


def alpha_beta(options: d.AlphaBeta, x: Masses) -> Tensor:
    a, b = options.a, options.b
    return (((a + b) * x.log_q_PB).exp() - (a * x.log_p_PB).exp() * (b * x.log_q_PB).exp()) / a


def decoupled_top_k(options: d.DecoupledTopK, x: Masses) -> Tensor:
    if x.p_PB.shape[1] == 1:
        return -x.p_PB
    t, m_P1 = options.inner_temperature, x.p_PB[:, :-1].sum(dim=1, keepdim=True)
    u_PK, w_PK = values.decoupled_logits(x, m_P1)
    inner_PK = t * ((w_PK / t).softmax(dim=1) - (u_PK / t).softmax(dim=1))
    return torch.cat([_times(m_P1, inner_PK - w_PK.softmax(dim=1)), -x.p_PB[:, -1:]], dim=1)


def tail_aware_kl(options: d.TailAwareKL, x: Masses) -> Tensor:
    parts = values.tail_parts(x)
    unreachable_P1 = torch.isneginf(parts.tail_lse_P)[:, None]
    share_PB = torch.where(parts.in_tail_PB, (x.log_q_PB - parts.tail_lse_P[:, None]).exp(), 0.0)
    # A tail that the student cannot give is, as in the forward KL, one bucket of mass 0.
    last_PB = torch.zeros_like(share_PB)
    last_PB[:, -1] = 1
    share_PB = torch.where(unreachable_P1, last_PB, share_PB)
    factor_P = options.tail_weight * parts.s_P - parts.r_P
    return factor_P[:, None] * share_PB - parts.head_p_PB - options.tail_weight * parts.estimates_PB


def centered_mse(_: d.Divergence, x: Masses) -> Tensor:
    gap_PK, count_P = values.centered_gap(x)
    return _with_tail(2 * gap_PK / count_P[:, None])


def hinge_ranking(options: d.HingeRanking, x: Masses) -> Tensor:
    return _over_pairs(lambda gap: torch.where(gap.isnan(), gap, -(gap < options.margin).to(gap.dtype)), x)


def logistic_ranking(_: d.Divergence, x: Masses) -> Tensor:
    return _over_pairs(lambda gap: -torch.sigmoid(-gap), x)


def soft_spearman(options: d.SoftSpearman, x: Masses) -> Tensor:
    compared_PK = (x.p_PB > 0)[:, :-1]
    if compared_PK.shape[1] == 0:
        return torch.zeros_like(x.p_PB)
    teacher_PK, ranks_PK, pool_PK = values.centered_ranks(options, x)
    ordered_P1, spread_P1 = ((ranks != 0).any(dim=1, keepdim=True) for ranks in (teacher_PK, ranks_PK))
    length_P1 = torch.where(spread_P1, ranks_PK.square().sum(dim=1, keepdim=True), 1.0).sqrt()
    teacher_PK = teacher_PK / torch.where(ordered_P1, teacher_PK.square().sum(dim=1, keepdim=True), 1.0).sqrt()
    correlation_P1 = (teacher_PK * ranks_PK).sum(dim=1, keepdim=True) / length_P1
    slope_PK = (correlation_P1 * ranks_PK / length_P1 - teacher_PK) / length_P1
    # The derivative of a soft rank by its value is 1 less its pool's average; a pool is the entries of one isotonic level.
    same_PKK = (pool_PK[:, :, None] == pool_PK[:, None, :]) & compared_PK[:, None, :]
    means_PK = (same_PKK * slope_PK[:, None, :]).sum(dim=2) / same_PKK.sum(dim=2).clamp_min(1)
    slope_PK = torch.where(compared_PK & spread_P1, slope_PK - means_PK, 0.0) / options.strength
    return _with_tail(torch.where(ordered_P1, slope_PK, ranks_PK * 0))


def _times(mass: Tensor, factor: Tensor) -> Tensor:
    """mass * factor; 0 where the mass is 0, also where the factor is infinite."""
    return torch.where(mass == 0, 0.0, mass * factor)


def _with_tail(h_PK: Tensor) -> Tensor:
    return torch.cat([h_PK, h_PK.new_zeros(len(h_PK), 1)], dim=1)


def _over_pairs(slope: Callable[[Tensor], Tensor], x: Masses) -> Tensor:
    better_PKK, gap_PKK = values.compared_pairs(x)
    slopes_PKK = torch.where(better_PKK, slope(gap_PKK), 0.0)
    count_P1 = better_PKK.sum(dim=(1, 2)).clamp_min(1)[:, None]
    return _with_tail((slopes_PKK.sum(dim=2) - slopes_PKK.sum(dim=1)) / count_P1)


_SLOPES: dict[type[d.Divergence], Callable[..., Tensor]] = {
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
