"""The loss over logits whose vocabulary is split between ranks, as the tensor-parallel output projection leaves them.

Shape letters: P positions (rows), K entries per position (padded), B = K + 1 buckets, V the vocabulary, W this rank's part.

A rank holds the logits of ids first_id .. first_id + W. Exchanged per row are three logsumexps, K logits and one label's: the
buckets are then known everywhere, every rank computes the same loss, and its own part of the gradient without the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdcache.errors import LossError
from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import Divergence, get_divergence
from kdcache.loss import arguments, torch_rows
from kdcache.loss.arguments import Options, TargetTensors
from kdcache.loss.gradients import refuse_second_derivative, scale_gradient
from kdcache.loss.triton_rows import bucket_terms


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
    labels_P: Tensor | None = None,
    tail: str = "bucket",
    alpha: float = 1.0,
    weights_P: Tensor | None = None,
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

    Raises:
        LossError: an argument is impossible, or does not fit the others.
    """
    objective = Objective(tail, alpha, get_divergence(divergence))
    if tail == "uniform":
        raise LossError("tail 'uniform' is not possible over a split vocabulary; use 'bucket'")
    if not 0 <= first_id <= vocab_size - logits_PW.shape[1]:
        raise LossError(f"first_id is {first_id}, but {logits_PW.shape[1]} logits from there must end within {vocab_size}")
    teacher = TargetTensors(token_ids_PK, logprobs_PK, tail_mass_P, labels_P, weights_P)
    arguments.check_options(Options(objective, reduction, "torch", "exact"), teacher)
    arguments.check_tensors(logits_PW, teacher)
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
        is_read_P1 = (scales_P > 0)[:, None]
        z_PW = logits_PW.detach().to(_work_dtype(logits_PW)).masked_fill(~is_read_P1, 0.0)
        own = _own_targets(targets, first_id, z_PW.shape[1])
        outside_PW = torch_rows.outside(z_PW, own.token_ids_PK, -torch.inf)[:, :-1]
        tail_lse_P = _logsumexp_over_ranks(outside_PW.logsumexp(dim=1).double(), group)
        z_PK = _from_owner(z_PW, own.token_ids_PK, group)
        lse_P = torch.cat([z_PK, tail_lse_P[:, None]], dim=1).logsumexp(dim=1)
        q_PW = (z_PW - lse_P[:, None]).exp()
        losses_P, gradient_PW = torch.zeros_like(lse_P), torch.zeros_like(q_PW)
        if objective.alpha > 0:
            log_q_PB = torch.cat([z_PK, tail_lse_P[:, None]], dim=1) - lse_P[:, None]
            losses_P, h_PB = bucket_terms(objective, torch_rows.log_teacher(targets, objective.tail, vocab_size), log_q_PB)
            within_PW = torch.where(torch.isneginf(outside_PW), 0.0, (outside_PW - tail_lse_P[:, None]).exp())
            gradient_PW = h_PB[:, -1:] * within_PW - h_PB.sum(dim=1, keepdim=True) * q_PW
            gradient_PW = _add_at(gradient_PW, own.token_ids_PK, h_PB[:, :-1]) * objective.alpha
            losses_P = losses_P * objective.alpha
        if objective.alpha < 1 and own.labels_P is not None and targets.labels_P is not None:
            share_P = (targets.labels_P >= 0).double() * (1 - objective.alpha)
            label_z_P = _from_owner(z_PW, own.labels_P[:, None], group)[:, 0]
            losses_P = losses_P + torch.where(share_P > 0, share_P * (lse_P - label_z_P), 0.0)
            gradient_PW = gradient_PW + share_P[:, None] * q_PW
            gradient_PW = _add_at(gradient_PW, own.labels_P[:, None], -share_P[:, None])
        gradient_PW = torch.where(is_read_P1, gradient_PW * scales_P[:, None], 0.0)
        ctx.save_for_backward(gradient_PW.to(logits_PW.dtype))
        return torch.where(is_read_P1[:, 0], losses_P * scales_P, 0.0).to(_work_dtype(logits_PW))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gather the logits and use sparse_kd_loss with backend='torch'")
        return scale_gradient(ctx.saved_tensors[0], upstream[0]), None, None, None, None


def _work_dtype(logits_PW: Tensor) -> torch.dtype:
    return torch.float64 if logits_PW.dtype == torch.float64 else torch.float32


def _own_targets(targets: TargetTensors, first_id: int, width: int) -> TargetTensors:
    """Ids and labels as columns of this rank, -1 where they are another's."""

    def own(ids: Tensor) -> Tensor:
        columns = ids.long() - first_id
        return torch.where((ids >= 0) & (columns >= 0) & (columns < width), columns, -1)

    labels_P = None if targets.labels_P is None else own(targets.labels_P)
    return replace(targets, token_ids_PK=own(targets.token_ids_PK), labels_P=labels_P)


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
