"""Row losses and gradients from a few passes over the logits, and an O(K) part between them: the way of the devices.

Shape letters: C rows, K entries per position (padded), B = K + 1 buckets, L = K + 1 lifted ids (the support and the label),
V the student's vocabulary. The formulas are those of `kdcache.kernels.reference`.

Only the passes over the rows differ between backends (`Passes`: those of `triton_passes` and `torch_passes`). Nothing here asks
autograd, which does not work within an operator: h is that of `torch_slopes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdcache.kernels.base import Objective
from kdcache.loss import torch_divergences, torch_rows, torch_slopes
from kdcache.loss.prepare import Prepared
from kdcache.loss.torch_divergences import Masses
from kdcache.loss.torch_rows import widened


class Passes(Protocol):
    """Some rows of logits, changed in place, and the ids that are taken out of them."""

    @property
    def logits_CV(self) -> Tensor: ...

    @property
    def ids_CL(self) -> Tensor: ...

    def lift(self, left: float) -> Tensor:
        """(C, L) float32 or float64: the logits of the lifted ids, -inf where the id is -1; `left` is left in their place.

        NaN where the id is V or more, which is looked for beforehand on a CPU only.
        """
        ...

    def put(self, values_CL: Tensor) -> None:
        """Write values at the lifted ids that are of the vocabulary."""
        ...

    def statistics(self, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """(C,) float64 maximum, log of the sum of exp, and sum, of what is in the rows over T."""
        ...

    def write(self, temperature: float, per_row: list[Tensor], *, with_labels: bool) -> None:
        """Rows become factor * exp(z / T - top) + offset, plus label factor * exp(z - label top); 0 where they are not read.

        `per_row`: tops, factors, offsets, label tops, label factors, and whether the row is read; (C,) each.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class BucketStep:
    """See `kdcache.loss.row_steps.RowStep`; `make_passes` is a backend's."""

    make_passes: Callable[[Tensor, Tensor], Passes]
    ready: Prepared

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> tuple[Tensor, Tensor]:
        part = self.ready.slice(start, start + len(logits_CV))
        scales_C = widened(part.scales_P)
        if len(logits_CV) == 0:
            return scales_C, logits_CV
        with torch.no_grad():
            rows = self.make_passes(logits_CV.detach(), _lifted_ids(part))
            return _run(rows, part, scales_C, want_gradient), rows.logits_CV


def bucket_terms(objective: Objective, masses: Masses) -> tuple[Tensor, Tensor]:
    """(P,) losses of a divergence and (P, B) h = dL / dlog Q."""
    losses_P = torch_divergences.compute(objective.divergence, masses)
    return losses_P, torch_slopes.compute(objective.divergence, masses)


def _lifted_ids(part: Prepared) -> Tensor:
    """(C, L) int32: the support, and the label where it is wanted and outside the support, else -1."""
    ids_CK, target_ids_C = part.teacher.token_ids_PK.to(torch.int32), part.target_ids_P
    label_C = ids_CK.new_full((len(ids_CK),), -1)
    if part.objective.alpha < 1 and target_ids_C is not None:
        inside_C = (ids_CK == target_ids_C[:, None]).any(dim=1)
        label_C = torch.where(inside_C | (target_ids_C < 0), -1, target_ids_C).to(torch.int32)
    return torch.cat([ids_CK, label_C[:, None]], dim=1).contiguous()


@dataclass(slots=True, eq=False)
class _Read:
    """What one pass over the rows gives; all (C,) or (C, L) float64, z over T but for `z_CL`."""

    z_CL: Tensor
    top_C: Tensor
    tail_lse_C: Tensor
    lse_C: Tensor
    outside_z_C: Tensor

    @classmethod
    def of(cls, rows: Passes, objective: Objective) -> _Read:
        t = objective.temperature
        lifted_CL = widened(rows.lift(0.0 if objective.tail == "uniform" else -torch.inf))
        outside_z_C = lifted_CL.new_zeros(len(lifted_CL))
        if objective.tail == "uniform":
            outside_z_C = rows.statistics(t)[2] + lifted_CL[:, -1].masked_fill(rows.ids_CL[:, -1] < 0, 0.0) / t
            rows.put(torch.full_like(lifted_CL, -torch.inf))
        top_C, rest_C, _ = rows.statistics(t)
        tail_lse_C = torch.logaddexp(rest_C, lifted_CL[:, -1] / t)
        lse_C = torch.cat([lifted_CL[:, :-1] / t, tail_lse_C[:, None]], dim=1).logsumexp(dim=1)
        return cls(lifted_CL, top_C, tail_lse_C, lse_C, outside_z_C)


@dataclass(slots=True, eq=False)
class _Teacher:
    """alpha T^2 L, and what the gradient needs of it: alpha T h, alpha T (-H), and the constant outside the support."""

    losses_C: Tensor
    h_CB: Tensor
    total_C: Tensor
    offset_C: Tensor

    @classmethod
    def of(cls, read: _Read, part: Prepared, vocab_size: int) -> _Teacher:
        teacher, objective = part.teacher, part.objective
        t, alpha = objective.temperature, objective.alpha
        log_q_CB = torch.cat([read.z_CL[:, :-1] / t, read.tail_lse_C[:, None]], dim=1) - read.lse_C[:, None]
        if alpha == 0:
            zeros_C = torch.zeros_like(read.lse_C)
            return cls(zeros_C, torch.zeros_like(log_q_CB), zeros_C, zeros_C)
        losses_C, h_CB = bucket_terms(objective, torch_rows.masses(teacher, objective.tail, vocab_size, log_q_CB))
        total_C, offset_C = -h_CB.sum(dim=1), torch.zeros_like(losses_C)
        if objective.tail == "uniform":
            n_C = vocab_size - (teacher.token_ids_PK >= 0).sum(dim=1)
            r_C = torch.where(n_C > 0, widened(teacher.tail_mass_P), 0.0)
            log_ratio_C = (r_C / n_C).log() - read.outside_z_C / n_C + read.lse_C
            losses_C = losses_C + torch.where(r_C > 0, r_C * log_ratio_C, 0.0)
            total_C, offset_C = total_C + r_C, -r_C / n_C.clamp_min(1)
        return cls(alpha * t * t * losses_C, alpha * t * h_CB, alpha * t * total_C, alpha * t * offset_C)


@dataclass(slots=True, eq=False)
class _Label:
    """(1 - alpha) CE at temperature 1; share is 0 where there is no label."""

    losses_C: Tensor
    share_C: Tensor
    top_C: Tensor
    lse_C: Tensor
    is_label_CL: Tensor

    @classmethod
    def of(cls, read: _Read, rows: Passes, part: Prepared) -> _Label:
        zeros_C, objective, target_ids_C = torch.zeros_like(read.lse_C), part.objective, part.target_ids_P
        if objective.alpha == 1 or target_ids_C is None:
            return cls(zeros_C, zeros_C, read.top_C, read.lse_C, torch.zeros_like(read.z_CL, dtype=torch.bool))
        top_C, lse_C = read.top_C, read.lse_C
        if objective.temperature != 1:
            top_C, rest_C, _ = rows.statistics(1.0)
            lse_C = torch.cat([read.z_CL, rest_C[:, None]], dim=1).logsumexp(dim=1)
        share_C = (target_ids_C >= 0).to(lse_C.dtype) * (1 - objective.alpha)
        is_label_CL = (rows.ids_CL == target_ids_C[:, None]) & (rows.ids_CL >= 0)
        label_z_C = read.z_CL.masked_fill(~is_label_CL, 0.0).sum(dim=1)
        return cls(torch.where(share_C > 0, share_C * (lse_C - label_z_C), 0.0), share_C, top_C, lse_C, is_label_CL)


def _run(rows: Passes, part: Prepared, scales_C: Tensor, want_gradient: bool) -> Tensor:
    """(C,) float64 losses times their scales; the logits become the gradient, or what they were."""
    read = _Read.of(rows, part.objective)
    teacher = _Teacher.of(read, part, rows.logits_CV.shape[1])
    label = _Label.of(read, rows, part)
    if want_gradient:
        _write(rows, (read, teacher, label), scales_C, part.objective.temperature)
    else:
        rows.put(read.z_CL)
    return torch.where(scales_C > 0, (teacher.losses_C + label.losses_C) * scales_C, 0.0)


def _write(rows: Passes, parts: tuple[_Read, _Teacher, _Label], scales_C: Tensor, t: float) -> None:
    read, teacher, label = parts
    h_tail_C, is_read_C = teacher.h_CB[:, -1], scales_C > 0
    # Where nothing is left in a row, or h is 0, the factor beside it may be infinite.
    within_C = torch.where(h_tail_C == 0, 0.0, h_tail_C * (read.top_C - read.tail_lse_C).exp())
    factor_C = teacher.total_C * (read.top_C - read.lse_C).exp() + within_C
    factor_C = torch.where(read.top_C == -torch.inf, 0.0, factor_C)
    label_factor_C = label.share_C * (label.top_C - label.lse_C).exp()
    label_factor_C = torch.where(label.top_C == -torch.inf, 0.0, label_factor_C)
    # The lifted ids: their share of the softmax, their h (a label outside the support has its part of the tail's), and the
    # label's cross entropy.
    gradient_CL = teacher.total_C[:, None] * (read.z_CL / t - read.lse_C[:, None]).exp()
    gradient_CL[:, :-1] += teacher.h_CB[:, :-1]
    part_C = h_tail_C * (read.z_CL[:, -1] / t - read.tail_lse_C).exp()
    gradient_CL[:, -1] += torch.where(h_tail_C == 0, 0.0, part_C) + teacher.offset_C
    is_label_CL = label.is_label_CL.to(gradient_CL.dtype)
    gradient_CL += label.share_C[:, None] * ((read.z_CL - label.lse_C[:, None]).exp() - is_label_CL)
    gradient_CL = torch.where(is_read_C[:, None], scales_C[:, None] * gradient_CL, 0.0)
    if t == 1:
        factor_C = factor_C + label_factor_C
    columns = [read.top_C, scales_C * factor_C, scales_C * teacher.offset_C, label.top_C, scales_C * label_factor_C, is_read_C]
    rows.write(t, columns, with_labels=t != 1)
    rows.put(gradient_CL)
