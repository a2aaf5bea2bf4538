"""The sparse distillation loss fused with the student's output projection: [P, V] logits never exist whole.

How: `kdcache.loss.chunks`. `FusedSparseKD` is the same as a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.divergences import Divergence
from kdcache.loss import operators, prepare
from kdcache.loss.chunks import Head, Product, run_chunks
from kdcache.loss.divergence_sum import DivergenceSum
from kdcache.loss.gradients import may_overwrite, refuse_second_derivative, scale_gradient
from kdcache.loss.prepare import DEFAULT, Asked, LossSettings
from kdcache.loss.steps.step import PositionStep, make_step

PLAIN_HEAD = Head()


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """The student's output projection, where there is more to say of it than its weight.

    Attributes:
        weight_VH: (V, H), of the hidden states' dtype and device. A frozen one costs no dW.
        bias_V: (V,), or None.
        head: what the model does with the product before the softmax: scale, softcap, padded vocabulary, float32 logits; None
            for nothing.
        chunk_positions: positions whose logits exist at once; the buffer takes chunk_positions * V elements (with a softcap two
            of float32, and one of the hidden states' dtype besides; with float32 logits of half precision likewise one besides;
            of float32 where half precision is only emulated, as on many CPUs, and is multiplied in float32). None for 512 on a
            CPU, 1024 there in half precision, and on a device 4096, or as many as make 2^29 logits: there reading and writing
            dW once per chunk costs 420 / chunk_positions of the products (calculated for an H100: 10% at 4096, 330% at 128).

    Raises:
        LossError: chunk_positions below 1.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    head: Head | None = None
    chunk_positions: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_positions is not None and self.chunk_positions < 1:
            raise LossError(f"chunk_positions is {self.chunk_positions}, but must be at least 1")

    def without_padding(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the ids that exist."""
        vocab_size, weight_VH = None if self.head is None else self.head.vocab_size, self.weight_VH
        if vocab_size is None:
            return weight_VH, self.bias_V
        if vocab_size > len(weight_VH):
            raise LossError(f"vocab_size is {vocab_size}, but the output projection has only {len(weight_VH)} ids")
        return weight_VH[:vocab_size], None if self.bias_V is None else self.bias_V[:vocab_size]


def fused_sparse_kd_loss(
    hidden_PH: Tensor,
    projection: Tensor | Projection,
    teacher: SoftTargets[Tensor] | None,
    *,
    divergence: str | Divergence | DivergenceSum = "forward_kl",
    alpha: float = 1.0,
    temperature: float = 1.0,
    target_ids: Tensor | None = None,
    weights: Tensor | None = None,
    settings: LossSettings = DEFAULT,
) -> Tensor:
    """sparse_kd_loss(hidden_PH @ weight_VH.T + bias, ...) in the memory of a chunk's logits, with the gradients of all three.

    The arguments that `kdcache.loss.sparse_kd.sparse_kd_loss` has too are described there. Gradients are computed in the
    forward pass, for those of hidden, weight and bias that require one, and can be differentiated once.

    Args:
        hidden_PH: (P, H) the student's last hidden states: `hidden.flatten(0, 1)[batch.flat_positions_P]`.
        projection: (V, H) the output projection's weight, or a Projection that says more.
        teacher: None where alpha is 0: this is then a chunked cross entropy.

    Returns:
        A scalar; float64 for float64 hidden states, else float32.

    Raises:
        LossError: an argument is impossible, does not fit the others, or would make a wrong loss.
    """
    prepare.refuse_transform("use sparse_kd_loss with LossSettings(backend='torch')")
    if settings.reduction == "none":
        raise LossError(
            "reduction is 'none', which the fused loss cannot give: its gradients are summed over positions; use weights"
        )
    projection = projection if isinstance(projection, Projection) else Projection(projection)
    check_projection(hidden_PH, projection.weight_VH, projection.bias_V)
    weight_VH, bias_V = projection.without_padding()
    asked = Asked(divergence, alpha, temperature, settings)
    ready = prepare.prepare(hidden_PH, teacher, asked, (target_ids, weights), len(weight_VH))
    product, num_positions = (
        Product(hidden_PH, weight_VH, bias_V, projection.head or PLAIN_HEAD),
        projection.chunk_positions or 0,
    )
    if torch.compiler.is_compiling():
        loss, values_D1 = operators.fused(product, ready, num_positions, _wanted(product))
    else:
        loss, values_D1 = _run(product, make_step(ready, len(weight_VH)), num_positions)
    if isinstance(divergence, DivergenceSum):
        divergence.keep(values_D1)
    return loss


def run_fused(product: Product, step: PositionStep, chunk_positions: int = 0) -> Tensor:
    """The sum of a step's losses over all positions, with gradients of the product's three tensors made in the forward pass.

    Args:
        product: makes the logits; the ids of its weight are the whole vocabulary.
        step: its losses are already times their scales.
        chunk_positions: 0 for the default.
    """
    return _run(product, step, chunk_positions)[0]


def _run(product: Product, step: PositionStep, chunk_positions: int) -> tuple[Tensor, Tensor]:
    """`run_fused`, and the sum of the step's values."""
    work = _Work(step, product.head, _wanted(product), chunk_positions)
    found = _Fused.apply(product.hidden_PH, product.weight_VH, product.bias_V, work)
    assert isinstance(found, tuple)
    return found


def _wanted(product: Product) -> tuple[bool, ...]:
    tensors = (product.hidden_PH, product.weight_VH, product.bias_V)
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)


class _Fused(torch.autograd.Function):
    """The scaled loss and values; forward leaves the gradients of hidden, weight and bias, backward multiplies them by the
    upstream."""

    @staticmethod
    def forward(ctx: Any, hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, work: _Work) -> tuple[Tensor, Tensor]:
        product = Product(hidden_PH, weight_VH, bias_V, work.head)
        loss, values_D1, gradients = run_chunks(product, work.step, work.wanted, work.chunk_positions)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(values_D1)
        return loss, values_D1

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("use sparse_kd_loss with LossSettings(backend='torch')")
        # dW is as large as the logits: no copy of it where autograd lets go of this one after the call.
        overwrite = may_overwrite(upstream[0])
        scaled = [None if g is None else scale_gradient(g, upstream[0], overwrite=overwrite) for g in ctx.saved_tensors]
        return (*scaled, None)


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """All that is not a tensor autograd should see."""

    step: PositionStep
    head: Head
    wanted: tuple[bool, ...]
    chunk_positions: int


def check_projection(hidden_PH: Tensor, weight_VH: Tensor, bias: Tensor | None) -> None:
    if hidden_PH.ndim != 2 or weight_VH.ndim != 2 or hidden_PH.shape[1] != weight_VH.shape[1]:
        raise LossError(
            f"hidden_PH {tuple(hidden_PH.shape)} and weight_VH {tuple(weight_VH.shape)} must be (positions, hidden) and "
            "(vocabulary, hidden) with the same hidden size"
        )
    if bias is not None and tuple(bias.shape) != (len(weight_VH),):
        raise LossError(f"bias has the shape {tuple(bias.shape)}, but the vocabulary of weight_VH makes it ({len(weight_VH)},)")
    if not hidden_PH.is_floating_point():
        raise LossError(f"hidden_PH has the dtype {hidden_PH.dtype}, but must be floating point")
    if hasattr(weight_VH, "placements") and not hasattr(hidden_PH, "placements"):
        raise LossError(
            "weight_VH is sharded between processes (a DTensor), but the loss needs it whole; under FSDP2 call the loss within "
            "the forward of the module that owns the projection, whose hooks gather it, and for tensor parallelism use "
            "kdcache.loss.vocab_parallel"
        )
    for name, tensor in (("weight_VH", weight_VH), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (
            hidden_PH.dtype,
            hidden_PH.device,
        ):
            raise LossError(
                f"{name} is {tensor.dtype} on {tensor.device}, but hidden_PH is {hidden_PH.dtype} on {hidden_PH.device}; "
                "convert one of them"
            )
