"""The sparse distillation loss over given student logits.

Where the student's output projection is at hand, `kdcache.loss.fused` does the same without ever holding [P, V] logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.divergences import Divergence
from kdcache.loss import operators, prepare
from kdcache.loss.divergence_sum import DivergenceSum
from kdcache.loss.gradients import refuse_second_derivative, scale_gradient
from kdcache.loss.prepare import DEFAULT, Asked, LossSettings
from kdcache.loss.steps import torch_positions
from kdcache.loss.steps.step import PositionStep, make_step


def sparse_kd_loss(
    student_logits_PV: Tensor,
    teacher: SoftTargets[Tensor] | None,
    *,
    divergence: str | Divergence | DivergenceSum = "forward_kl",
    alpha: float = 1.0,
    temperature: float = 1.0,
    target_ids: Tensor | None = None,
    weights: Tensor | None = None,
    settings: LossSettings = DEFAULT,
) -> Tensor:
    """alpha * T^2 * divergence(teacher, student at temperature T) + (1 - alpha) * cross entropy of the target ids.

    The defaults are right for every selection: how the teacher's entries and its tail are read follows from what `teacher` says
    they are, and a loss that would be wrong for them is refused. The formulas are in `kdcache.kernels.reference`. Values (ids,
    masses, weights) are checked on a CPU outside torch.compile; elsewhere only shapes, dtypes and devices are.

    Args:
        student_logits_PV: (P, V) float, unnormalised: `logits.flatten(0, 1)[batch.flat_positions_P]`.
        teacher: `batch.teacher`, or `SoftTargets.of(...)`; may be None where alpha is 0. float16 logprobs give what float32 of
            the same values gives.
        divergence: a name of `kdcache.kernels.divergences.DIVERGENCES`, or one made with parameters: `JensenShannon(beta=0.3)`;
            or a `DivergenceSum` of several, which share the pass over the logits.
        alpha: in [0, 1]; below 1 target_ids is required.
        temperature: T, above 0, of both sides; the cross entropy stays at 1. Other than 1 it must be one of
            `teacher.temperatures`.
        target_ids: (P,) integers in [0, V), `batch.target_ids_P`; -100 where there is none: the cross entropy is 0 there, the
            other term keeps its factor. Such a position counts in the mean: give it weight 0 to leave it out.
        weights: (P,) finite, >= 0, `batch.weights_P`; None for 1 everywhere. Positions of weight 0 are not read: loss and
            gradient are 0, NaN logits included.
        settings: tail policy, which entries are read, reduction, backend.

    Returns:
        A scalar, or (P,) for reduction `none`; float64 for float64 logits, else float32. Differentiable once; twice, and by
        torch.func, with the backend `torch`.

    Raises:
        LossError: an argument is impossible, does not fit the others, or would make a wrong loss.
    """
    if student_logits_PV.ndim != 2 or not student_logits_PV.is_floating_point():
        raise LossError(
            f"student_logits_PV must be floating point of the shape (positions, vocabulary), but is {student_logits_PV.dtype} "
            f"of the shape {tuple(student_logits_PV.shape)}: take logits.flatten(0, 1)[batch.flat_positions_P]"
        )
    asked, vocab_size = Asked(divergence, alpha, temperature, settings), student_logits_PV.shape[1]
    ready = prepare.prepare(student_logits_PV, teacher, asked, (target_ids, weights), vocab_size)
    is_summed = settings.reduction != "none"
    if ready.backend == "torch" or (settings.backend == "auto" and prepare.is_transformed()):
        prepare.check_values(ready, vocab_size)
        losses_P, values_PD1 = torch_positions.position_losses(student_logits_PV, ready)
        scaled_P = losses_P * ready.scales_P.to(losses_P.dtype)
        loss = scaled_P.sum() if is_summed else scaled_P
        return _with_values(loss, scaled_values(values_PD1, ready.scales_P), divergence, is_summed)
    prepare.refuse_transform("use LossSettings(backend='torch')")
    want_gradient = torch.is_grad_enabled() and student_logits_PV.requires_grad
    if torch.compiler.is_compiling():
        scaled_P, values_PD1 = operators.over_logits(student_logits_PV, ready, want_gradient)
        return _with_values(scaled_P.sum() if is_summed else scaled_P, values_PD1, divergence, is_summed)
    step = make_step(ready, vocab_size)
    found = _OverLogits.apply(student_logits_PV, step, want_gradient, is_summed)
    assert isinstance(found, tuple)
    loss, values_PD1 = found
    return _with_values(loss, values_PD1, divergence, is_summed)


def _with_values(loss: Tensor, values_PD1: Tensor, divergence: Any, is_summed: bool) -> Tensor:
    """The loss; a sum of divergences keeps what it is made of."""
    if isinstance(divergence, DivergenceSum):
        divergence.keep(values_PD1.sum(dim=0) if is_summed else values_PD1.T)
    return loss


def scaled_values(values_PD1: Tensor, scales_P: Tensor) -> Tensor:
    """Times the scales; 0 at a scale of 0."""
    scales_P1 = scales_P.to(values_PD1.dtype)[:, None]
    return torch.where(scales_P1 > 0, values_PD1 * scales_P1, 0.0)


class _OverLogits(torch.autograd.Function):
    """Scaled losses and values; the gradient is made in forward, where a position's logits are in the core's cache anyway."""

    @staticmethod
    def forward(ctx: Any, logits_PV: Tensor, step: PositionStep, want_gradient: bool, is_summed: bool) -> tuple[Tensor, Tensor]:
        logits_PV = logits_PV.detach()
        copy_PV = logits_PV.clone(memory_format=torch.contiguous_format) if want_gradient else logits_PV.contiguous()
        scaled_P, gradient_PV, values_PD1 = step(copy_PV, 0, want_gradient)
        values_PD1 = scaled_P.new_empty(0) if values_PD1 is None else values_PD1
        if want_gradient:
            ctx.save_for_backward(gradient_PV)
        ctx.mark_non_differentiable(values_PD1)
        return (sum_in_order(scaled_P) if is_summed else scaled_P).to(torch.float32), values_PD1

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("use LossSettings(backend='torch')")
        (gradient_PV,) = ctx.saved_tensors
        return scale_gradient(gradient_PV, upstream[0]), None, None, None


def sum_in_order(losses_P: Tensor) -> Tensor:
    """Their sum; on a CPU in one order whatever the number of threads."""
    return torch.tensor(losses_P.numpy().sum()) if losses_P.device.type == "cpu" else losses_P.sum()
