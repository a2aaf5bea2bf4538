"""The loss over logits whose vocabulary is split between ranks, as the tensor-parallel output projection leaves them.

A rank holds the W logits of ids first_id .. first_id + W. Exchanged per position are a logsumexp (a maximum and a sum) for the
teacher's part and one for the target ids', K logits and that of the target id: the buckets are then known everywhere, every
rank computes the same loss, and its own part of the gradient without the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdcache.errors import LossError
from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.divergences import Divergence
from kdcache.loss import prepare
from kdcache.loss.divergence_sum import DivergenceSum
from kdcache.loss.gradients import refuse_second_derivative, scale_gradient
from kdcache.loss.prepare import DEFAULT, Asked, LossSettings
from kdcache.loss.prepared import Prepared
from kdcache.loss.sparse_kd import scaled_values
from kdcache.loss.steps import torch_positions
from kdcache.loss.steps.step import bucket_terms


@dataclass(frozen=True, slots=True)
class VocabPart:
    """Which part of the vocabulary a rank holds.

    Attributes:
        first_id: the id of the rank's first logit.
        vocab_size: V, the sum of all ranks' W.
        group: of torch.distributed; None for the default one.
    """

    first_id: int
    vocab_size: int
    group: Any = None


def vocab_parallel_sparse_kd_loss(
    logits_PW: Tensor,
    part: VocabPart,
    teacher: SoftTargets[Tensor] | None,
    *,
    divergence: str | Divergence | DivergenceSum = "forward_kl",
    alpha: float = 1.0,
    temperature: float = 1.0,
    target_ids: Tensor | None = None,
    weights: Tensor | None = None,
    settings: LossSettings = DEFAULT,
) -> Tensor:
    """`sparse_kd_loss` of the logits that all ranks hold together, the same number on every rank.

    The gradient with respect to `logits_PW` is that of the whole loss; the hidden states' gradient, G W, is a sum over ranks
    that the tensor-parallel projection makes in its own backward, as for every vocabulary-parallel loss.

    The arguments that `kdcache.loss.sparse_kd.sparse_kd_loss` has too are described there, and are the same on every rank.

    Args:
        logits_PW: (P, W) this rank's logits, unnormalised; without padding ids.
        part: where they stand in the vocabulary.
        teacher: with whole-vocabulary ids.
        settings: the tail policy `uniform` is not possible; the backend is `torch`.

    Raises:
        LossError: an argument is impossible, does not fit the others, or would make a wrong loss.
    """
    tails = [part.tail for part in divergence.parts] if isinstance(divergence, DivergenceSum) else [settings.tail]
    if "uniform" in tails:
        raise LossError("tail is 'uniform', which is not possible over a split vocabulary; use 'bucket'")
    if not 0 <= part.first_id <= part.vocab_size - logits_PW.shape[1]:
        raise LossError(
            f"first_id is {part.first_id}, but {logits_PW.shape[1]} logits from there must end within {part.vocab_size}"
        )
    asked = Asked(divergence, alpha, temperature, replace(settings, backend="torch"))
    ready = prepare.prepare(logits_PW, teacher, asked, (target_ids, weights), part.vocab_size)
    prepare.check_values(ready, part.vocab_size)
    found = _Split.apply(logits_PW, ready, part)
    assert isinstance(found, tuple)
    losses_P, values_PD1 = found
    is_summed = settings.reduction != "none"
    if isinstance(divergence, DivergenceSum):
        divergence.keep(values_PD1.sum(dim=0) if is_summed else values_PD1.T)
    return losses_P.sum() if is_summed else losses_P


class _Split(torch.autograd.Function):
    """(P,) losses and (P, D + 1) values, times their scales."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_PW: Tensor,
        ready: Prepared,
        where: VocabPart,
    ) -> tuple[Tensor, Tensor]:
        scales_P = ready.scales_P
        is_read_P = scales_P > 0
        z_PW = logits_PW.detach().to(_work_dtype(logits_PW)).masked_fill(~is_read_P[:, None], 0.0)
        part, losses_P = _Part(z_PW, where.first_id, where.group), torch.zeros_like(scales_P)
        gradient_PW, values_PD1 = torch.zeros_like(z_PW), scales_P.new_zeros(len(scales_P), ready.num_values + 1)
        for one in (ready, *ready.further):
            columns = scales_P.new_zeros(len(scales_P), 0)
            if one.parts:
                terms_P, terms_PW, columns = _teacher_terms(part, one, where.vocab_size)
                losses_P, gradient_PW = losses_P + terms_P, gradient_PW + terms_PW
            entropy_P, entropy_PW, value_P = _target_term(part, one)
            losses_P, gradient_PW = losses_P + entropy_P, gradient_PW + entropy_PW
            if ready.num_values:
                values_PD1 = values_PD1 + one.spread(torch.cat([columns, value_P[:, None]], dim=1))
        gradient_PW = torch.where(is_read_P[:, None], gradient_PW * scales_P[:, None], 0.0)
        ctx.save_for_backward(gradient_PW.to(logits_PW.dtype))
        ctx.mark_non_differentiable(values_PD1)
        return torch.where(is_read_P, losses_P * scales_P, 0.0).to(_work_dtype(logits_PW)), scaled_values(values_PD1, scales_P)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gather the logits and use sparse_kd_loss with LossSettings(backend='torch')")
        return scale_gradient(ctx.saved_tensors[0], upstream[0]), None, None


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """This rank's logits, the id of the first, and the group."""

    z_PW: Tensor
    first_id: int
    group: Any

    def columns(self, ids: Tensor) -> Tensor:
        """Ids as columns of this rank, -1 where they are another's."""
        columns = ids.long() - self.first_id
        return torch.where((ids >= 0) & (columns >= 0) & (columns < self.z_PW.shape[1]), columns, -1)


def _teacher_terms(part: _Part, ready: Prepared, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(P,) the sum of factor T^2 L, (P, W) its gradient with respect to this rank's logits, (P, D) each part's T^2 L."""
    t, ids_PK = ready.temperature, part.columns(ready.token_ids_PK)
    z_PW = part.z_PW / t
    outside_PW = torch_positions.outside(z_PW, ids_PK, -torch.inf)[:, :-1]
    tail_lse_P = _logsumexp_over_ranks(outside_PW.logsumexp(dim=1).double(), part.group)
    z_PK1 = torch.cat([_from_owner(z_PW, ids_PK, part.group), tail_lse_P[:, None]], dim=1)
    lse_P = z_PK1.logsumexp(dim=1)
    losses_P, h_PK1, values_PD = bucket_terms(ready, vocab_size, z_PK1 - lse_P[:, None])
    within_PW = torch.where(torch.isneginf(outside_PW), 0.0, (outside_PW - tail_lse_P[:, None]).exp())
    gradient_PW = h_PK1[:, -1:] * within_PW - h_PK1.sum(dim=1, keepdim=True) * (z_PW - lse_P[:, None]).exp()
    return t * t * losses_P, t * _add_at(gradient_PW, ids_PK, h_PK1[:, :-1]), t * t * values_PD


def _target_term(part: _Part, ready: Prepared) -> tuple[Tensor, Tensor, Tensor]:
    """(P,) share * CE, 0 without a target id, (P, W) its gradient, and (P,) the CE; at temperature 1."""
    zeros_P, target_ids_P, share = torch.zeros_like(ready.scales_P), ready.target_ids_P, ready.target_share
    if not ready.has_target_share or target_ids_P is None:
        return zeros_P, torch.zeros_like(part.z_PW), zeros_P
    columns_P1 = part.columns(target_ids_P)[:, None]
    share_P = (target_ids_P >= 0).double() * (share.detach().double() if isinstance(share, Tensor) else share)
    lse_P = _logsumexp_over_ranks(part.z_PW.logsumexp(dim=1).double(), part.group)
    target_z_P = _from_owner(part.z_PW, columns_P1, part.group)[:, 0]
    gradient_PW = share_P[:, None] * (part.z_PW - lse_P[:, None]).exp()
    gradient_PW = _add_at(gradient_PW, columns_P1, -share_P[:, None])
    value_P = torch.where(share_P > 0, lse_P - target_z_P, 0.0)
    return torch.where(share_P > 0, share_P * value_P, 0.0), gradient_PW, value_P


def _work_dtype(logits_PW: Tensor) -> torch.dtype:
    return torch.float64 if logits_PW.dtype == torch.float64 else torch.float32


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
