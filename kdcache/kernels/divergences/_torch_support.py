"""The divergences that compare logits on the support, in torch: values and slopes, as in `torch_formulas`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kdcache.kernels import divergences as d

if TYPE_CHECKING:
    from kdcache.kernels.divergences.torch_formulas import Masses


def centered_mse(_: d.Divergence, x: Masses) -> Tensor:
    gap_PK, count_P = _centered_gap(x)
    return gap_PK.square().sum(dim=1) / count_P


def centered_mse_slope(_: d.Divergence, x: Masses) -> Tensor:
    gap_PK, count_P = _centered_gap(x)
    return _with_tail(2 * gap_PK / count_P[:, None])


def _centered_gap(x: Masses) -> tuple[Tensor, Tensor]:
    """(P, K) log Q - log P about its mean over the compared entries, 0 at others; (P,) how many there are, at least 1."""
    compared_PK = (x.p_PK1 > 0)[:, :-1]
    count_P = compared_PK.sum(dim=1).clamp_min(1)
    gap_PK = torch.where(compared_PK, (x.log_q_PK1 - x.log_p_PK1)[:, :-1], 0.0)
    return torch.where(compared_PK, gap_PK - (gap_PK.sum(dim=1) / count_P)[:, None], 0.0), count_P


def hinge_ranking(options: d.HingeRanking, x: Masses) -> Tensor:
    margin = _over_pairs(options.margin)
    return _mean_over_pairs(lambda gap: (margin - gap).relu(), x)


def hinge_ranking_slope(options: d.HingeRanking, x: Masses) -> Tensor:
    margin = _over_pairs(options.margin)
    return _slopes_over_pairs(lambda gap: torch.where(gap.isnan(), gap, -(gap < margin).to(gap.dtype)), x)


def _over_pairs(option: d.Option) -> Any:
    """A column as (P, 1, 1)."""
    return option[:, :, None] if isinstance(option, Tensor) else option


def logistic_ranking(_: d.Divergence, x: Masses) -> Tensor:
    return _mean_over_pairs(lambda gap: -logsigmoid(gap), x)


def logistic_ranking_slope(_: d.Divergence, x: Masses) -> Tensor:
    return _slopes_over_pairs(lambda gap: -torch.sigmoid(-gap), x)


def soft_spearman(options: d.SoftSpearman, x: Masses) -> Tensor:
    teacher_PK, student_PK, _ = _centered_ranks(options, x)
    ordered_P, spread_P = (teacher_PK != 0).any(dim=1), (student_PK != 0).any(dim=1)
    squares_P = torch.where(spread_P, student_PK.square().sum(dim=1), 1.0) * teacher_PK.square().sum(dim=1)
    correlation_P = (teacher_PK * student_PK).sum(dim=1) * torch.where(ordered_P, squares_P, 1.0).rsqrt()
    return torch.where(
        ordered_P,
        1 - torch.where(spread_P, correlation_P, 0.0),
        student_PK.sum(dim=1) * 0,
    )


def soft_spearman_slope(options: d.SoftSpearman, x: Masses) -> Tensor:
    compared_PK = (x.p_PK1 > 0)[:, :-1]
    if compared_PK.shape[1] == 0:
        return torch.zeros_like(x.p_PK1)
    teacher_PK, ranks_PK, pool_PK = _centered_ranks(options, x)
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


def _centered_ranks(options: d.SoftSpearman, x: Masses) -> tuple[Tensor, Tensor, Tensor]:
    """(P, K) the teacher's and the student's soft ranks about their means, 0 where not compared, and the levels of the
    student's pools."""
    compared_PK = (x.p_PK1 > 0)[:, :-1]
    count_P1 = compared_PK.sum(dim=1, keepdim=True).clamp_min(1)

    def ranks_and_levels(values_PK: Tensor) -> tuple[Tensor, Tensor]:
        ranks_PK, levels_PK = soft_ranks(values_PK / options.strength, compared_PK)
        ranks_PK = torch.where(compared_PK, ranks_PK, 0.0)
        return torch.where(compared_PK, ranks_PK - ranks_PK.sum(dim=1, keepdim=True) / count_P1, 0.0), levels_PK

    return ranks_and_levels(x.log_p_PK1[:, :-1])[0], *ranks_and_levels(x.log_q_PK1[:, :-1])


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
    position_K = torch.arange(num_entries, device=values_PK.device)
    y_PK = torch.where(valid_PK, sorted_PK - (valid_PK.sum(dim=1, keepdim=True) - position_K), 0.0)
    sums_PK = y_PK.cumsum(dim=1)
    lengths_KK = position_K[None, :] - position_K[:, None] + 1
    means_PKK = (sums_PK[:, None, :] - (sums_PK - y_PK)[:, :, None]) / lengths_KK.clamp_min(1)
    usable_PKK = (lengths_KK > 0) & valid_PK[:, None, :] & valid_PK[:, :, None]
    highest_PKK = means_PKK.masked_fill(~usable_PKK, -torch.inf).flip(2).cummax(dim=2).values.flip(2)
    isotonic_PK = torch.where(valid_PK, highest_PKK.masked_fill(~usable_PKK, torch.inf).amin(dim=1), 0.0)
    ranks_PK = torch.where(valid_PK, sorted_PK - isotonic_PK, 0.0)
    zeros_PK = torch.zeros_like(values_PK)
    return zeros_PK.scatter(1, order_PK, ranks_PK), zeros_PK.scatter(1, order_PK, isotonic_PK)


def _compared_pairs(x: Masses) -> tuple[Tensor, Tensor]:
    """(P, K, K) whether i is to be ranked above j, and log Q_i - log Q_j there, 0 elsewhere."""
    u_PK, w_PK = x.log_p_PK1[:, :-1], x.log_q_PK1[:, :-1]
    compared_PK = (x.p_PK1 > 0)[:, :-1]
    better_PKK = (u_PK[:, :, None] > u_PK[:, None, :]) & compared_PK[:, :, None] & compared_PK[:, None, :]
    return better_PKK, torch.where(better_PKK, w_PK[:, :, None] - w_PK[:, None, :], 0.0)


def _mean_over_pairs(pair: Callable[[Tensor], Tensor], x: Masses) -> Tensor:
    better_PKK, gap_PKK = _compared_pairs(x)
    total_P = torch.where(better_PKK, pair(gap_PKK), 0.0).sum(dim=(1, 2))
    return total_P / better_PKK.sum(dim=(1, 2)).clamp_min(1)


def _slopes_over_pairs(slope: Callable[[Tensor], Tensor], x: Masses) -> Tensor:
    better_PKK, gap_PKK = _compared_pairs(x)
    slopes_PKK = torch.where(better_PKK, slope(gap_PKK), 0.0)
    count_P1 = better_PKK.sum(dim=(1, 2)).clamp_min(1)[:, None]
    return _with_tail((slopes_PKK.sum(dim=2) - slopes_PKK.sum(dim=1)) / count_P1)


def _with_tail(h_PK: Tensor) -> Tensor:
    return torch.cat([h_PK, h_PK.new_zeros(len(h_PK), 1)], dim=1)
