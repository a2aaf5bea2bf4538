"""The losses in plain torch: any device, float64, double backward, torch.compile. Makes [P, V] temporaries."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.base import NO_TARGET, PADDING_ID, Objective
from kdcache.kernels.divergences import torch_formulas as divergences
from kdcache.kernels.divergences.torch_formulas import Masses
from kdcache.loss.prepare import Prepared


def position_losses(logits_PV: Tensor, ready: Prepared) -> Tensor:
    """(P,) losses, not multiplied by the weights; 0 for positions of weight 0. float64 for float64 logits, else float32.

    NaN, with its gradient, for a position with an id of V or more, which is looked for beforehand on a CPU only.
    """
    ready, is_foreign_P = _without_foreign_ids(ready, logits_PV.shape[1])
    objective = ready.objective
    z_PV = logits_PV if logits_PV.dtype == torch.float64 else logits_PV.float()
    read_P = None if ready.weights_P is None else ready.weights_P > 0
    if read_P is not None:
        # Before anything else: a NaN in a position that does not count would come back as 0 * NaN.
        z_PV = z_PV.masked_fill(~read_P[:, None], 0.0)
    losses_P = z_PV.new_zeros(len(z_PV))
    if objective.alpha > 0:
        losses_P = losses_P + objective.alpha * _teacher_term(z_PV, ready.teacher, objective)
    if objective.alpha < 1 and ready.target_ids_P is not None:
        losses_P = losses_P + (1 - objective.alpha) * _cross_entropy(z_PV, ready.target_ids_P)
    losses_P = losses_P * torch.where(is_foreign_P, torch.nan, 1.0).to(losses_P.dtype)
    return losses_P if read_P is None else torch.where(read_P, losses_P, 0.0)


def _without_foreign_ids(ready: Prepared, vocab_size: int) -> tuple[Prepared, Tensor]:
    """Ids and target ids beyond the vocabulary become padding, and (P,) whether a position had one; gather would read past
    its logits."""
    ids_PK, target_ids_P = ready.teacher.token_ids_PK, ready.target_ids_P
    is_foreign_P = (ids_PK >= vocab_size).any(dim=1)
    ids_PK = ids_PK.masked_fill(ids_PK >= vocab_size, PADDING_ID)
    if target_ids_P is not None:
        is_foreign_P = is_foreign_P | (target_ids_P >= vocab_size)
        target_ids_P = target_ids_P.masked_fill(target_ids_P >= vocab_size, NO_TARGET)
    return replace(ready, teacher=replace(ready.teacher, token_ids_PK=ids_PK), target_ids_P=target_ids_P), is_foreign_P


def _teacher_term(z_PV: Tensor, teacher: SoftTargets[Tensor], objective: Objective) -> Tensor:
    if objective.temperature != 1:
        z_PV = z_PV / objective.temperature
    lse_P = torch.logsumexp(z_PV, dim=1)
    # Without a tail bucket nothing looks at the student's mass there, and a pass over the logits is spared.
    log_q_PK1 = log_student(z_PV, lse_P, teacher.token_ids_PK, with_tail=objective.tail == "bucket")
    both = masses(teacher, objective.tail, z_PV.shape[1], log_q_PK1)
    # In float64, all of it a few numbers per position: near convergence these are small differences of large numbers.
    losses_P = divergences.compute(objective.divergence, both).to(z_PV.dtype)
    if objective.tail == "uniform":
        losses_P = losses_P + _uniform_tail(z_PV, lse_P, teacher)
    return losses_P * objective.temperature**2


def masses(teacher: SoftTargets[Tensor], tail: str, vocab_size: int, log_q_PK1: Tensor) -> Masses:
    """The teacher's buckets under a tail policy, with the student's."""
    is_exact_PK, is_estimate_PK1 = exact_entries(teacher), None
    if teacher.num_exact_P is not None:
        is_estimate_PK1 = torch.nn.functional.pad((teacher.token_ids_PK >= 0) & ~is_exact_PK, (0, 1))
    return Masses.of(log_teacher(teacher, tail, vocab_size), log_q_PK1, is_estimate_PK1)


def exact_entries(teacher: SoftTargets[Tensor]) -> Tensor:
    """(P, K) which columns hold an entry that is exact."""
    is_entry_PK = teacher.token_ids_PK >= 0
    if teacher.num_exact_P is None:
        return is_entry_PK
    columns_K = torch.arange(is_entry_PK.shape[1], device=is_entry_PK.device)
    return is_entry_PK & (columns_K < teacher.num_exact_P[:, None])


def log_teacher(teacher: SoftTargets[Tensor], tail: str, vocab_size: int) -> Tensor:
    """(P, K+1) log masses under a tail policy, -inf for 0, the tail last; constants."""
    stored_PK = teacher.token_ids_PK >= 0
    log_p_PK = widened(teacher.logprobs_PK.detach()).masked_fill(~stored_PK, -torch.inf)
    log_tail_P = log_p_PK.new_full((len(log_p_PK),), -torch.inf)
    if tail == "renormalize":
        mass_P1 = log_p_PK.exp().sum(dim=1, keepdim=True)
        log_p_PK = log_p_PK - torch.where(mass_P1 > 0, mass_P1, 1.0).log()
    if tail == "bucket":
        has_tail_P = exact_entries(teacher).sum(dim=1) < vocab_size
        log_tail_P = torch.where(has_tail_P, widened(teacher.tail_mass_P.detach()), 0.0).log()
    return torch.cat([log_p_PK, log_tail_P[:, None]], dim=1)


def log_student(z_PV: Tensor, lse_P: Tensor, token_ids_PK: Tensor, *, with_tail: bool) -> Tensor:
    """(P, K+1) log masses, -inf for 0, the tail last."""
    z_PK = z_PV.gather(1, token_ids_PK.long().clamp_min(0)).masked_fill(token_ids_PK < 0, -torch.inf)
    tail_lse_P = _tail_logsumexp(z_PV, token_ids_PK) if with_tail else torch.full_like(lse_P, -torch.inf)
    return widened(torch.cat([z_PK, tail_lse_P[:, None]], dim=1)) - widened(lse_P)[:, None]


def widened(tensor: Tensor) -> Tensor:
    """In float64 where the device has it."""
    # Apple's GPUs have no float64.
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _tail_logsumexp(z_PV: Tensor, token_ids_PK: Tensor) -> Tensor:
    """(P,) logsumexp over the ids outside the support; -inf without a gradient where the student can give none of them."""
    outside_PV = outside(z_PV, token_ids_PK, -torch.inf)
    unreachable_P = torch.isneginf(outside_PV.detach().amax(dim=1))
    # The derivative of logsumexp is NaN where everything is -inf.
    lse_P = torch.logsumexp(outside_PV.masked_fill(unreachable_P[:, None], 0.0), dim=1)
    return lse_P.masked_fill(unreachable_P, -torch.inf)


def _uniform_tail(z_PV: Tensor, lse_P: Tensor, teacher: SoftTargets[Tensor]) -> Tensor:
    """sum over the n ids outside the support of r/n log(r/n / q)."""
    n_P = (z_PV.shape[1] - (teacher.token_ids_PK >= 0).sum(dim=1)).to(z_PV.dtype)
    r_P = torch.where(n_P > 0, teacher.tail_mass_P.detach().to(z_PV.dtype), 0.0)
    n_P, log_r_P = n_P.clamp_min(1), torch.where(r_P > 0, r_P, 1.0).log()
    mean_z_P = outside(z_PV.masked_fill((r_P == 0)[:, None], 0.0), teacher.token_ids_PK, 0.0).sum(dim=1) / n_P
    return torch.where(r_P > 0, r_P * (log_r_P - n_P.log() - mean_z_P + lse_P), 0.0)


def outside(z_PV: Tensor, token_ids_PK: Tensor, value: float) -> Tensor:
    """(P, V + 1) logits with `value` on the support, and in the last column, where padding may write."""
    wide_PV = torch.cat([z_PV, z_PV.new_full((len(z_PV), 1), value)], dim=1)
    return wide_PV.scatter(1, torch.where(token_ids_PK >= 0, token_ids_PK, z_PV.shape[1]).long(), value)


def _cross_entropy(z_PV: Tensor, target_ids_P: Tensor) -> Tensor:
    has_target_P = target_ids_P >= 0
    target_z_P = z_PV.gather(1, target_ids_P.long().clamp_min(0)[:, None])[:, 0]
    return torch.where(has_target_P, torch.logsumexp(z_PV, dim=1) - target_z_P, 0.0)
