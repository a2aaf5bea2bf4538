"""The row losses and gradients on a GPU: two Triton passes over the logits, and the O(K) part in torch between them.

Shape letters: C rows, K entries per position (padded), B = K + 1 buckets, L = K + 1 lifted ids (the support and the label),
V the student's vocabulary. The formulas are those of `kdcache.kernels.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.kernels.base import Objective
from kdcache.loss import torch_divergences, torch_rows
from kdcache.loss.arguments import TargetTensors
from kdcache.loss.torch_divergences import Masses


@dataclass(frozen=True, slots=True, eq=False)
class TritonStep:
    """See `kdcache.loss.row_steps.RowStep`."""

    targets: TargetTensors
    objective: Objective
    scales_P: Tensor

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> tuple[Tensor, Tensor]:
        part, scales_C = self.targets.rows(start, start + len(logits_CV)), self.scales_P[start : start + len(logits_CV)]
        rows = _Rows(logits_CV, _lifted_ids(part, self.objective.alpha))
        if len(logits_CV):
            losses_C = _run(rows, part, scales_C, self.objective, want_gradient)
        else:
            losses_C = scales_C
        return losses_C, logits_CV


def bucket_terms(objective: Objective, log_p_PB: Tensor, log_q_PB: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) losses of a divergence and (P, B) h = dL / dlog Q, by autograd on these few numbers."""
    with torch.enable_grad():
        log_q_PB = log_q_PB.detach().requires_grad_()
        losses_P = torch_divergences.compute(objective.divergence, Masses.of(log_p_PB, log_q_PB))
        (h_PB,) = torch.autograd.grad(losses_P.sum(), log_q_PB)
    return losses_P.detach(), h_PB


def _lifted_ids(targets: TargetTensors, alpha: float) -> Tensor:
    """(C, L) int32: the support, and the label where it is wanted and outside the support, else -1."""
    ids_CK = targets.token_ids_PK.to(torch.int32)
    label_C = ids_CK.new_full((len(ids_CK),), -1)
    if alpha < 1 and targets.labels_P is not None:
        inside_C = (ids_CK == targets.labels_P[:, None]).any(dim=1)
        label_C = torch.where(inside_C | (targets.labels_P < 0), -1, targets.labels_P).to(torch.int32)
    return torch.cat([ids_CK, label_C[:, None]], dim=1).contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The kernels on some rows of logits."""

    logits_CV: Tensor
    ids_CL: Tensor

    def lift(self, left: float) -> Tensor:
        """(C, L) float32: the logits of the lifted ids, -inf where the id is -1."""
        kernels = _kernels()
        lifted_CL = torch.empty(self.ids_CL.shape, dtype=torch.float32, device=self.ids_CL.device)
        kernels.lift[(len(lifted_CL),)](self.logits_CV, self.logits_CV.stride(0), self.ids_CL, lifted_CL, left, **self._sizes())
        return lifted_CL

    def put(self, values_CL: Tensor) -> None:
        _kernels().put[(len(values_CL),)](
            self.logits_CV, self.logits_CV.stride(0), self.ids_CL, values_CL.float().contiguous(), **self._sizes()
        )

    def statistics(self, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """(C,) float64 maximum, log of the sum of exp, and sum, of what is in the rows over T."""
        kernels, num_rows = _kernels(), len(self.logits_CV)
        outputs = [torch.empty(num_rows, dtype=torch.float32, device=self.ids_CL.device) for _ in range(3)]
        kernels.tail_statistics[(num_rows,)](
            self.logits_CV, self.logits_CV.stride(0), 1 / temperature, *outputs, self.logits_CV.shape[1], **self._block()
        )
        top_C, sum_C, total_C = (output.double() for output in outputs)
        return top_C, top_C + sum_C.log(), total_C

    def write(self, temperature: float, per_row: list[Tensor], *, with_labels: bool) -> None:
        """`per_row`: tops, factors, offsets, label tops, label factors, and whether the row is read."""
        kernels = _kernels()
        kernels.write_gradient[(len(self.logits_CV),)](
            self.logits_CV,
            self.logits_CV.stride(0),
            1 / temperature,
            *[column.float().contiguous() for column in per_row],
            self.logits_CV.shape[1],
            WITH_LABELS=with_labels,
            **self._block(),
        )

    def _sizes(self) -> dict[str, Any]:
        num_ids = self.ids_CL.shape[1]
        return {"NUM_IDS": num_ids, "BLOCK_IDS": 1 << (num_ids - 1).bit_length()}

    def _block(self) -> dict[str, Any]:
        kernels = _kernels()
        return {"BLOCK": kernels.BLOCK_SIZE, "num_warps": kernels.NUM_WARPS}


@dataclass(slots=True, eq=False)
class _Read:
    """What one pass over the rows gives; all (C,) or (C, L) float64, z over T but for `z_CL`."""

    z_CL: Tensor
    top_C: Tensor
    tail_lse_C: Tensor
    lse_C: Tensor
    outside_z_C: Tensor

    @classmethod
    def of(cls, rows: _Rows, objective: Objective) -> _Read:
        t = objective.temperature
        lifted_CL = rows.lift(0.0 if objective.tail == "uniform" else -torch.inf)
        outside_z_C = lifted_CL.new_zeros(len(lifted_CL))
        if objective.tail == "uniform":
            outside_z_C = rows.statistics(t)[2] + lifted_CL[:, -1].masked_fill(rows.ids_CL[:, -1] < 0, 0.0) / t
            rows.put(torch.full_like(lifted_CL, -torch.inf))
        z_CL = lifted_CL.double()
        top_C, rest_C, _ = rows.statistics(t)
        tail_lse_C = torch.logaddexp(rest_C, z_CL[:, -1] / t)
        lse_C = torch.cat([z_CL[:, :-1] / t, tail_lse_C[:, None]], dim=1).logsumexp(dim=1)
        return cls(z_CL, top_C, tail_lse_C, lse_C, outside_z_C)


@dataclass(slots=True, eq=False)
class _Teacher:
    """alpha T^2 L, and what the gradient needs of it: alpha T h, alpha T (-H), and the constant outside the support."""

    losses_C: Tensor
    h_CB: Tensor
    total_C: Tensor
    offset_C: Tensor

    @classmethod
    def of(cls, read: _Read, targets: TargetTensors, objective: Objective, vocab_size: int) -> _Teacher:
        t, alpha = objective.temperature, objective.alpha
        log_q_CB = torch.cat([read.z_CL[:, :-1] / t, read.tail_lse_C[:, None]], dim=1) - read.lse_C[:, None]
        if alpha == 0:
            zeros_C = torch.zeros_like(read.lse_C)
            return cls(zeros_C, torch.zeros_like(log_q_CB), zeros_C, zeros_C)
        log_p_CB = torch_rows.log_teacher(targets, objective.tail, vocab_size)
        losses_C, h_CB = bucket_terms(objective, log_p_CB, log_q_CB)
        total_C, offset_C = -h_CB.sum(dim=1), torch.zeros_like(losses_C)
        if objective.tail == "uniform":
            n_C = vocab_size - (targets.token_ids_PK >= 0).sum(dim=1)
            r_C = torch.where(n_C > 0, targets.tail_mass_P.double(), 0.0)
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
    def of(cls, read: _Read, rows: _Rows, targets: TargetTensors, objective: Objective) -> _Label:
        zeros_C = torch.zeros_like(read.lse_C)
        if objective.alpha == 1 or targets.labels_P is None:
            return cls(zeros_C, zeros_C, read.top_C, read.lse_C, torch.zeros_like(read.z_CL, dtype=torch.bool))
        top_C, lse_C = read.top_C, read.lse_C
        if objective.temperature != 1:
            top_C, rest_C, _ = rows.statistics(1.0)
            lse_C = torch.cat([read.z_CL, rest_C[:, None]], dim=1).logsumexp(dim=1)
        share_C = (targets.labels_P >= 0).double() * (1 - objective.alpha)
        is_label_CL = (rows.ids_CL == targets.labels_P[:, None]) & (rows.ids_CL >= 0)
        label_z_C = read.z_CL.masked_fill(~is_label_CL, 0.0).sum(dim=1)
        return cls(torch.where(share_C > 0, share_C * (lse_C - label_z_C), 0.0), share_C, top_C, lse_C, is_label_CL)


def _run(rows: _Rows, targets: TargetTensors, scales_C: Tensor, objective: Objective, want_gradient: bool) -> Tensor:
    """(C,) float64 losses times their scales; the logits become the gradient, or what they were."""
    read = _Read.of(rows, objective)
    teacher = _Teacher.of(read, targets, objective, rows.logits_CV.shape[1])
    label = _Label.of(read, rows, targets, objective)
    if want_gradient:
        _write(rows, (read, teacher, label), scales_C, objective.temperature)
    else:
        rows.put(read.z_CL)
    return torch.where(scales_C > 0, (teacher.losses_C + label.losses_C) * scales_C, 0.0)


def _write(rows: _Rows, parts: tuple[_Read, _Teacher, _Label], scales_C: Tensor, t: float) -> None:
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
    gradient_CL += label.share_C[:, None] * ((read.z_CL - label.lse_C[:, None]).exp() - label.is_label_CL.double())
    gradient_CL = torch.where(is_read_C[:, None], scales_C[:, None] * gradient_CL, 0.0)
    if t == 1:
        factor_C = factor_C + label_factor_C
    columns = [read.top_C, scales_C * factor_C, scales_C * teacher.offset_C, label.top_C, scales_C * label_factor_C, is_read_C]
    rows.write(t, columns, with_labels=t != 1)
    rows.put(gradient_CL)


def _kernels() -> Any:
    from kdcache.kernels import _triton

    return _triton
