"""Every divergence as a function of bucket masses in torch: its value, and its slope h = dL / dlog Q in closed form.

Formulas and sources are those of `kdcache.kernels.divergences.reference`; K + 1 = B buckets, the tail last. Values can be
differentiated as often as one likes, and a test compares autograd's h with the slopes. Slopes are for use inside an operator,
where autograd cannot be asked, and are fewer launches on a device. As in the reference, multiples of Q may be left out of h.
Those that compare logits on the support are in `_torch_support`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdcache.kernels import divergences as d
from kdcache.kernels.divergences import _torch_support as support

soft_ranks = support.soft_ranks


@dataclass(frozen=True, slots=True, eq=False)
class Masses:
    """Both sides' buckets, (P, K+1), the tail last. Where both are 0, as at padding, both logs are 0: no NaN comes of it.

    `is_estimate_PK1`: which entries are estimates; `is_target_PK1`: which bucket holds the target id. None where none is, and
    for divergences that do not ask.
    """

    log_p_PK1: Tensor
    p_PK1: Tensor
    log_q_PK1: Tensor
    q_PK1: Tensor
    is_estimate_PK1: Tensor | None = None
    is_target_PK1: Tensor | None = None

    @classmethod
    def of(
        cls,
        log_p_PK1: Tensor,
        log_q_PK1: Tensor,
        is_estimate_PK1: Tensor | None = None,
        is_target_PK1: Tensor | None = None,
    ) -> Masses:
        """From logs in which a mass of 0 is -inf."""
        neither_PK1 = torch.isneginf(log_p_PK1) & torch.isneginf(log_q_PK1)
        log_p_PK1, log_q_PK1 = (
            log_p_PK1.masked_fill(neither_PK1, 0.0),
            log_q_PK1.masked_fill(neither_PK1, 0.0),
        )
        p_PK1, q_PK1 = (log.exp().masked_fill(neither_PK1, 0.0) for log in (log_p_PK1, log_q_PK1))
        return cls(log_p_PK1, p_PK1, log_q_PK1, q_PK1, is_estimate_PK1, is_target_PK1)


def compute(divergence: d.Divergence, masses: Masses) -> Tensor:
    """(P,) losses."""
    divergence, formula = _with_columns(divergence, masses), _FORMULAS.get(type(divergence))
    return divergence.in_torch(masses)[0] if formula is None else formula.value(divergence, masses)


def slopes(divergence: d.Divergence, masses: Masses) -> Tensor:
    """(P, K+1) h."""
    divergence, formula = _with_columns(divergence, masses), _FORMULAS.get(type(divergence))
    return divergence.in_torch(masses)[1] if formula is None else formula.slope(divergence, masses)


def _with_columns(divergence: d.Divergence, masses: Masses) -> d.Divergence:
    """Options that are (P,) as (P, 1), in the masses' dtype: the formulas take either them or numbers."""
    return divergence.map(lambda option_P: option_P.detach().to(masses.p_PK1.dtype)[:, None])


def _log(option: d.Option) -> Any:
    return option.log() if isinstance(option, Tensor) else math.log(option)


def _log1p(option: d.Option) -> Any:
    return option.log1p() if isinstance(option, Tensor) else math.log1p(option)


def _flat(option: d.Option) -> Any:
    """A column as (P,)."""
    return option[:, 0] if isinstance(option, Tensor) else option


def _at_least(values_PK1: Tensor, low: Any) -> Tensor:
    return values_PK1.maximum(low) if isinstance(low, Tensor) else values_PK1.clamp_min(low)


def forward_kl(_: d.Divergence, x: Masses) -> Tensor:
    return _times(x.p_PK1, x.log_p_PK1 - x.log_q_PK1).sum(dim=1)


def forward_kl_slope(_: d.Divergence, x: Masses) -> Tensor:
    return -x.p_PK1


def reverse_kl(options: d.ReverseKL | d.JensenShannon | d.AdaptiveKL, x: Masses) -> Tensor:
    return _times(x.q_PK1, x.log_q_PK1 - _at_least(x.log_p_PK1, _log(options.floor))).sum(dim=1)


def reverse_kl_slope(options: d.ReverseKL | d.JensenShannon | d.AdaptiveKL, x: Masses) -> Tensor:
    return _times(x.q_PK1, x.log_q_PK1 - _at_least(x.log_p_PK1, _log(options.floor)))


def jensen_shannon(options: d.JensenShannon, x: Masses) -> Tensor:
    if isinstance(options.beta, Tensor):
        beta_P1, factor_P1 = _inner_beta(options)
        losses_P = _inner_jensen_shannon(beta_P1, factor_P1, x)
        losses_P = torch.where(_flat(options.beta) == 0, forward_kl(options, x), losses_P)
        return torch.where(_flat(options.beta) == 1, reverse_kl(options, x), losses_P)
    if options.beta in (0, 1):
        return reverse_kl(options, x) if options.beta else forward_kl(options, x)
    return _inner_jensen_shannon(options.beta, options.factor, x)


def jensen_shannon_slope(options: d.JensenShannon, x: Masses) -> Tensor:
    if isinstance(options.beta, Tensor):
        beta_P1, factor_P1 = _inner_beta(options)
        h_PK1 = factor_P1 * _times(x.q_PK1, x.log_q_PK1 - _log_mix(beta_P1, x)) / beta_P1
        h_PK1 = torch.where(options.beta == 0, forward_kl_slope(options, x), h_PK1)
        return torch.where(options.beta == 1, reverse_kl_slope(options, x), h_PK1)
    if options.beta in (0, 1):
        return reverse_kl_slope(options, x) if options.beta else forward_kl_slope(options, x)
    return options.factor * _times(x.q_PK1, x.log_q_PK1 - _log_mix(options.beta, x)) / options.beta


def _inner_jensen_shannon(beta: Any, factor: Any, x: Masses) -> Tensor:
    log_m_PK1 = _log_mix(beta, x)
    forward_PK1 = _times(x.p_PK1, x.log_p_PK1 - log_m_PK1) / (1 - beta)
    return (factor * (forward_PK1 + _times(x.q_PK1, x.log_q_PK1 - log_m_PK1) / beta)).sum(dim=1)


def _inner_beta(options: d.JensenShannon) -> tuple[Tensor, Any]:
    """(P, 1) beta, a half where it is 0 or 1 and the limits are taken, and what loss and gradient are multiplied with."""
    beta_P1 = torch.where((options.beta > 0) & (options.beta < 1), options.beta, 0.5)
    return beta_P1, beta_P1 * (1 - beta_P1) if options.gkd_scale else 1.0


def skew_kl(options: d.SkewKL, x: Masses) -> Tensor:
    return _times(x.p_PK1, x.log_p_PK1 - _log_skewed(options, x)).sum(dim=1)


def skew_kl_slope(options: d.SkewKL, x: Masses) -> Tensor:
    log_m_PK1 = _log_skewed(options, x)
    # Where both are beyond float64, as Q = M = 0, Q / M is 1 / (1 - skew).
    ratio_PK1 = torch.where(torch.isneginf(log_m_PK1), 1 / (1 - options.skew), (x.log_q_PK1 - log_m_PK1).exp())
    return -(1 - options.skew) * _times(x.p_PK1, ratio_PK1)


def _log_skewed(options: d.SkewKL, x: Masses) -> Tensor:
    """log(skew P + (1 - skew) Q), which is log Q itself at skew 0."""
    if isinstance(options.skew, Tensor):
        return torch.where(options.skew > 0, _log_mix(torch.where(options.skew > 0, options.skew, 0.5), x), x.log_q_PK1)
    return _log_mix(options.skew, x) if options.skew > 0 else x.log_q_PK1


def self_evolution(options: d.SelfEvolution, x: Masses) -> Tensor:
    return _times(x.p_PK1, x.log_p_PK1 - _proxy(options, x)[1]).sum(dim=1)


def self_evolution_slope(options: d.SelfEvolution, x: Masses) -> Tensor:
    mu_P1, log_m_PK1 = _proxy(options, x)
    ratio_PK1 = torch.where(mu_P1 > 0, (x.log_q_PK1 - log_m_PK1).exp(), 1.0)
    return -(1 - mu_P1) * _times(x.p_PK1, ratio_PK1)


def _proxy(options: d.SelfEvolution, x: Masses) -> tuple[Tensor, Tensor]:
    """(P, 1) mu, a constant, and log((1 - mu) Q + mu G)."""
    g_PK1, is_target_PK1 = _guide(options, x)
    gap_P1 = _guide_gap(g_PK1, x)
    is_hard_P1 = is_target_PK1.any(dim=1, keepdim=True) & (gap_P1 > options.threshold)
    # 1 - s / (gap + s): 1 at an infinite gap.
    mu_P1 = torch.where(is_hard_P1, options.max_share * (1 - options.softness / (gap_P1 + options.softness)), 0.0)
    safe_P1 = torch.where(mu_P1 > 0, mu_P1, 0.5)
    mixed_PK1 = torch.logaddexp(x.log_q_PK1 + (-safe_P1).log1p(), g_PK1.log() + safe_P1.log())
    return mu_P1, torch.where(mu_P1 > 0, mixed_PK1, x.log_q_PK1)


def hard_share(options: d.HardShare, x: Masses) -> Tensor:
    g_PK1, is_target_PK1 = _guide(options, x)
    gap_P1 = _guide_gap(g_PK1, x)
    return (is_target_PK1.any(dim=1) & (gap_P1 > options.threshold)[:, 0]).to(x.p_PK1.dtype)


def hard_share_slope(_: d.Divergence, x: Masses) -> Tensor:
    return torch.zeros_like(x.p_PK1)


def _guide(options: d.SelfEvolution | d.HardShare, x: Masses) -> tuple[Tensor, Tensor]:
    """(P, K+1) the guide's masses, and which bucket holds the target id."""
    is_target_PK1 = torch.zeros_like(x.p_PK1, dtype=torch.bool) if x.is_target_PK1 is None else x.is_target_PK1
    return options.lam * x.p_PK1 + (1 - options.lam) * is_target_PK1.to(x.p_PK1.dtype), is_target_PK1


def _guide_gap(g_PK1: Tensor, x: Masses) -> Tensor:
    """(P, 1) KL(guide || student), a constant."""
    return _times(g_PK1, g_PK1.log() - x.log_q_PK1.detach()).sum(dim=1, keepdim=True)


def skew_reverse_kl(options: d.SkewReverseKL, x: Masses) -> Tensor:
    return _times_q(x, x.log_q_PK1 - _log_mix(1 - options.skew, x)).sum(dim=1)


def skew_reverse_kl_slope(options: d.SkewReverseKL, x: Masses) -> Tensor:
    gap_PK1 = x.log_q_PK1 - _log_mix(1 - options.skew, x)
    return _times(x.q_PK1, gap_PK1 - options.skew * gap_PK1.exp())


def adaptive_kl(options: d.AdaptiveKL, x: Masses) -> Tensor:
    share_P = _head_share(options, x)
    return share_P * forward_kl(options, x) + (1 - share_P) * reverse_kl(options, x)


def adaptive_kl_slope(options: d.AdaptiveKL, x: Masses) -> Tensor:
    share_P1 = _head_share(options, x)[:, None]
    return share_P1 * forward_kl_slope(options, x) + (1 - share_P1) * reverse_kl_slope(options, x)


def _head_share(options: d.AdaptiveKL, x: Masses) -> Tensor:
    """(P,) the weight of the forward KL; a constant."""
    gap_PK1 = (x.p_PK1 - x.q_PK1).detach().abs()
    order_PK = x.p_PK1[:, :-1].argsort(dim=1, descending=True, stable=True)
    in_head_PK = x.p_PK1.gather(1, order_PK).cumsum(dim=1) <= options.head_mass
    first_PK = torch.arange(order_PK.shape[1], device=gap_PK1.device) == 0
    g_head_P = torch.where(in_head_PK | first_PK, gap_PK1.gather(1, order_PK), 0.0).sum(dim=1)
    g_P = gap_PK1.sum(dim=1)
    return torch.where(g_P == 0, 0.5, g_head_P / torch.where(g_P == 0, 1.0, g_P))


def total_variation(_: d.Divergence, x: Masses) -> Tensor:
    return (x.p_PK1 - x.q_PK1).abs().sum(dim=1) / 2


def total_variation_slope(_: d.Divergence, x: Masses) -> Tensor:
    gap_PK1 = x.q_PK1 - x.p_PK1
    # torch.sign(NaN) is 0 on some devices.
    return x.q_PK1 * torch.where(gap_PK1.isnan(), gap_PK1, gap_PK1.sign()) / 2


def hellinger(_: d.Divergence, x: Masses) -> Tensor:
    return ((x.log_q_PK1 / 2).exp() - (x.log_p_PK1 / 2).exp()).square().sum(dim=1) / 2


def hellinger_slope(_: d.Divergence, x: Masses) -> Tensor:
    root_q_PK1, root_p_PK1 = (x.log_q_PK1 / 2).exp(), (x.log_p_PK1 / 2).exp()
    return root_q_PK1 * (root_q_PK1 - root_p_PK1) / 2


def alpha_beta(options: d.AlphaBeta, x: Masses) -> Tensor:
    a, b = options.a, options.b
    both_PK1 = (a * ((a + b) * x.log_p_PK1).exp() + b * ((a + b) * x.log_q_PK1).exp()) / (a + b)
    return (both_PK1 - (a * x.log_p_PK1).exp() * (b * x.log_q_PK1).exp()).sum(dim=1) / _flat(a * b)


def alpha_beta_slope(options: d.AlphaBeta, x: Masses) -> Tensor:
    a, b = options.a, options.b
    return (((a + b) * x.log_q_PK1).exp() - (a * x.log_p_PK1).exp() * (b * x.log_q_PK1).exp()) / a


def decoupled_top_k(options: d.DecoupledTopK, x: Masses) -> Tensor:
    if x.p_PK1.shape[1] == 1:
        return forward_kl(options, x)
    t, m_P, r_P = options.inner_temperature, x.p_PK1[:, :-1].sum(dim=1), x.p_PK1[:, -1]
    u_PK, w_PK = _decoupled_logits(x, m_P[:, None])
    inner = Masses.of((u_PK / t).log_softmax(dim=1), (w_PK / t).log_softmax(dim=1))
    inner_P = _times(inner.p_PK1, inner.log_p_PK1 - inner.log_q_PK1).sum(dim=1)
    outer_P = _times(m_P, m_P.masked_fill(m_P == 0, 1.0).log() - w_PK.logsumexp(dim=1))
    return outer_P + _times(r_P, x.log_p_PK1[:, -1] - x.log_q_PK1[:, -1]) + _flat(t * t) * m_P * inner_P


def decoupled_top_k_slope(options: d.DecoupledTopK, x: Masses) -> Tensor:
    if x.p_PK1.shape[1] == 1:
        return -x.p_PK1
    t, m_P1 = options.inner_temperature, x.p_PK1[:, :-1].sum(dim=1, keepdim=True)
    u_PK, w_PK = _decoupled_logits(x, m_P1)
    inner_PK = t * ((w_PK / t).softmax(dim=1) - (u_PK / t).softmax(dim=1))
    return torch.cat([_times(m_P1, inner_PK - w_PK.softmax(dim=1)), -x.p_PK1[:, -1:]], dim=1)


def _decoupled_logits(x: Masses, m_P1: Tensor) -> tuple[Tensor, Tensor]:
    """(P, K) log masses of both sides on the support, -inf for 0.

    Positions without mass on the support get entries of 0: their softmax exists, and is multiplied by m = 0.
    """
    stored_PK, empty_P1 = (x.p_PK1 > 0)[:, :-1], m_P1 == 0
    u_PK = x.log_p_PK1[:, :-1].masked_fill(~stored_PK & ~empty_P1, -torch.inf).masked_fill(empty_P1, 0.0)
    w_PK = x.log_q_PK1[:, :-1].masked_fill((x.q_PK1 == 0)[:, :-1] & ~stored_PK & ~empty_P1, -torch.inf)
    return u_PK, w_PK.masked_fill(empty_P1, 0.0)


def tail_aware_kl(options: d.TailAwareKL, x: Masses) -> Tensor:
    parts = _tail_parts(x)
    head_P = _times(parts.head_p_PK1, x.log_p_PK1 - x.log_q_PK1).sum(dim=1)
    outer_P = _times(parts.r_P, x.log_p_PK1[:, -1] - parts.tail_lse_P)
    log_within_PK1 = torch.where(torch.isneginf(x.log_q_PK1), -torch.inf, x.log_q_PK1 - parts.tail_lse_P[:, None])
    within_PK1 = _times(parts.estimates_PK1, x.log_p_PK1 - log_within_PK1)
    log_s_P = parts.estimates_PK1.sum(dim=1).masked_fill(parts.s_P == 0, 1.0).log()
    return head_P + outer_P + _flat(options.tail_weight) * (within_PK1.sum(dim=1) - parts.s_P * log_s_P)


def tail_aware_kl_slope(options: d.TailAwareKL, x: Masses) -> Tensor:
    parts = _tail_parts(x)
    unreachable_P1 = torch.isneginf(parts.tail_lse_P)[:, None]
    share_PK1 = torch.where(parts.in_tail_PK1, (x.log_q_PK1 - parts.tail_lse_P[:, None]).exp(), 0.0)
    # A tail that the student cannot give is, as in the forward KL, one bucket of mass 0.
    last_PK1 = torch.zeros_like(share_PK1)
    last_PK1[:, -1] = 1
    share_PK1 = torch.where(unreachable_P1, last_PK1, share_PK1)
    factor_P = _flat(options.tail_weight) * parts.s_P - parts.r_P
    return factor_P[:, None] * share_PK1 - parts.head_p_PK1 - options.tail_weight * parts.estimates_PK1


@dataclass(frozen=True, slots=True, eq=False)
class _TailParts:
    """The teacher's head and estimates, 0 elsewhere, r and the estimates' sum s; log of the student's whole tail."""

    head_p_PK1: Tensor
    estimates_PK1: Tensor
    r_P: Tensor
    s_P: Tensor
    in_tail_PK1: Tensor
    tail_lse_P: Tensor


def _tail_parts(x: Masses) -> _TailParts:
    """What `tail_aware_kl` and its slope are made of."""
    is_last_PK1 = torch.zeros_like(x.p_PK1, dtype=torch.bool)
    is_last_PK1[:, -1] = True
    is_estimate_PK1 = torch.zeros_like(is_last_PK1) if x.is_estimate_PK1 is None else x.is_estimate_PK1 & ~is_last_PK1
    absent_PK1 = (x.p_PK1 == 0) & (x.log_p_PK1 == 0)
    in_tail_PK1 = (is_estimate_PK1 | is_last_PK1) & ~absent_PK1
    tail_PK1 = x.log_q_PK1.masked_fill(~in_tail_PK1, -torch.inf)
    unreachable_P = torch.isneginf(tail_PK1.detach().amax(dim=1))
    # The derivative of logsumexp is NaN where everything is -inf.
    lse_P = tail_PK1.masked_fill(unreachable_P[:, None], 0.0).logsumexp(dim=1).masked_fill(unreachable_P, -torch.inf)
    estimates_PK1 = x.p_PK1.masked_fill(~is_estimate_PK1, 0.0)
    head_p_PK1 = x.p_PK1.masked_fill(is_estimate_PK1 | is_last_PK1, 0.0)
    return _TailParts(head_p_PK1, estimates_PK1, x.p_PK1[:, -1], estimates_PK1.sum(dim=1), in_tail_PK1, lse_P)


def _times(mass: Tensor, factor: Tensor) -> Tensor:
    """mass * factor; 0 where the mass is 0. The factor is taken out before the product: else its gradient would be NaN."""
    return mass * factor.masked_fill(mass == 0, 0.0)


def _times_q(x: Masses, factor: Tensor) -> Tensor:
    """Q * factor, less a term whose sum over a position, Q - 1, has no derivative: it leaves h without a multiple of Q."""
    return _times(x.q_PK1, factor) - (x.q_PK1 - x.q_PK1.detach())


def _log_mix(share: d.Option, x: Masses) -> Tensor:
    """log(share P + (1 - share) Q)."""
    return torch.logaddexp(x.log_p_PK1 + _log(share), x.log_q_PK1 + _log1p(-share))


class Formula(NamedTuple):
    """A divergence: (P,) losses, and (P, K+1) h."""

    value: Callable[[Any, Masses], Tensor]
    slope: Callable[[Any, Masses], Tensor]


_FORMULAS: dict[type[d.Divergence], Formula] = {
    d.ForwardKL: Formula(forward_kl, forward_kl_slope),
    d.ReverseKL: Formula(reverse_kl, reverse_kl_slope),
    d.JensenShannon: Formula(jensen_shannon, jensen_shannon_slope),
    d.SkewKL: Formula(skew_kl, skew_kl_slope),
    d.SkewReverseKL: Formula(skew_reverse_kl, skew_reverse_kl_slope),
    d.SelfEvolution: Formula(self_evolution, self_evolution_slope),
    d.HardShare: Formula(hard_share, hard_share_slope),
    d.AdaptiveKL: Formula(adaptive_kl, adaptive_kl_slope),
    d.TotalVariation: Formula(total_variation, total_variation_slope),
    d.Hellinger: Formula(hellinger, hellinger_slope),
    d.AlphaBeta: Formula(alpha_beta, alpha_beta_slope),
    d.DecoupledTopK: Formula(decoupled_top_k, decoupled_top_k_slope),
    d.TailAwareKL: Formula(tail_aware_kl, tail_aware_kl_slope),
    d.CenteredMSE: Formula(support.centered_mse, support.centered_mse_slope),
    d.HingeRanking: Formula(support.hinge_ranking, support.hinge_ranking_slope),
    d.LogisticRanking: Formula(support.logistic_ranking, support.logistic_ranking_slope),
    d.SoftSpearman: Formula(support.soft_spearman, support.soft_spearman_slope),
}
