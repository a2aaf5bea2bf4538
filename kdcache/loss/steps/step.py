"""Losses and gradients of some positions' logits, by every backend: one interface for whole logits and for chunks of them.

numba does a position in one pass. torch and Triton make a few passes over the logits (`Passes`, theirs apart), with an O(K)
part between them that they share. Nothing of that asks autograd, which does not work within an operator: h is in closed form.
The formulas are those of `kdcache.kernels.reference`; L = K + 1 lifted ids are the entries and the target id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kdcache.kernels.base import KernelInputs, Objective
from kdcache.kernels.divergences import torch_formulas as divergences
from kdcache.kernels.divergences.torch_formulas import Masses
from kdcache.loss.prepare import Prepared, check_values, to_kernel_inputs
from kdcache.loss.steps import torch_positions
from kdcache.loss.steps.torch_passes import TorchPasses
from kdcache.loss.steps.torch_positions import widened
from kdcache.loss.steps.triton_passes import TritonPasses


class PositionStep(Protocol):
    """The logits of positions to their losses and gradients; made for all P positions, called for C of them."""

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> tuple[Tensor, Tensor]:
        """(C,) float64 losses of positions start.. times their scales; the gradient of their sum, maybe in the same memory."""
        ...


def make_step(ready: Prepared, vocab_size: int) -> PositionStep:
    """The step of the backend that was chosen.

    Raises:
        LossError: as `kdcache.kernels.base.make_kernel_inputs`; on a device, values are not looked at.
    """
    if ready.backend == "numba":
        return _NumbaStep(to_kernel_inputs(ready, vocab_size), ready.objective)
    check_values(ready, vocab_size)
    return BucketStep(TritonPasses if ready.backend == "triton" else TorchPasses, ready)


@dataclass(frozen=True, slots=True, eq=False)
class _NumbaStep:
    inputs: KernelInputs
    objective: Objective

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> tuple[Tensor, Tensor]:
        part, losses_C = self.inputs.slice(start, start + len(logits_CV)), np.empty(len(logits_CV))
        # Imported on use: numba takes 0.4 s.
        from kdcache.kernels import numba_kernels as kernels

        run = kernels.position_losses_and_gradients if want_gradient else kernels.position_losses
        run(kernel_view(logits_CV), part, self.objective, losses_C, torch.get_num_threads())
        return torch.from_numpy(losses_C * part.weights_P), logits_CV


def kernel_view(logits_PV: Tensor) -> np.ndarray:
    """The same memory as the kernels take it: float32, or the bits of bfloat16 as uint16."""
    return (logits_PV.view(torch.uint16) if logits_PV.dtype == torch.bfloat16 else logits_PV).numpy()


class Passes(Protocol):
    """The logits of some positions, changed in place, and the ids that are taken out of them."""

    @property
    def logits_CV(self) -> Tensor: ...

    @property
    def ids_CK1(self) -> Tensor: ...

    def lift(self, left: float) -> Tensor:
        """(C, K+1) float32 or float64: the logits of the lifted ids, -inf where the id is -1; `left` is left there.

        NaN where the id is V or more, which is looked for beforehand on a CPU only.
        """
        ...

    def put(self, values_CK1: Tensor) -> None:
        """Write values at the lifted ids that are of the vocabulary."""
        ...

    def statistics(self, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """(C,) float64 maximum, log of the sum of exp, and sum, of the logits over T."""
        ...

    def write(self, temperature: float, per_position: list[Tensor], *, with_target_ids: bool) -> None:
        """Logits become factor * exp(z / T - top) + offset + target factor * exp(z - target top); 0 where not read.

        `per_position`: tops, factors, offsets, target tops, target factors, and whether the position is read; (C,) each.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class BucketStep:
    """See `PositionStep`; `make_passes` is a backend's."""

    make_passes: Callable[[Tensor, Tensor], Passes]
    ready: Prepared

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> tuple[Tensor, Tensor]:
        part = self.ready.slice(start, start + len(logits_CV))
        scales_C = widened(part.scales_P)
        if len(logits_CV) == 0:
            return scales_C, logits_CV
        with torch.no_grad():
            passes = self.make_passes(logits_CV.detach(), _lifted_ids(part))
            return _run(passes, part, scales_C, want_gradient), passes.logits_CV


def bucket_terms(objective: Objective, masses: Masses) -> tuple[Tensor, Tensor]:
    """(P,) losses of a divergence and (P, K+1) h = dL / dlog Q."""
    losses_P = divergences.compute(objective.divergence, masses)
    return losses_P, divergences.slopes(objective.divergence, masses)


def _lifted_ids(part: Prepared) -> Tensor:
    """(C, K+1) int32: the support, and the target id where it is wanted and outside the support, else -1."""
    ids_CK, target_ids_C = part.teacher.token_ids_PK.to(torch.int32), part.target_ids_P
    target_C = ids_CK.new_full((len(ids_CK),), -1)
    if part.objective.alpha < 1 and target_ids_C is not None:
        inside_C = (ids_CK == target_ids_C[:, None]).any(dim=1)
        target_C = torch.where(inside_C | (target_ids_C < 0), -1, target_ids_C).to(torch.int32)
    return torch.cat([ids_CK, target_C[:, None]], dim=1).contiguous()


@dataclass(slots=True, eq=False)
class _Read:
    """What one pass over the logits gives; all (C,) or (C, K+1) float64, z over T but for `z_CK1`."""

    z_CK1: Tensor
    top_C: Tensor
    tail_lse_C: Tensor
    lse_C: Tensor
    outside_z_C: Tensor

    @classmethod
    def of(cls, passes: Passes, objective: Objective) -> _Read:
        t = objective.temperature
        lifted_CK1 = widened(passes.lift(0.0 if objective.tail == "uniform" else -torch.inf))
        outside_z_C = lifted_CK1.new_zeros(len(lifted_CK1))
        if objective.tail == "uniform":
            outside_z_C = passes.statistics(t)[2] + lifted_CK1[:, -1].masked_fill(passes.ids_CK1[:, -1] < 0, 0.0) / t
            passes.put(torch.full_like(lifted_CK1, -torch.inf))
        top_C, rest_C, _ = passes.statistics(t)
        tail_lse_C = torch.logaddexp(rest_C, lifted_CK1[:, -1] / t)
        lse_C = torch.cat([lifted_CK1[:, :-1] / t, tail_lse_C[:, None]], dim=1).logsumexp(dim=1)
        return cls(lifted_CK1, top_C, tail_lse_C, lse_C, outside_z_C)


@dataclass(slots=True, eq=False)
class _Teacher:
    """alpha T^2 L, and what the gradient needs of it: alpha T h, alpha T (-H), and the constant outside the support."""

    losses_C: Tensor
    h_CK1: Tensor
    total_C: Tensor
    offset_C: Tensor

    @classmethod
    def of(cls, read: _Read, part: Prepared, vocab_size: int) -> _Teacher:
        teacher, objective = part.teacher, part.objective
        t, alpha = objective.temperature, objective.alpha
        log_q_CK1 = torch.cat([read.z_CK1[:, :-1] / t, read.tail_lse_C[:, None]], dim=1) - read.lse_C[:, None]
        if alpha == 0:
            zeros_C = torch.zeros_like(read.lse_C)
            return cls(zeros_C, torch.zeros_like(log_q_CK1), zeros_C, zeros_C)
        losses_C, h_CK1 = bucket_terms(objective, torch_positions.masses(teacher, objective.tail, vocab_size, log_q_CK1))
        total_C, offset_C = -h_CK1.sum(dim=1), torch.zeros_like(losses_C)
        if objective.tail == "uniform":
            n_C = vocab_size - (teacher.token_ids_PK >= 0).sum(dim=1)
            r_C = torch.where(n_C > 0, widened(teacher.tail_mass_P), 0.0)
            log_ratio_C = (r_C / n_C).log() - read.outside_z_C / n_C + read.lse_C
            losses_C = losses_C + torch.where(r_C > 0, r_C * log_ratio_C, 0.0)
            total_C, offset_C = total_C + r_C, -r_C / n_C.clamp_min(1)
        return cls(alpha * t * t * losses_C, alpha * t * h_CK1, alpha * t * total_C, alpha * t * offset_C)


@dataclass(slots=True, eq=False)
class _TargetTerm:
    """(1 - alpha) CE at temperature 1; share is 0 without a target id."""

    losses_C: Tensor
    share_C: Tensor
    top_C: Tensor
    lse_C: Tensor
    is_target_CK1: Tensor

    @classmethod
    def of(cls, read: _Read, passes: Passes, part: Prepared) -> _TargetTerm:
        zeros_C, objective, target_ids_C = torch.zeros_like(read.lse_C), part.objective, part.target_ids_P
        if objective.alpha == 1 or target_ids_C is None:
            return cls(zeros_C, zeros_C, read.top_C, read.lse_C, torch.zeros_like(read.z_CK1, dtype=torch.bool))
        top_C, lse_C = read.top_C, read.lse_C
        if objective.temperature != 1:
            top_C, rest_C, _ = passes.statistics(1.0)
            lse_C = torch.cat([read.z_CK1, rest_C[:, None]], dim=1).logsumexp(dim=1)
        share_C = (target_ids_C >= 0).to(lse_C.dtype) * (1 - objective.alpha)
        is_target_CK1 = (passes.ids_CK1 == target_ids_C[:, None]) & (passes.ids_CK1 >= 0)
        target_z_C = read.z_CK1.masked_fill(~is_target_CK1, 0.0).sum(dim=1)
        return cls(torch.where(share_C > 0, share_C * (lse_C - target_z_C), 0.0), share_C, top_C, lse_C, is_target_CK1)


def _run(passes: Passes, part: Prepared, scales_C: Tensor, want_gradient: bool) -> Tensor:
    """(C,) float64 losses times their scales; the logits become the gradient, or what they were."""
    read = _Read.of(passes, part.objective)
    teacher = _Teacher.of(read, part, passes.logits_CV.shape[1])
    target = _TargetTerm.of(read, passes, part)
    if want_gradient:
        _write(passes, (read, teacher, target), scales_C, part.objective.temperature)
    else:
        passes.put(read.z_CK1)
    return torch.where(scales_C > 0, (teacher.losses_C + target.losses_C) * scales_C, 0.0)


def _write(passes: Passes, parts: tuple[_Read, _Teacher, _TargetTerm], scales_C: Tensor, t: float) -> None:
    read, teacher, target = parts
    h_tail_C, is_read_C = teacher.h_CK1[:, -1], scales_C > 0
    # Where nothing is left of a position, or h is 0, the other factor may be infinite.
    within_C = torch.where(h_tail_C == 0, 0.0, h_tail_C * (read.top_C - read.tail_lse_C).exp())
    factor_C = teacher.total_C * (read.top_C - read.lse_C).exp() + within_C
    factor_C = torch.where(read.top_C == -torch.inf, 0.0, factor_C)
    target_factor_C = target.share_C * (target.top_C - target.lse_C).exp()
    target_factor_C = torch.where(target.top_C == -torch.inf, 0.0, target_factor_C)
    # The lifted ids: their share of the softmax, their h (a target id outside the support has its part of the tail's), and the
    # target id's cross entropy.
    gradient_CK1 = teacher.total_C[:, None] * (read.z_CK1 / t - read.lse_C[:, None]).exp()
    gradient_CK1[:, :-1] += teacher.h_CK1[:, :-1]
    part_C = h_tail_C * (read.z_CK1[:, -1] / t - read.tail_lse_C).exp()
    gradient_CK1[:, -1] += torch.where(h_tail_C == 0, 0.0, part_C) + teacher.offset_C
    is_target_CK1 = target.is_target_CK1.to(gradient_CK1.dtype)
    gradient_CK1 += target.share_C[:, None] * ((read.z_CK1 - target.lse_C[:, None]).exp() - is_target_CK1)
    gradient_CK1 = torch.where(is_read_C[:, None], scales_C[:, None] * gradient_CK1, 0.0)
    if t == 1:
        factor_C = factor_C + target_factor_C
    columns = [
        read.top_C,
        scales_C * factor_C,
        scales_C * teacher.offset_C,
        target.top_C,
        scales_C * target_factor_C,
        is_read_C,
    ]
    passes.write(t, columns, with_target_ids=t != 1)
    passes.put(gradient_CK1)
