"""The loss over logits whose vocabulary is split between ranks, as the tensor-parallel output projection leaves them.

Shape letters: P positions (rows), K entries per position (padded), B = K + 1 buckets, V the vocabulary, W this rank's part.

A rank holds the logits of ids first_id .. first_id + W. Exchanged per row are a logsumexp (a maximum and a sum) for the
teacher's part and one for the labels', K logits and one label's: the buckets are then known everywhere, every rank computes the
same loss, and its own part of the gradient without the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdcache.errors import LossError
from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import Divergence, get_divergence
from kdcache.loss import arguments, torch_rows
from kdcache.loss.arguments import Options, TargetTensors
from kdcache.loss.bucket_rows import bucket_terms
from kdcache.loss.gradients import refuse_second_derivative, scale_gradient


def vocab_parallel_sparse_kd_loss(
    logits_PW: Tensor,
    token_ids_PK: Tensor,
    logprobs_PK: Tensor,
    tail_mass_P: Tensor,
    *,
    first_id: int,
    vocab_size: int,
    group: Any = None,
    divergence: str | Divergence = "forward_kl",
    target_ids_P: Tensor | None = None,
    tail: str = "bucket",
    alpha: float = 1.0,
    temperature: float = 1.0,
    log_z_P: Tensor | None = None,
    weights_P: Tensor | None = None,
    targets: str = "exact",
    num_exact_P: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`sparse_kd_loss` of the logits that all ranks hold together, the same number on every rank.

    The gradient by `logits_PW` is that of the whole loss; the hidden states' gradient, G W, is a sum over ranks that the
    tensor-parallel projection makes in its own backward, as for every vocabulary-parallel loss.

    Args:
        logits_PW: (P, W) this rank's logits, unnormalised; without padding ids.
        token_ids_PK: as in `sparse_kd_loss`, whole-vocabulary ids, the same on every rank, like all targets.
        first_id: the id of column 0.
        vocab_size: V, the sum of all W.
        group: of torch.distributed; None for the default one.
        tail: `bucket`, `drop` or `renormalize`.

    The other arguments are those of `sparse_kd_loss`, and the same on every rank.

    Raises:
        LossError: an argument is impossible, or does not fit the others.
    """
    objective = Objective(tail, alpha, get_divergence(divergence), float(temperature))
    if tail == "uniform":
        raise LossError("tail 'uniform' is not possible over a split vocabulary; use 'bucket'")
    if not 0 <= first_id <= vocab_size - logits_PW.shape[1]:
        raise LossError(f"first_id is {first_id}, but {logits_PW.shape[1]} logits from there must end within {vocab_size}")
    teacher = TargetTensors(token_ids_PK, logprobs_PK, tail_mass_P, target_ids_P, weights_P, num_exact_P)
    options = Options(objective, reduction, "torch", targets)
    arguments.check_options(options, teacher)
    arguments.check_tensors(logits_PW, teacher, log_z_P)
    teacher = arguments.at_temperature(arguments.used_entries(teacher, options), log_z_P, objective)
    arguments.check_values(teacher, vocab_size)
    scales_P = arguments.row_scales(teacher, reduction)
    loss = _SplitRows.apply(logits_PW, teacher, objective, scales_P, (first_id, vocab_size, group))
    assert isinstance(loss, Tensor)
    return loss if reduction == "none" else loss.sum()


class _SplitRows(torch.autograd.Function):
    """(P,) losses times their scales."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_PW: Tensor,
        targets: TargetTensors,
        objective: Objective,
        scales_P: Tensor,
        split: tuple[int, int, Any],
    ) -> Tensor:
        first_id, vocab_size, group = split
        is_read_P = scales_P > 0
        z_PW = logits_PW.detach().to(_work_dtype(logits_PW)).masked_fill(~is_read_P[:, None], 0.0)
        part = _Part(z_PW, _own_targets(targets, first_id, z_PW.shape[1]), group)
        terms = []
        if objective.alpha > 0:
            terms.append(_teacher_term(part, targets, objective, vocab_size))
        if objective.alpha < 1 and targets.target_ids_P is not None:
            terms.append(_label_term(part, targets.target_ids_P, 1 - objective.alpha))
        losses_P, gradient_PW = (sum(columns) for columns in zip(*terms, strict=True))
        gradient_PW = torch.where(is_read_P[:, None], gradient_PW * scales_P[:, None], 0.0)
        ctx.save_for_backward(gradient_PW.to(logits_PW.dtype))
        return torch.where(is_read_P, losses_P * scales_P, 0.0).to(_work_dtype(logits_PW))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gather the logits and use sparse_kd_loss with backend='torch'")
        return scale_gradient(ctx.saved_tensors[0], upstream[0]), None, None, None, None


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """This rank's logits, the targets as its columns, and the group."""

    z_PW: Tensor
    own: TargetTensors
    group: Any


def _teacher_term(part: _Part, targets: TargetTensors, objective: Objective, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(P,) alpha T^2 L and (P, W) its gradient by this rank's logits."""
    t, ids_PK = objective.temperature, part.own.token_ids_PK
    z_PW = part.z_PW / t
    outside_PW = torch_rows.outside(z_PW, ids_PK, -torch.inf)[:, :-1]
    tail_lse_P = _logsumexp_over_ranks(outside_PW.logsumexp(dim=1).double(), part.group)
    z_PB = torch.cat([_from_owner(z_PW, ids_PK, part.group), tail_lse_P[:, None]], dim=1)
    lse_P = z_PB.logsumexp(dim=1)
    masses = torch_rows.masses(targets, objective.tail, vocab_size, z_PB - lse_P[:, None])
    losses_P, h_PB = bucket_terms(objective, masses)
    within_PW = torch.where(torch.isneginf(outside_PW), 0.0, (outside_PW - tail_lse_P[:, None]).exp())
    gradient_PW = h_PB[:, -1:] * within_PW - h_PB.sum(dim=1, keepdim=True) * (z_PW - lse_P[:, None]).exp()
    gradient_PW = _add_at(gradient_PW, ids_PK, h_PB[:, :-1])
    return objective.alpha * t * t * losses_P, objective.alpha * t * gradient_PW


def _label_term(part: _Part, target_ids_P: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(P,) share * CE, 0 where there is no label, and (P, W) its gradient; at temperature 1."""
    assert part.own.target_ids_P is not None
    share_P = (target_ids_P >= 0).double() * share
    lse_P = _logsumexp_over_ranks(part.z_PW.logsumexp(dim=1).double(), part.group)
    label_z_P = _from_owner(part.z_PW, part.own.target_ids_P[:, None], part.group)[:, 0]
    gradient_PW = share_P[:, None] * (part.z_PW - lse_P[:, None]).exp()
    gradient_PW = _add_at(gradient_PW, part.own.target_ids_P[:, None], -share_P[:, None])
    return torch.where(share_P > 0, share_P * (lse_P - label_z_P), 0.0), gradient_PW


def _work_dtype(logits_PW: Tensor) -> torch.dtype:
    return torch.float64 if logits_PW.dtype == torch.float64 else torch.float32


def _own_targets(targets: TargetTensors, first_id: int, width: int) -> TargetTensors:
    """Ids and labels as columns of this rank, -1 where they are another's."""

    def own(ids: Tensor) -> Tensor:
        columns = ids.long() - first_id
        return torch.where((ids >= 0) & (columns >= 0) & (columns < width), columns, -1)

    target_ids_P = None if targets.target_ids_P is None else own(targets.target_ids_P)
    return replace(targets, token_ids_PK=own(targets.token_ids_PK), target_ids_P=target_ids_P)


def _logsumexp_over_ranks(lse_P: Tensor, group: Any) -> Tensor:
    top_P = lse_P.clone()
    dist.all_reduce(top_P, dist.ReduceOp.MAX, group)
    shift_P = torch.where(torch.isneginf(top_P), 0.0, top_P)
    sum_P = (lse_P - shift_P).exp()
    dist.all_reduce(sum_P, dist.ReduceOp.SUM, group)
    return sum_P.log() + shift_P


def _from_owner(z_PW: Tensor, columns_PK: Tensor, group: Any) -> Tensor:
    """(P, K) float64 logits from whichever rank has them; -inf where nobody does. A sum, since a maximum may lose NaN."""
    is_own_PK = columns_PK >= 0
    pair_2PK = torch.stack([z_PW.gather(1, columns_PK.clamp_min(0)).double().masked_fill(~is_own_PK, 0.0), is_own_PK.double()])
    dist.all_reduce(pair_2PK, dist.ReduceOp.SUM, group)
    return pair_2PK[0].masked_fill(pair_2PK[1] == 0, -torch.inf)


def _add_at(values_PW: Tensor, columns_PK: Tensor, added_PK: Tensor) -> Tensor:
    wide_PW = torch.cat([values_PW, values_PW.new_zeros(len(values_PW), 1)], dim=1)
    columns_PK = torch.where(columns_PK >= 0, columns_PK, values_PW.shape[1])
    return wide_PW.scatter_add(1, columns_PK, added_PK.to(values_PW.dtype))[:, :-1]
