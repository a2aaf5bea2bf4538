"""The losses in plain torch: any device, float64, double backward, torch.compile. Makes [P, V] temporaries."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.base import NO_TARGET, PADDING_ID
from kdcache.kernels.divergences import torch_formulas as divergences
from kdcache.kernels.divergences.torch_formulas import Masses
from kdcache.loss.prepared import Prepared, ReadPart


def position_losses(logits_PV: Tensor, ready: Prepared) -> tuple[Tensor, Tensor]:
    """(P,) losses, not multiplied by the weights, 0 for positions of weight 0; (P, values + 1) detached values, see `Prepared`.

    float64 for float64 logits, else float32. NaN, with its gradient, for a position with an id of V or more, which is looked
    for beforehand on a CPU only.
    """
    losses_P, values_PD1 = _at_one_temperature(logits_PV, ready)
    for other in ready.further:
        further_P, further_PD1 = _at_one_temperature(logits_PV, other)
        losses_P, values_PD1 = losses_P + further_P, values_PD1 + further_PD1
    return losses_P, values_PD1


def _at_one_temperature(logits_PV: Tensor, ready: Prepared) -> tuple[Tensor, Tensor]:
    ready, is_foreign_P = _without_foreign_ids(ready, logits_PV.shape[1])
    z_PV = logits_PV if logits_PV.dtype == torch.float64 else logits_PV.float()
    read_P = None if ready.weights_P is None else ready.weights_P > 0
    if read_P is not None:
        # Before anything else: a NaN in a position that does not count would come back as 0 * NaN.
        z_PV = z_PV.masked_fill(~read_P[:, None], 0.0)
    losses_P, columns = z_PV.new_zeros(len(z_PV)), []
    if ready.parts:
        columns = _teacher_terms(z_PV, ready)
        for term_P, part in zip(columns, ready.parts, strict=True):
            losses_P = losses_P + times(part.factor, term_P)
    cross_entropy_P = torch.zeros_like(losses_P)
    if ready.has_target_share:
        assert ready.target_ids_P is not None
        cross_entropy_P = _cross_entropy(z_PV, ready.target_ids_P)
        losses_P = losses_P + times(ready.target_share, cross_entropy_P)
        if isinstance(ready.target_share, Tensor):
            cross_entropy_P = torch.where(ready.target_share > 0, cross_entropy_P, 0.0)
    losses_P = losses_P * torch.where(is_foreign_P, torch.nan, 1.0).to(losses_P.dtype)
    losses_P = losses_P if read_P is None else torch.where(read_P, losses_P, 0.0)
    if not ready.num_values:
        return losses_P, losses_P.new_zeros(len(losses_P), 1, dtype=torch.float32)
    values_PD1 = widened(torch.stack([*columns, cross_entropy_P], dim=1).detach())
    return losses_P, ready.spread(values_PD1 if read_P is None else torch.where(read_P[:, None], values_PD1, 0.0))


def times(factor: float | Tensor, values_P: Tensor) -> Tensor:
    """factor * values; 0 where the factor is 0, also where the value is not finite."""
    if not isinstance(factor, Tensor):
        return values_P if factor == 1 else factor * values_P if factor else torch.zeros_like(values_P)
    factor = factor.detach().to(values_P.dtype)
    return torch.where(factor == 0, 0.0, factor * values_P.masked_fill(factor == 0, 0.0))


def _without_foreign_ids(ready: Prepared, vocab_size: int) -> tuple[Prepared, Tensor]:
    """Ids and target ids beyond the vocabulary become padding, and (P,) whether a position had one; gather would read past
    its logits."""
    ids_PK, target_ids_P = ready.token_ids_PK, ready.target_ids_P
    is_foreign_P = (ids_PK >= vocab_size).any(dim=1)
    parts = []
    for part in ready.parts:
        own_PK = part.teacher.token_ids_PK
        own_PK = own_PK.masked_fill(own_PK >= vocab_size, PADDING_ID)
        parts.append(replace(part, teacher=replace(part.teacher, token_ids_PK=own_PK)))
    if target_ids_P is not None and ready.has_target_share:
        is_foreign_P = is_foreign_P | (target_ids_P >= vocab_size)
        target_ids_P = target_ids_P.masked_fill(target_ids_P >= vocab_size, NO_TARGET)
    ids_PK = ids_PK.masked_fill(ids_PK >= vocab_size, PADDING_ID)
    return replace(ready, parts=tuple(parts), token_ids_PK=ids_PK, target_ids_P=target_ids_P), is_foreign_P


def _teacher_terms(z_PV: Tensor, ready: Prepared) -> list[Tensor]:
    """(P,) T^2 times each part's divergence; what is of order V is done once for all."""
    t, ids_PK = ready.temperature, ready.token_ids_PK
    if t != 1:
        z_PV = z_PV / t
    lse_P = torch.logsumexp(z_PV, dim=1)
    # Without a tail bucket nothing looks at the student's mass there, and a pass over the logits is spared.
    with_tail = any(part.objective.tail == "bucket" for part in ready.parts)
    log_q_PK1 = log_student(z_PV, lse_P, ids_PK, with_tail=with_tail)
    outside_z_P = _sum_outside(z_PV, ids_PK) if ready.is_uniform else lse_P
    terms = []
    for part in ready.parts:
        both = masses(part, z_PV.shape[1], close_tail(log_q_PK1, ids_PK, part), ready.target_ids_P)
        # In float64, all of it a few numbers per position: near convergence these are small differences of large numbers.
        losses_P = divergences.compute(part.objective.divergence, both).to(z_PV.dtype)
        if part.objective.tail == "uniform":
            unread_PK = is_unread(ids_PK, part)
            own_z_P = outside_z_P + _gathered(z_PV, ids_PK, unread_PK).sum(dim=1)
            losses_P = losses_P + _uniform_tail(own_z_P, lse_P, part.teacher, z_PV.shape[1])
        terms.append(losses_P * t**2)
    return terms


def is_unread(ids_PK: Tensor, part: ReadPart) -> Tensor:
    """(P, K) which entries of other parts this one counts to its tail."""
    return (ids_PK >= 0) & (part.teacher.token_ids_PK < 0)


def close_tail(log_q_PK1: Tensor, ids_PK: Tensor, part: ReadPart) -> Tensor:
    """(P, K+1) the student's log masses as one part has them: what it does not read is in the tail."""
    if part.is_whole:
        return log_q_PK1
    unread_PK1 = torch.nn.functional.pad(is_unread(ids_PK, part), (0, 1))
    inside_PK1 = unread_PK1.clone()
    inside_PK1[:, -1] = True
    tail_PK1 = log_q_PK1.masked_fill(~inside_PK1, -torch.inf)
    unreachable_P = torch.isneginf(tail_PK1.detach().amax(dim=1))
    # The derivative of logsumexp is NaN where everything is -inf.
    tail_P = tail_PK1.masked_fill(unreachable_P[:, None], 0.0).logsumexp(dim=1).masked_fill(unreachable_P, -torch.inf)
    return torch.cat([log_q_PK1.masked_fill(unread_PK1, -torch.inf)[:, :-1], tail_P[:, None]], dim=1)


def open_tail(h_PK1: Tensor, log_q_PK1: Tensor, closed_PK1: Tensor, unread_PK: Tensor) -> Tensor:
    """(P, K+1) h with the tail's part shared among what `close_tail` put into it, as the masses are."""
    log_tail_P1 = closed_PK1[:, -1:]
    share_PK1 = torch.where(torch.isneginf(log_tail_P1), 0.0, (log_q_PK1 - log_tail_P1).exp())
    shared_PK1 = torch.where(h_PK1[:, -1:] == 0, 0.0, h_PK1[:, -1:] * share_PK1)
    tail_P1 = torch.where(torch.isneginf(log_tail_P1), h_PK1[:, -1:], shared_PK1[:, -1:])
    return torch.cat([torch.where(unread_PK, shared_PK1[:, :-1], h_PK1[:, :-1]), tail_P1], dim=1)


def masses(part: ReadPart, vocab_size: int, log_q_PK1: Tensor, target_ids_P: Tensor | None) -> Masses:
    """The teacher's buckets under a tail policy, with the student's."""
    teacher, is_estimate_PK1, is_target_PK1 = part.teacher, None, None
    if teacher.num_exact_P is not None:
        is_estimate_PK1 = torch.nn.functional.pad((teacher.token_ids_PK >= 0) & ~exact_entries(teacher), (0, 1))
    if target_ids_P is not None and part.objective.divergence.requirements.target:
        is_target_PK = (teacher.token_ids_PK == target_ids_P[:, None]) & (teacher.token_ids_PK >= 0)
        in_tail_P1 = (target_ids_P >= 0)[:, None] & ~is_target_PK.any(dim=1, keepdim=True)
        is_target_PK1 = torch.cat([is_target_PK, in_tail_P1], dim=1)
    log_p_PK1 = log_teacher(teacher, part.objective.tail, vocab_size)
    return Masses.of(log_p_PK1, log_q_PK1, is_estimate_PK1, is_target_PK1)


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


def _uniform_tail(outside_z_P: Tensor, lse_P: Tensor, teacher: SoftTargets[Tensor], vocab_size: int) -> Tensor:
    """sum over the n ids outside the support of r/n log(r/n / q)."""
    n_P = (vocab_size - (teacher.token_ids_PK >= 0).sum(dim=1)).to(lse_P.dtype)
    r_P = torch.where(n_P > 0, teacher.tail_mass_P.detach().to(lse_P.dtype), 0.0)
    n_P, log_r_P = n_P.clamp_min(1), torch.where(r_P > 0, r_P, 1.0).log()
    mean_z_P = outside_z_P.masked_fill(r_P == 0, 0.0) / n_P
    return torch.where(r_P > 0, r_P * (log_r_P - n_P.log() - mean_z_P + lse_P), 0.0)


def _sum_outside(z_PV: Tensor, token_ids_PK: Tensor) -> Tensor:
    """(P,) sum of the logits outside the support."""
    return outside(z_PV, token_ids_PK, 0.0).sum(dim=1)


def _gathered(z_PV: Tensor, ids_PK: Tensor, which_PK: Tensor) -> Tensor:
    """(P, K) logits of some of the ids, 0 elsewhere."""
    return torch.where(which_PK, z_PV.gather(1, ids_PK.long().clamp_min(0)), 0.0)


def outside(z_PV: Tensor, token_ids_PK: Tensor, value: float) -> Tensor:
    """(P, V + 1) logits with `value` on the support, and in the last column, where padding may write."""
    wide_PV = torch.cat([z_PV, z_PV.new_full((len(z_PV), 1), value)], dim=1)
    return wide_PV.scatter(1, torch.where(token_ids_PK >= 0, token_ids_PK, z_PV.shape[1]).long(), value)


def _cross_entropy(z_PV: Tensor, target_ids_P: Tensor) -> Tensor:
    has_target_P = target_ids_P >= 0
    target_z_P = z_PV.gather(1, target_ids_P.long().clamp_min(0)[:, None])[:, 0]
    return torch.where(has_target_P, torch.logsumexp(z_PV, dim=1) - target_z_P, 0.0)
