"""The sparse distillation loss fused with the student's output projection: [P, V] logits never exist whole.

Shape letters: P positions (rows), C rows of one chunk, K entries per position (padded), V the student's vocabulary, H hidden.

How: `kdcache.loss.chunks`. `FusedSparseKD` is the same as a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import Divergence, get_divergence
from kdcache.loss import arguments, operators
from kdcache.loss.arguments import Options, TargetTensors
from kdcache.loss.chunks import Head, Projection, run_chunks
from kdcache.loss.gradients import may_overwrite, refuse_second_derivative, scale_gradient
from kdcache.loss.row_steps import RowStep, make_step

PLAIN_HEAD = Head()


def fused_sparse_kd_loss(
    hidden_PH: Tensor,
    weight_VH: Tensor,
    token_ids_PK: Tensor | None = None,
    logprobs_PK: Tensor | None = None,
    tail_mass_P: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    head: Head = PLAIN_HEAD,
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
    chunk_size: int | None = None,
) -> Tensor:
    """sparse_kd_loss(hidden_PH @ weight_VH.T + bias, ...) in memory of chunk_size * V, with the gradients of all three.

    Only the arguments that `kdcache.loss.sparse_kd.sparse_kd_loss` does not have are described here. Gradients are computed in
    the forward pass, for those of hidden, weight and bias that require one, and can be differentiated once.

    Args:
        hidden_PH: (P, H) the student's last hidden states at the rows that have a record.
        weight_VH: (V, H) the output projection, of hidden's dtype and device. A frozen one costs no dW.
        token_ids_PK: with logprobs_PK and tail_mass_P, the teacher. All three may be None where alpha is 0: this is then a
            chunked cross entropy.
        bias: (V,) of the output projection, or None.
        head: what the model does with the product before the softmax: scale, softcap, padded vocabulary, float32 logits.
        reduction: `mean` or `sum`.
        chunk_size: rows per chunk; the buffer takes chunk_size * V elements (with a softcap two of float32, and one of hidden's
            dtype beside; with float32 logits of half precision likewise one beside; of float32 where half precision is only
            emulated, as on many CPUs, and is multiplied in float32). None for 512 on a CPU, 1024 there in half
            precision, and on a device 4096, or as many as make 2^29 logits: there reading and writing dW once per chunk costs
            420 / chunk_size of the products (calculated for an H100: 10% at 4096, 330% at 128).

    Returns:
        A scalar; float64 for float64 hidden states, else float32.

    Raises:
        LossError: an argument is impossible, or does not fit the others.
    """
    arguments.refuse_transform("use sparse_kd_loss with backend='torch'")
    objective = Objective(tail, alpha, get_divergence(divergence), float(temperature))
    _check_projection(hidden_PH, weight_VH, bias)
    per_row = (target_ids_P, weights_P, num_exact_P)
    teacher = _gather_targets(hidden_PH, (token_ids_PK, logprobs_PK, tail_mass_P), per_row, alpha)
    options = Options(objective, reduction, backend, targets)
    arguments.check_options(options, teacher)
    if reduction == "none":
        raise LossError(
            "reduction='none' is not possible in the fused loss, whose gradients are summed over rows; use weights_P"
        )
    if chunk_size is not None and chunk_size < 1:
        raise LossError(f"chunk_size is {chunk_size}, but must be at least 1")
    arguments.check_tensors(hidden_PH, teacher, log_z_P)
    if head.vocab_size is not None:
        weight_VH, bias = _without_padding(weight_VH, bias, head.vocab_size)
    teacher = arguments.at_temperature(arguments.used_entries(teacher, options), log_z_P, objective)
    scales_P = arguments.row_scales(teacher, reduction)
    chosen, rows = arguments.choose_backend(backend, hidden_PH), chunk_size or 0
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden_PH, weight_VH, bias))
    if torch.compiler.is_compiling():
        projection = Projection(hidden_PH, weight_VH, bias, head)
        return operators.fused(projection, teacher, scales_P, objective, (chosen, rows, wanted))
    step = make_step(chosen, teacher, scales_P, objective, len(weight_VH))
    work = _Work(step, head, wanted, rows)
    loss = _FusedRows.apply(hidden_PH, weight_VH, bias, work)
    assert isinstance(loss, Tensor)
    return loss


def _without_padding(weight_VH: Tensor, bias: Tensor | None, vocab_size: int) -> tuple[Tensor, Tensor | None]:
    if vocab_size > len(weight_VH):
        raise LossError(f"vocab_size is {vocab_size}, but the output projection has only {len(weight_VH)} rows")
    return weight_VH[:vocab_size], None if bias is None else bias[:vocab_size]


class _FusedRows(torch.autograd.Function):
    """The scaled loss; forward leaves the gradients by hidden, weight and bias, backward multiplies them by the upstream."""

    @staticmethod
    def forward(ctx: Any, hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, work: _Work) -> Tensor:
        projection = Projection(hidden_PH, weight_VH, bias_V, work.head)
        loss, gradients = run_chunks(projection, work.step, work.wanted, work.chunk_size)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("use sparse_kd_loss with backend='torch'")
        # dW is as large as the logits: no copy of it where autograd lets go of this one after the call.
        in_place = may_overwrite(upstream[0])
        scaled = [None if g is None else scale_gradient(g, upstream[0], in_place=in_place) for g in ctx.saved_tensors]
        return (*scaled, None)


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """All that is not a tensor autograd should see."""

    step: RowStep
    head: Head
    wanted: tuple[bool, ...]
    chunk_size: int


def _check_projection(hidden_PH: Tensor, weight_VH: Tensor, bias: Tensor | None) -> None:
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


def _gather_targets(
    hidden_PH: Tensor,
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None],
    per_row: tuple[Tensor | None, Tensor | None, Tensor | None],
    alpha: float,
) -> TargetTensors:
    """`per_row` are labels, weights and num_exact."""
    token_ids_PK, logprobs_PK, tail_mass_P = teacher
    if token_ids_PK is not None and logprobs_PK is not None and tail_mass_P is not None:
        return TargetTensors(token_ids_PK, logprobs_PK, tail_mass_P, *per_row)
    if alpha > 0 or any(part is not None for part in teacher):
        raise LossError("token_ids_PK, logprobs_PK and tail_mass_P must be given together; without a teacher alpha must be 0")
    return TargetTensors(*arguments.empty_teacher(hidden_PH), *per_row[:2])
