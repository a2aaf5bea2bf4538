"""Both losses as operators of torch, so that torch.compile keeps one graph around kernels that it cannot see into.

Shape letters: P positions (rows), K entries per position (padded), V the student's vocabulary, H hidden.

Used while torch.compile traces; eager calls go to the autograd functions, which cost less. An operator gives the loss and its
gradients as outputs, and its backward multiplies them by the upstream. Values of the targets are checked when the graph runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import DIVERGENCES
from kdcache.loss.arguments import TargetTensors
from kdcache.loss.chunks import Head, Projection, loss_dtype, run_chunks
from kdcache.loss.gradients import refuse_second_derivative, scale_gradient
from kdcache.loss.row_steps import make_step


def rows(
    logits_PV: Tensor, targets: TargetTensors, scales_P: Tensor, objective: Objective, backend: str, want_gradient: bool
) -> Tensor:
    """(P,) float32 losses times their scales."""
    words, numbers = _encode(objective)
    return _rows(logits_PV, *_tensors(targets), scales_P, f"{words} {backend}", numbers, want_gradient)[0]


def fused(
    projection: Projection,
    targets: TargetTensors,
    scales_P: Tensor,
    objective: Objective,
    how: tuple[str, int, tuple[bool, ...]],
) -> Tensor:
    """The scaled sum of the losses; `how` is backend, chunk size, and which gradients are wanted."""
    (words, numbers), (backend, chunk_size, wanted), head = _encode(objective), how, projection.head
    student = (projection.hidden_PH, projection.weight_VH, projection.bias_V)
    numbers = [head.logit_scale, head.softcap or 0.0, float(head.float32_logits), *numbers]
    return _fused(*student, *_tensors(targets), scales_P, f"{words} {backend}", numbers, chunk_size, list(wanted))[0]


def _tensors(targets: TargetTensors) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    teacher = targets.token_ids_PK, targets.logprobs_PK, targets.tail_mass_P
    return *teacher, targets.target_ids_P, targets.weights_P, targets.num_exact_P


def _encode(objective: Objective) -> tuple[str, list[float]]:
    """In types that an operator may take: it has no lists of strings."""
    numbers = [objective.alpha, objective.temperature, *objective.divergence.parameters]
    return f"{objective.tail} {objective.divergence.name}", numbers


def _decode(words: str, numbers: list[float]) -> tuple[Objective, str]:
    """The objective, and the backend."""
    tail, divergence, backend = words.split()
    alpha, temperature, *parameters = numbers
    return Objective(tail, alpha, DIVERGENCES[divergence](*parameters), temperature), backend


@torch.library.custom_op("kdcache::sparse_kd_rows", mutates_args=())
def _rows(
    logits_PV: Tensor,
    token_ids_PK: Tensor,
    logprobs_PK: Tensor,
    tail_mass_P: Tensor,
    target_ids_P: Tensor | None,
    weights_P: Tensor | None,
    num_exact_P: Tensor | None,
    scales_P: Tensor,
    words: str,
    numbers: list[float],
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The losses, and the gradient of their sum by the logits: empty where not wanted."""
    targets = TargetTensors(token_ids_PK, logprobs_PK, tail_mass_P, target_ids_P, weights_P, num_exact_P)
    objective, backend = _decode(words, numbers)
    step = make_step(backend, targets, scales_P, objective, logits_PV.shape[1])
    losses_P, gradient_PV = step(logits_PV.detach().clone(memory_format=torch.contiguous_format), 0, want_gradient)
    return losses_P.float(), gradient_PV if want_gradient else logits_PV.new_empty(0)


def _fake_rows(logits_PV: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = logits_PV.shape if rest[-1] else (0,)
    return logits_PV.new_empty(len(logits_PV), dtype=torch.float32), logits_PV.new_empty(shape)


def _keep_outputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_inputs, ctx.wanted = len(inputs), inputs[-1]
    ctx.save_for_backward(*output[1:])


def _scale_rows(ctx: Any, upstream_P: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("use backend='torch'")
    return (scale_gradient(ctx.saved_tensors[0], upstream_P), *[None] * (ctx.num_inputs - 1))


_rows.register_fake(_fake_rows)
_rows.register_autograd(_scale_rows, setup_context=_keep_outputs)


@torch.library.custom_op("kdcache::fused_sparse_kd", mutates_args=())
def _fused(
    hidden_PH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    token_ids_PK: Tensor,
    logprobs_PK: Tensor,
    tail_mass_P: Tensor,
    target_ids_P: Tensor | None,
    weights_P: Tensor | None,
    num_exact_P: Tensor | None,
    scales_P: Tensor,
    words: str,
    numbers: list[float],
    chunk_size: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients by hidden, weight and bias: empty where not wanted."""
    targets = TargetTensors(token_ids_PK, logprobs_PK, tail_mass_P, target_ids_P, weights_P, num_exact_P)
    objective, backend = _decode(words, numbers[3:])
    step = make_step(backend, targets, scales_P, objective, len(weight_VH))
    projection = Projection(hidden_PH, weight_VH, bias_V, Head(numbers[0], numbers[1] or None, bool(numbers[2])))
    loss, gradients = run_chunks(projection, step, tuple(wanted), chunk_size)
    hidden, weight, bias = (hidden_PH.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return loss, hidden, weight, bias


def _fake_fused(hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    loss = hidden_PH.new_empty((), dtype=loss_dtype(hidden_PH.dtype))
    shapes = (hidden_PH.shape, weight_VH.shape, () if bias_V is None else bias_V.shape)
    return (loss, *[hidden_PH.new_empty(shape if want else (0,)) for shape, want in zip(shapes, rest[-1], strict=True)])


def _scale_all(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("use sparse_kd_loss with backend='torch'")
    scaled = [
        scale_gradient(gradient, upstream) if want else None
        for gradient, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return (*scaled, *[None] * (ctx.num_inputs - len(scaled)))


_fused.register_fake(_fake_fused)
_fused.register_autograd(_scale_all, setup_context=_keep_outputs)
