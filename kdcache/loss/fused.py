"""The sparse distillation loss fused with the student's output projection: [P, V] logits never exist whole.

Shape letters: P positions (rows), C rows of one chunk, K entries per position (padded), V the student's vocabulary, H hidden.

Per chunk: logits = hidden W^T into one buffer, used again for every chunk; the row kernel turns it into the gradient by the
logits in place; then d_hidden = G W and dW += G^T hidden. Three matrix products, the floor for a loss with its gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.kernels import get_backend
from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import Divergence, get_divergence
from kdcache.loss import arguments, torch_rows
from kdcache.loss.arguments import Options, TargetTensors
from kdcache.loss.sparse_kd import kernel_view, refuse_second_derivative, scale_gradient


def fused_sparse_kd_loss(
    hidden_PH: Tensor,
    weight_VH: Tensor,
    token_ids_PK: Tensor | None = None,
    logprobs_PK: Tensor | None = None,
    tail_mass_P: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    divergence: str | Divergence = "forward_kl",
    labels_P: Tensor | None = None,
    tail: str = "bucket",
    alpha: float = 1.0,
    temperature: float = 1.0,
    log_z_P: Tensor | None = None,
    weights_P: Tensor | None = None,
    targets: str = "exact",
    reduction: str = "mean",
    backend: str = "auto",
    chunk_size: int = 512,
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
        reduction: `mean` or `sum`.
        chunk_size: rows per chunk; the buffer takes chunk_size * V elements. Below about 256 the products get slower.

    Returns:
        A scalar; float64 for float64 hidden states, else float32.

    Raises:
        LossError: an argument is impossible, or does not fit the others.
    """
    objective = Objective(tail, alpha, get_divergence(divergence), float(temperature))
    _check_projection(hidden_PH, weight_VH, bias)
    teacher = _gather_targets(hidden_PH, (token_ids_PK, logprobs_PK, tail_mass_P), labels_P, weights_P, alpha)
    arguments.check_options(Options(objective, reduction, backend, targets), teacher)
    if reduction == "none":
        raise LossError(
            "reduction='none' is not possible in the fused loss, whose gradients are summed over rows; use weights_P"
        )
    if chunk_size < 1:
        raise LossError(f"chunk_size is {chunk_size}, but must be at least 1")
    arguments.check_tensors(hidden_PH, teacher, log_z_P)
    teacher = arguments.at_temperature(teacher, log_z_P, objective)
    scales_P = arguments.row_scales(teacher, reduction)
    if arguments.choose_backend(backend, hidden_PH) == "numba":
        step: RowStep = _NumbaStep(arguments.to_kernel_targets(teacher, len(weight_VH), scales_P), objective)
    else:
        arguments.check_values(teacher, len(weight_VH))
        step = _TorchStep(teacher, objective, scales_P)
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden_PH, weight_VH, bias))
    loss = _FusedRows.apply(hidden_PH, weight_VH, bias, step, wanted, chunk_size)
    assert isinstance(loss, Tensor)
    return loss


class RowStep(Protocol):
    """One chunk of logits to its share of the loss and its gradient."""

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> tuple[Tensor, Tensor]:
        """The scaled sum of the losses of rows start.. (float64), and the gradient by the logits, maybe in their memory."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _NumbaStep:
    targets: arguments.Targets
    objective: Objective

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> tuple[Tensor, Tensor]:
        part, losses_C = (
            self.targets.rows(start, start + len(logits_CV)),
            np.empty(len(logits_CV)),
        )
        kernels = get_backend("numba")
        run = kernels.row_losses_and_gradients if want_gradient else kernels.row_losses
        run(
            kernel_view(logits_CV),
            part,
            self.objective,
            losses_C,
            torch.get_num_threads(),
        )
        return torch.tensor((losses_C * part.weights_P).sum(), dtype=torch.float64), logits_CV


@dataclass(frozen=True, slots=True, eq=False)
class _TorchStep:
    targets: TargetTensors
    objective: Objective
    scales_P: Tensor

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> tuple[Tensor, Tensor]:
        part, scales_C = (
            self.targets.rows(start, start + len(logits_CV)),
            self.scales_P[start : start + len(logits_CV)],
        )
        with torch.set_grad_enabled(want_gradient):
            logits_CV = logits_CV.detach().requires_grad_(want_gradient)
            losses_C = torch_rows.row_losses(logits_CV, part, self.objective)
            total = (losses_C * scales_C.to(losses_C.dtype)).sum(dtype=torch.float64)
            gradient_CV = torch.autograd.grad(total, logits_CV)[0] if want_gradient else logits_CV
        return total.detach(), gradient_CV


class _FusedRows(torch.autograd.Function):
    """The scaled loss; forward leaves the gradients by hidden, weight and bias, backward multiplies them by the upstream."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        step: RowStep,
        wanted: tuple[bool, ...],
        chunk_size: int,
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64, device=hidden_PH.device)
        gradients = _Gradients.zeros((hidden_PH, weight_VH, bias_V), wanted, chunk_size)
        # Under autocast the products would come in another dtype than the buffer's.
        with torch.autocast(hidden_PH.device.type, enabled=False):
            for start, logits_CV in _chunks_of_logits(hidden_PH, weight_VH, bias_V, chunk_size):
                total, gradient_CV = step(logits_CV, start, any(wanted))
                loss += total
                gradients.add(gradient_CV, hidden_PH, weight_VH, start)
        ctx.save_for_backward(*gradients.finish(hidden_PH.dtype))
        return loss.to(hidden_PH.dtype if hidden_PH.dtype == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("use sparse_kd_loss with backend='torch'")
        scaled = [None if gradient is None else scale_gradient(gradient, upstream[0]) for gradient in ctx.saved_tensors]
        return (*scaled, None, None, None)


@dataclass(slots=True, eq=False)
class _Gradients:
    """Accumulators; None for those that nobody wants."""

    hidden_PH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(
        cls,
        inputs: tuple[Tensor, Tensor, Tensor | None],
        wanted: tuple[bool, ...],
        chunk_size: int,
    ) -> _Gradients:
        hidden_PH, weight_VH, bias_V = inputs
        # A sum over many chunks in 8 bits of mantissa loses the later ones; one chunk is rounded once in any case.
        half = hidden_PH.dtype in (torch.bfloat16, torch.float16) and len(hidden_PH) > chunk_size
        dtype = torch.float32 if half else hidden_PH.dtype
        return cls(
            torch.empty_like(hidden_PH, memory_format=torch.contiguous_format) if wanted[0] else None,
            torch.zeros(weight_VH.shape, dtype=dtype, device=weight_VH.device) if wanted[1] else None,
            torch.zeros(bias_V.shape, dtype=dtype, device=bias_V.device) if bias_V is not None and wanted[2] else None,
        )

    def add(self, gradient_CV: Tensor, hidden_PH: Tensor, weight_VH: Tensor, start: int) -> None:
        rows = slice(start, start + len(gradient_CV))
        if self.hidden_PH is not None:
            torch.mm(gradient_CV, weight_VH, out=self.hidden_PH[rows])
        if self.weight_VH is not None and self.weight_VH.dtype == gradient_CV.dtype:
            self.weight_VH.addmm_(gradient_CV.T, hidden_PH[rows])
        elif self.weight_VH is not None:
            self.weight_VH += gradient_CV.T @ hidden_PH[rows]
        if self.bias_V is not None:
            self.bias_V += gradient_CV.sum(dim=0, dtype=self.bias_V.dtype)

    def finish(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.to(dtype) for g in (self.hidden_PH, self.weight_VH, self.bias_V))


def _chunks_of_logits(
    hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, chunk_size: int
) -> Iterator[tuple[int, Tensor]]:
    """(first row, logits) of each chunk, all in the same memory: done with before the next is asked for."""
    num_rows = len(hidden_PH)
    buffer_CV = hidden_PH.new_empty((min(chunk_size, num_rows), len(weight_VH)))
    for start in range(0, num_rows, chunk_size):
        part_CH = hidden_PH[start : start + chunk_size]
        logits_CV = buffer_CV[: len(part_CH)]
        if bias_V is None:
            torch.mm(part_CH, weight_VH.T, out=logits_CV)
        else:
            torch.addmm(bias_V, part_CH, weight_VH.T, out=logits_CV)
        yield start, logits_CV


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
    labels_P: Tensor | None,
    weights_P: Tensor | None,
    alpha: float,
) -> TargetTensors:
    token_ids_PK, logprobs_PK, tail_mass_P = teacher
    if token_ids_PK is not None and logprobs_PK is not None and tail_mass_P is not None:
        return TargetTensors(token_ids_PK, logprobs_PK, tail_mass_P, labels_P, weights_P)
    if alpha > 0 or any(part is not None for part in teacher):
        raise LossError("token_ids_PK, logprobs_PK and tail_mass_P must be given together; without a teacher alpha must be 0")
    return TargetTensors(*arguments.empty_teacher(hidden_PH), labels_P, weights_P)
