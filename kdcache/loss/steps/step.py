"""Losses and gradients of some positions' logits, by every backend: one interface for whole logits and for chunks of them.

numba does a position in one pass. torch and Triton make a few passes over the logits (`Passes`, theirs apart), with an O(K)
part between them that they share. Nothing of that asks autograd, which does not work within an operator: h is in closed form.
The formulas are those of `kdcache.kernels.reference`; L = K + 1 lifted ids are the entries and the target id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kdcache.kernels.base import Summand, SumOutputs
from kdcache.kernels.divergences import torch_formulas as divergences
from kdcache.loss.prepare import check_values
from kdcache.loss.prepared import Prepared, to_summands
from kdcache.loss.steps import torch_positions
from kdcache.loss.steps.torch_passes import TorchPasses
from kdcache.loss.steps.torch_positions import times, widened
from kdcache.loss.steps.triton_passes import TritonPasses


class PositionStep(Protocol):
    """The logits of positions to their losses and gradients; made for all P positions, called for C of them."""

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> Found:
        """What is found of positions start..; the logits' memory may be overwritten."""
        ...


class Found(NamedTuple):
    """What a step gives for C positions.

    Attributes:
        losses_C: float64, times the positions' scales.
        gradient_CV: of their sum, maybe in the logits' memory.
        values_CD1: float64, times the scales: each part's own value and the cross entropy, see `Prepared.num_values`; None
            where they are not asked for.
    """

    losses_C: Tensor
    gradient_CV: Tensor
    values_CD1: Tensor | None = None


def make_step(ready: Prepared, vocab_size: int) -> PositionStep:
    """The step of the backend that was chosen.

    Raises:
        LossError: as `kdcache.kernels.base.make_kernel_inputs`; on a device, values are not looked at.
    """
    if ready.further:
        return _ByTemperature([make_step(replace(one, further=()), vocab_size) for one in (ready, *ready.further)])
    if ready.backend == "numba":
        return _NumbaStep(to_summands(ready, vocab_size), ready)
    check_values(ready, vocab_size)
    return BucketStep(TritonPasses if ready.backend == "triton" else TorchPasses, ready)


@dataclass(frozen=True, slots=True, eq=False)
class _ByTemperature:
    """One pass over the logits for each temperature, which cannot share their exp; the copies are of one chunk's logits."""

    steps: list[PositionStep]

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> Found:
        copies = [logits_CV.clone() for _ in self.steps[1:]]
        losses_C, gradient_CV, values_CD1 = self.steps[0](logits_CV, start, want_gradient)
        for step, copy_CV in zip(self.steps[1:], copies, strict=True):
            further = step(copy_CV, start, want_gradient)
            losses_C = losses_C + further.losses_C
            if values_CD1 is not None and further.values_CD1 is not None:
                values_CD1 = values_CD1 + further.values_CD1
            if want_gradient:
                gradient_CV += further.gradient_CV
        return Found(losses_C, gradient_CV, values_CD1)


@dataclass(frozen=True, slots=True, eq=False)
class _NumbaStep:
    summands: list[Summand]
    ready: Prepared

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> Found:
        part = [summand.slice(start, start + len(logits_CV)) for summand in self.summands]
        scales_C = part[0].inputs.weights_P
        outputs = SumOutputs(np.empty(len(logits_CV)), np.empty((len(logits_CV), len(part) + 1)))
        # Imported on use: numba takes 0.4 s.
        from kdcache.kernels import numba_kernels as kernels

        kernels.summed_losses(kernel_view(logits_CV), part, outputs, torch.get_num_threads(), want_gradient=want_gradient)
        values_CD1 = None
        if self.ready.num_values:
            # The cross entropy is a summand of its own, whose own column is empty.
            columns = [*range(len(self.ready.parts)), len(part)]
            scaled_CD1 = np.where(scales_C[:, None] > 0, outputs.values_PD1[:, columns] * scales_C[:, None], 0.0)
            values_CD1 = self.ready.slice(start, start + len(logits_CV)).spread(torch.from_numpy(scaled_CD1))
        return Found(torch.from_numpy(outputs.losses_P * scales_C), logits_CV, values_CD1)


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

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> Found:
        part = self.ready.slice(start, start + len(logits_CV))
        scales_C = widened(part.scales_P)
        if len(logits_CV) == 0:
            return Found(scales_C, logits_CV, scales_C.new_zeros(0, part.num_values + 1) if part.num_values else None)
        with torch.no_grad():
            passes = self.make_passes(logits_CV.detach(), _lifted_ids(part))
            losses_C, values_CD1 = _run(passes, part, scales_C, want_gradient)
            return Found(losses_C, passes.logits_CV, values_CD1)


class BucketTerms(NamedTuple):
    """What divergences of one temperature come to: (P,) the sum of factor * L, (P, K+1) that of factor * h, (P, D) the L."""

    losses_P: Tensor
    h_PK1: Tensor
    values_PD: Tensor


def bucket_terms(ready: Prepared, vocab_size: int, log_q_PK1: Tensor) -> BucketTerms:
    """Of the student's log masses on all entries and the tail; without a uniform tail's part, T^2 and T."""
    losses, slopes, values = [], [], []
    for part in ready.parts:
        closed_PK1 = torch_positions.close_tail(log_q_PK1, ready.token_ids_PK, part)
        masses = torch_positions.masses(part, vocab_size, closed_PK1, ready.target_ids_P)
        divergence = part.objective.divergence
        values.append(divergences.compute(divergence, masses))
        losses.append(times(part.factor, values[-1]))
        part_PK1 = divergences.slopes(divergence, masses)
        if not part.is_whole:
            unread_PK = torch_positions.is_unread(ready.token_ids_PK, part)
            part_PK1 = torch_positions.open_tail(part_PK1, log_q_PK1, closed_PK1, unread_PK)
        factor = part.factor[:, None] if isinstance(part.factor, Tensor) else part.factor
        slopes.append(times(factor, part_PK1))
    return BucketTerms(_added(losses), _added(slopes), torch.stack(values, dim=1))


def _added(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(dim=0)


def _lifted_ids(part: Prepared) -> Tensor:
    """(C, K+1) int32: the support, and the target id where it is wanted and outside the support, else -1."""
    ids_CK, target_ids_C = part.token_ids_PK.to(torch.int32), part.target_ids_P
    target_C = ids_CK.new_full((len(ids_CK),), -1)
    if part.has_target_share and target_ids_C is not None:
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
    def of(cls, passes: Passes, part: Prepared) -> _Read:
        t = part.temperature
        lifted_CK1 = widened(passes.lift(0.0 if part.is_uniform else -torch.inf))
        outside_z_C = lifted_CK1.new_zeros(len(lifted_CK1))
        if part.is_uniform:
            outside_z_C = passes.statistics(t)[2] + lifted_CK1[:, -1].masked_fill(passes.ids_CK1[:, -1] < 0, 0.0) / t
            passes.put(torch.full_like(lifted_CK1, -torch.inf))
        top_C, rest_C, _ = passes.statistics(t)
        tail_lse_C = torch.logaddexp(rest_C, lifted_CK1[:, -1] / t)
        lse_C = torch.cat([lifted_CK1[:, :-1] / t, tail_lse_C[:, None]], dim=1).logsumexp(dim=1)
        return cls(lifted_CK1, top_C, tail_lse_C, lse_C, outside_z_C)


@dataclass(slots=True, eq=False)
class _Teacher:
    """The sum of factor T^2 L, and what the gradient needs of it: T h, T (-H), and the constant outside the support.

    `values_CD`: each part's own T^2 L.
    """

    losses_C: Tensor
    h_CK1: Tensor
    total_C: Tensor
    offset_C: Tensor
    values_CD: Tensor

    @classmethod
    def of(cls, read: _Read, part: Prepared, vocab_size: int) -> _Teacher:
        t = part.temperature
        log_q_CK1 = torch.cat([read.z_CK1[:, :-1] / t, read.tail_lse_C[:, None]], dim=1) - read.lse_C[:, None]
        if not part.parts:
            zeros_C = torch.zeros_like(read.lse_C)
            return cls(zeros_C, torch.zeros_like(log_q_CK1), zeros_C, zeros_C, zeros_C[:, None][:, :0])
        losses_C, h_CK1, values_CD = bucket_terms(part, vocab_size, log_q_CK1)
        made = cls(losses_C, h_CK1, -h_CK1.sum(dim=1), torch.zeros_like(losses_C), values_CD)
        for column, one in enumerate(part.parts):
            if one.objective.tail == "uniform":
                made._add_uniform(read, part, column, vocab_size)
        values_CD = t * t * made.values_CD if part.num_values else made.values_CD
        return cls(t * t * made.losses_C, t * made.h_CK1, t * made.total_C, t * made.offset_C, values_CD)

    def _add_uniform(self, read: _Read, part: Prepared, column: int, vocab_size: int) -> None:
        """The forward KL's part outside the support, with r / n on each of the n ids there."""
        one = part.parts[column]
        n_C = vocab_size - (one.teacher.token_ids_PK >= 0).sum(dim=1)
        r_C = torch.where(n_C > 0, widened(one.teacher.tail_mass_P), 0.0)
        outside_z_C = read.outside_z_C
        unread_CK = None if one.is_whole else torch_positions.is_unread(part.token_ids_PK, one)
        if unread_CK is not None:
            outside_z_C = outside_z_C + torch.where(unread_CK, read.z_CK1[:, :-1] / part.temperature, 0.0).sum(dim=1)
        loss_C = torch.where(r_C > 0, r_C * ((r_C / n_C).log() - outside_z_C / n_C + read.lse_C), 0.0)
        share_C = times(one.factor, r_C / n_C.clamp_min(1))
        self.losses_C = self.losses_C + times(one.factor, loss_C)
        if part.num_values:
            self.values_CD[:, column] += loss_C
        self.total_C, self.offset_C = self.total_C + times(one.factor, r_C), self.offset_C - share_C
        if unread_CK is not None:
            h_CK = self.h_CK1[:, :-1] - torch.where(unread_CK, share_C[:, None], 0.0)
            self.h_CK1 = torch.cat([h_CK, self.h_CK1[:, -1:]], dim=1)


@dataclass(slots=True, eq=False)
class _TargetTerm:
    """The target ids' share of the cross entropy at temperature 1, 0 without a target id; `values_C`: the cross entropy."""

    losses_C: Tensor
    share_C: Tensor
    top_C: Tensor
    lse_C: Tensor
    is_target_CK1: Tensor
    values_C: Tensor

    @classmethod
    def of(cls, read: _Read, passes: Passes, part: Prepared) -> _TargetTerm:
        zeros_C, target_ids_C = torch.zeros_like(read.lse_C), part.target_ids_P
        if not part.has_target_share or target_ids_C is None:
            nothing_CK1 = torch.zeros_like(read.z_CK1, dtype=torch.bool)
            return cls(zeros_C, zeros_C, read.top_C, read.lse_C, nothing_CK1, zeros_C)
        top_C, lse_C = read.top_C, read.lse_C
        if part.temperature != 1:
            top_C, rest_C, _ = passes.statistics(1.0)
            lse_C = torch.cat([read.z_CK1, rest_C[:, None]], dim=1).logsumexp(dim=1)
        share = part.target_share
        share = widened(share.detach()) if isinstance(share, Tensor) else share
        share_C = (target_ids_C >= 0).to(lse_C.dtype) * share
        is_target_CK1 = (passes.ids_CK1 == target_ids_C[:, None]) & (passes.ids_CK1 >= 0)
        target_z_C = read.z_CK1.masked_fill(~is_target_CK1, 0.0).sum(dim=1)
        values_C = torch.where(share_C > 0, lse_C - target_z_C, 0.0)
        return cls(share_C * values_C, share_C, top_C, lse_C, is_target_CK1, values_C)


def _run(passes: Passes, part: Prepared, scales_C: Tensor, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """(C,) float64 losses times their scales, and the values; the logits become the gradient, or what they were."""
    read = _Read.of(passes, part)
    teacher = _Teacher.of(read, part, passes.logits_CV.shape[1])
    target = _TargetTerm.of(read, passes, part)
    if want_gradient:
        _write(passes, (read, teacher, target), scales_C, part.temperature)
    else:
        passes.put(read.z_CK1)
    losses_C = torch.where(scales_C > 0, (teacher.losses_C + target.losses_C) * scales_C, 0.0)
    if not part.num_values:
        return losses_C, None
    values_CD1 = torch.cat([teacher.values_CD, target.values_C[:, None]], dim=1)
    return losses_C, part.spread(torch.where(scales_C[:, None] > 0, values_CD1 * scales_C[:, None], 0.0))


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
