"""The sparse distillation loss over given student logits.

Shape letters: P positions (rows), K entries per position (padded), V the student's vocabulary. Where the student's output
projection is at hand, `kdcache.loss.fused` does the same without ever holding [P, V] logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import Divergence, get_divergence
from kdcache.loss import arguments, operators, row_steps, torch_rows
from kdcache.loss.arguments import Options, TargetTensors
from kdcache.loss.gradients import refuse_second_derivative, scale_gradient
from kdcache.loss.row_steps import RowStep


def sparse_kd_loss(
    student_logits_PV: Tensor,
    token_ids_PK: Tensor,
    logprobs_PK: Tensor,
    tail_mass_P: Tensor,
    *,
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
    backend: str = "auto",
) -> Tensor:
    """alpha * T^2 * divergence(teacher, student at temperature T) + (1 - alpha) * CE(label), with its gradient by the logits.

    The formulas, and what each tail policy means, are in `kdcache.kernels.reference`. Values (ids, masses, weights) are
    checked on a CPU outside torch.compile; elsewhere only shapes, dtypes and devices are.

    Args:
        student_logits_PV: (P, V) float, unnormalised. Take the positions that have a record first:
            `logits.view(-1, V)[batch.flat_positions_P]`.
        token_ids_PK: (P, K) integers in [0, V), distinct within a row; -1 where there is no entry.
        logprobs_PK: (P, K) nats, normalised over the teacher's whole vocabulary; ignored at padding. float16 (of a loader with
            `logprob_dtype: float16`) gives what float32 of the same values gives.
        tail_mass_P: (P,) in [0, 1], the teacher's mass outside the support.
        divergence: a name of `kdcache.kernels.divergences.DIVERGENCES`, or one made with options: `JensenShannon(beta=0.3)`.
        target_ids_P: (P,) integers in [0, V); -100 where there is none: the CE term is 0 there, the other keeps its factor.
        tail: `bucket`, `drop`, `renormalize` or `uniform`: what the divergence does with the teacher's mass outside the
            support. All but the forward KL need the `bucket`.
        alpha: in [0, 1]; below 1 the labels must be given.
        temperature: T, above 0, of both sides; the labels' cross entropy stays at 1. Other than 1 it needs log_z_P.
        log_z_P: (P,) nats, logsumexp(l / T) over the teacher's whole vocabulary, where l are its logprobs at temperature 1.
            Then exp(l_i / T - log_z) is its probability at T. Not used at T = 1.
        weights_P: (P,) finite, >= 0. Rows of weight 0 are not read: loss and gradient are 0, NaN logits included.
        targets: `exact`: each logprob is the token's own; or `unbiased`: exp(logprob) is an unbiased estimate of its
            probability, as in sampled and threshold records, which only the forward KL with tail `drop` and `tail_aware_kl` may
            be given. Gradients are then unbiased. Values are not: sum p log p is not linear in p, so that they are above those
            of the whole distribution by a number that does not depend on the student.
        num_exact_P: (P,) integers in [0, K]: a row's entries in the columns before it are exact, the others estimates, as in
            threshold and top_k_sampled records. With targets `exact` the estimates are then left out, and tail_mass_P must be
            the mass of all that is no exact entry; with `unbiased` all entries are used. `tail_aware_kl` needs it, and takes
            tail_mass_P in this sense too.
        reduction: `mean` is sum(weight * loss) / sum(weight), 0 where all weights are 0; `sum` is sum(weight * loss);
            `none` gives (P,) weight * loss. A row without label counts in the mean: give it weight 0 to leave it out.
        backend: `numba` (CPU, float32 and bfloat16; the gradient is computed in the forward pass, once differentiable),
            `triton` (the same on a GPU; so far tested in Triton's interpreter only, and so not what `auto` takes),
            `torch` (anything, with [P, V] temporaries; differentiable twice, and by torch.func), or `auto`.

    Returns:
        A scalar, or (P,) for `none`; float64 for float64 logits, else float32.

    Raises:
        LossError: an argument is impossible, or does not fit the others.
    """
    objective = Objective(tail, alpha, get_divergence(divergence), float(temperature))
    teacher = TargetTensors(token_ids_PK, logprobs_PK, tail_mass_P, target_ids_P, weights_P, num_exact_P)
    options = Options(objective, reduction, backend, targets)
    arguments.check_options(options, teacher)
    if student_logits_PV.ndim != 2 or not student_logits_PV.is_floating_point():
        raise LossError(
            f"student_logits_PV must be floating point of the shape (positions, vocabulary), but is {student_logits_PV.dtype} "
            f"of the shape {tuple(student_logits_PV.shape)}"
        )
    arguments.check_tensors(student_logits_PV, teacher, log_z_P)
    teacher = arguments.at_temperature(arguments.used_entries(teacher, options), log_z_P, objective)
    scales_P = arguments.row_scales(teacher, reduction)
    chosen = arguments.choose_backend(backend, student_logits_PV)
    if arguments.is_transformed() and backend == "auto":
        chosen = "torch"
    if chosen == "torch":
        arguments.check_values(teacher, student_logits_PV.shape[1])
        losses_P = torch_rows.row_losses(student_logits_PV, teacher, objective)
        scaled_P = losses_P * scales_P.to(losses_P.dtype)
        return scaled_P if reduction == "none" else scaled_P.sum()
    arguments.refuse_transform("use backend='torch'")
    want_gradient = torch.is_grad_enabled() and student_logits_PV.requires_grad
    if torch.compiler.is_compiling():
        scaled_P = operators.rows(student_logits_PV, teacher, scales_P, objective, chosen, want_gradient)
        return scaled_P if reduction == "none" else scaled_P.sum()
    step = row_steps.make_step(chosen, teacher, scales_P, objective, student_logits_PV.shape[1])
    loss = _Rows.apply(student_logits_PV, step, want_gradient, reduction)
    assert isinstance(loss, Tensor)
    return loss


class _Rows(torch.autograd.Function):
    """Scaled row losses; the gradient is made in forward, where each row is in the core's cache anyway."""

    @staticmethod
    def forward(ctx: Any, logits_PV: Tensor, step: RowStep, want_gradient: bool, reduction: str) -> Tensor:
        logits_PV = logits_PV.detach()
        copy_PV = logits_PV.clone(memory_format=torch.contiguous_format) if want_gradient else logits_PV.contiguous()
        scaled_P, gradient_PV = step(copy_PV, 0, want_gradient)
        if want_gradient:
            ctx.save_for_backward(gradient_PV)
        return (scaled_P if reduction == "none" else sum_in_order(scaled_P)).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("use backend='torch'")
        (gradient_PV,) = ctx.saved_tensors
        return scale_gradient(gradient_PV, upstream[0]), None, None, None


def sum_in_order(losses_P: Tensor) -> Tensor:
    """Their sum; on a CPU in one order whatever the number of threads."""
    return torch.tensor(losses_P.numpy().sum()) if losses_P.device.type == "cpu" else losses_P.sum()
