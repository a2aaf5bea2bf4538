"""Both losses as operators of torch, so that torch.compile keeps one graph around kernels that it cannot see into.

Used while torch.compile traces; eager calls go to the autograd functions, which cost less. An operator gives the loss and its
gradients as outputs, and its backward multiplies them by the upstream. Values of the targets are checked when the graph runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import find_kind
from kdcache.loss.chunks import Head, Product, loss_dtype, run_chunks
from kdcache.loss.gradients import refuse_second_derivative, scale_gradient
from kdcache.loss.prepare import Prepared
from kdcache.loss.steps.step import make_step


def over_logits(logits_PV: Tensor, ready: Prepared, want_gradient: bool) -> Tensor:
    """(P,) float32 losses times their scales."""
    return _over_logits(logits_PV, *_tensors(ready), *_encode(ready), want_gradient)[0]


def fused(product: Product, ready: Prepared, chunk_positions: int, wanted: tuple[bool, ...]) -> Tensor:
    """The scaled sum of the losses."""
    (words, values), head = _encode(ready), product.head
    student = (product.hidden_PH, product.weight_VH, product.bias_V)
    values = [head.logit_scale, head.softcap or 0.0, float(head.float32_logits), *values]
    return _fused(*student, *_tensors(ready), words, values, chunk_positions, list(wanted))[0]


def _tensors(ready: Prepared) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    teacher = ready.teacher
    entries = teacher.token_ids_PK, teacher.logprobs_PK, teacher.tail_mass_P, teacher.num_exact_P
    return *entries, ready.target_ids_P, ready.weights_P, ready.scales_P


def _encode(ready: Prepared) -> tuple[str, list[float]]:
    """In types that an operator may take: it has no lists of strings."""
    objective = ready.objective
    values = [objective.alpha, objective.temperature, *objective.divergence.parameters]
    return f"{objective.tail} {objective.divergence.name} {ready.backend} {ready.teacher.entries}", values


def _decode(tensors: tuple[Tensor | None, ...], words: str, values: list[float]) -> Prepared:
    tail, divergence, backend, entries = words.split()
    alpha, temperature, *parameters = values
    objective = Objective(tail, alpha, find_kind(divergence)(*parameters), temperature)
    token_ids_PK, logprobs_PK, tail_mass_P, num_exact_P, target_ids_P, weights_P, scales_P = tensors
    assert token_ids_PK is not None
    assert logprobs_PK is not None
    assert tail_mass_P is not None
    assert scales_P is not None
    teacher = SoftTargets(token_ids_PK, logprobs_PK, tail_mass_P, entries, num_exact_P)
    return Prepared(teacher, target_ids_P, weights_P, scales_P, objective, backend)


@torch.library.custom_op("kdcache::sparse_kd", mutates_args=())
def _over_logits(
    logits_PV: Tensor,
    token_ids_PK: Tensor,
    logprobs_PK: Tensor,
    tail_mass_P: Tensor,
    num_exact_P: Tensor | None,
    target_ids_P: Tensor | None,
    weights_P: Tensor | None,
    scales_P: Tensor,
    words: str,
    values: list[float],
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The losses, and the gradient of their sum with respect to the logits: empty where not wanted."""
    tensors = (token_ids_PK, logprobs_PK, tail_mass_P, num_exact_P, target_ids_P, weights_P, scales_P)
    step = make_step(_decode(tensors, words, values), logits_PV.shape[1])
    losses_P, gradient_PV = step(logits_PV.detach().clone(memory_format=torch.contiguous_format), 0, want_gradient)
    return losses_P.float(), gradient_PV if want_gradient else logits_PV.new_empty(0)


def _fake_over_logits(logits_PV: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = logits_PV.shape if rest[-1] else (0,)
    return logits_PV.new_empty(len(logits_PV), dtype=torch.float32), logits_PV.new_empty(shape)


def _keep_outputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_inputs, ctx.wanted = len(inputs), inputs[-1]
    ctx.save_for_backward(*output[1:])


def _scale_over_logits(ctx: Any, upstream_P: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("use LossSettings(backend='torch')")
    return (scale_gradient(ctx.saved_tensors[0], upstream_P), *[None] * (ctx.num_inputs - 1))


_over_logits.register_fake(_fake_over_logits)
_over_logits.register_autograd(_scale_over_logits, setup_context=_keep_outputs)


@torch.library.custom_op("kdcache::fused_sparse_kd", mutates_args=())
def _fused(
    hidden_PH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    token_ids_PK: Tensor,
    logprobs_PK: Tensor,
    tail_mass_P: Tensor,
    num_exact_P: Tensor | None,
    target_ids_P: Tensor | None,
    weights_P: Tensor | None,
    scales_P: Tensor,
    words: str,
    values: list[float],
    chunk_positions: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients with respect to hidden, weight and bias: empty where not wanted."""
    tensors = (token_ids_PK, logprobs_PK, tail_mass_P, num_exact_P, target_ids_P, weights_P, scales_P)
    step = make_step(_decode(tensors, words, values[3:]), len(weight_VH))
    product = Product(hidden_PH, weight_VH, bias_V, Head(values[0], values[1] or None, bool(values[2])))
    loss, gradients = run_chunks(product, step, tuple(wanted), chunk_positions)
    hidden, weight, bias = (hidden_PH.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return loss, hidden, weight, bias


def _fake_fused(hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    loss = hidden_PH.new_empty((), dtype=loss_dtype(hidden_PH.dtype))
    shapes = (hidden_PH.shape, weight_VH.shape, () if bias_V is None else bias_V.shape)
    return (loss, *[hidden_PH.new_empty(shape if want else (0,)) for shape, want in zip(shapes, rest[-1], strict=True)])


def _scale_all(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("use sparse_kd_loss with LossSettings(backend='torch')")
    scaled = [
        scale_gradient(gradient, upstream) if want else None
        for gradient, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return (*scaled, *[None] * (ctx.num_inputs - len(scaled)))


_fused.register_fake(_fake_fused)
_fused.register_autograd(_scale_all, setup_context=_keep_outputs)
