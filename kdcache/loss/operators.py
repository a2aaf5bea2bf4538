"""Both losses as operators of torch, so that torch.compile keeps one graph around kernels that it cannot see into.

Used while torch.compile traces; eager calls go to the autograd functions, which cost less. An operator gives the loss and its
gradients as outputs, and its backward multiplies them by the upstream. Values of the targets are checked when the graph runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import MEASURES, find_kind
from kdcache.loss.chunks import Head, Product, loss_dtype, run_chunks
from kdcache.loss.gradients import refuse_second_derivative, scale_gradient
from kdcache.loss.prepared import Prepared, ReadPart
from kdcache.loss.steps.step import make_step


def over_logits(logits_PV: Tensor, ready: Prepared, want_gradient: bool) -> tuple[Tensor, Tensor]:
    """(P,) float32 losses times their scales, and (P, D + 1) float64 values times them."""
    written = _Written.of(ready)
    losses_P, values_PD1, _ = _over_logits(
        logits_PV, written.tensors, written.text, written.floats, _num_columns(ready), want_gradient
    )
    return losses_P, values_PD1


def fused(product: Product, ready: Prepared, chunk_positions: int, wanted: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
    """The scaled sum of the losses, and (D + 1,) float64 sums of the values."""
    written, head = _Written.of(ready), product.head
    student = (product.hidden_PH, product.weight_VH, product.bias_V)
    floats = [head.logit_scale, head.softcap or 0.0, float(head.float32_logits), *written.floats]
    sizes = [_num_columns(ready), chunk_positions]
    return _fused(*student, written.tensors, written.text, floats, sizes, list(wanted))[:2]


def _num_columns(ready: Prepared) -> int:
    return ready.num_values + 1 if ready.num_values else 0


@dataclass(slots=True)
class _Written:
    """What is prepared in the types that an operator takes; it is read in the order in which it was written."""

    words: list[str]
    floats: list[float]
    tensors: list[Tensor]

    @classmethod
    def of(cls, ready: Prepared) -> _Written:
        written = cls([], [], [])
        written.prepared(ready)
        return written

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def value(self, value: float | Tensor | None) -> None:
        kind = "none" if value is None else "tensor" if isinstance(value, Tensor) else "number"
        self.words.append(kind)
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif value is not None:
            self.floats.append(value)

    def prepared(self, ready: Prepared) -> None:
        counts = (len(ready.parts), ready.num_values, len(ready.further), *ready.columns)
        self.words += [ready.backend, ",".join(map(str, counts))]
        shared = (ready.token_ids_PK, ready.target_ids_P, ready.weights_P, ready.scales_P)
        for value in (*shared, ready.temperature, ready.target_share):
            self.value(value)
        for part in ready.parts:
            objective, teacher = part.objective, part.teacher
            options = objective.divergence.options
            self.words += [objective.tail, objective.divergence.name, str(part.is_whole), teacher.entries, *options, ";"]
            arrays = (teacher.token_ids_PK, teacher.logprobs_PK, teacher.tail_mass_P, teacher.num_exact_P)
            for value in (part.factor, *arrays, *options.values()):
                self.value(value)
        for further in ready.further:
            self.prepared(further)


class _Reader:
    """Reads what `_Written` wrote."""

    def __init__(self, text: str, floats: list[float], tensors: list[Tensor]) -> None:
        self.words, self.floats, self.tensors = iter(text.split(" ")), iter(floats), iter(tensors)

    def value(self) -> Any:
        kind = next(self.words)
        return None if kind == "none" else next(self.tensors) if kind == "tensor" else next(self.floats)

    def prepared(self) -> Prepared:
        backend, counts = next(self.words), [int(count) for count in next(self.words).split(",")]
        num_parts, num_values, num_further, *columns = counts
        token_ids_PK, *shared, temperature, target_share = [self.value() for _ in range(6)]
        parts = tuple(self.part(temperature) for _ in range(num_parts))
        further = tuple(self.prepared() for _ in range(num_further))
        target_ids_P, weights_P, scales_P = shared
        shared = (target_ids_P, weights_P, scales_P, backend, tuple(columns), num_values, further)
        return Prepared(parts, token_ids_PK, temperature, target_share, *shared)

    def part(self, temperature: float) -> ReadPart:
        tail, name, is_whole, entries, *options = iter(lambda: next(self.words), ";")
        factor, token_ids_PK, logprobs_PK, tail_mass_P, num_exact_P = [self.value() for _ in range(5)]
        divergence = (MEASURES.get(name) or find_kind(name))(*[self.value() for _ in options])
        teacher = SoftTargets(token_ids_PK, logprobs_PK, tail_mass_P, entries, num_exact_P)
        return ReadPart(teacher, Objective(tail, 1.0, divergence, temperature), factor, is_whole == "True")


@torch.library.custom_op("kdcache::sparse_kd", mutates_args=())
def _over_logits(
    logits_PV: Tensor,
    tensors: list[Tensor],
    text: str,
    floats: list[float],
    num_columns: int,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses and values, and the gradient of the losses' sum with respect to the logits: empty where not wanted."""
    step = make_step(_Reader(text, floats, tensors).prepared(), logits_PV.shape[1])
    found = step(logits_PV.detach().clone(memory_format=torch.contiguous_format), 0, want_gradient)
    gradient_PV = found.gradient_CV if want_gradient else logits_PV.new_empty(0)
    values_PD1 = logits_PV.new_empty((len(logits_PV), num_columns), dtype=torch.float64)
    return found.losses_C.float(), values_PD1 if found.values_CD1 is None else found.values_CD1.double(), gradient_PV


def _fake_over_logits(logits_PV: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits_PV.shape if rest[-1] else (0,)
    values_PD1 = logits_PV.new_empty((len(logits_PV), rest[-2]), dtype=torch.float64)
    return logits_PV.new_empty(len(logits_PV), dtype=torch.float32), values_PD1, logits_PV.new_empty(shape)


def _keep_outputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # A list of tensors wants a list of gradients, none of which there is.
    ctx.others = [[None] * len(one) if isinstance(one, list) and one and isinstance(one[0], Tensor) else None for one in inputs]
    ctx.wanted = inputs[-1]
    ctx.save_for_backward(*output[2:])


def _scale_over_logits(ctx: Any, upstream_P: Tensor, *_: Tensor) -> tuple[Any, ...]:
    refuse_second_derivative("use LossSettings(backend='torch')")
    return (scale_gradient(ctx.saved_tensors[0], upstream_P), *ctx.others[1:])


_over_logits.register_fake(_fake_over_logits)
_over_logits.register_autograd(_scale_over_logits, setup_context=_keep_outputs)


@torch.library.custom_op("kdcache::fused_sparse_kd", mutates_args=())
def _fused(
    hidden_PH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    tensors: list[Tensor],
    text: str,
    floats: list[float],
    sizes: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and the values, and gradients with respect to hidden, weight and bias: empty where not wanted."""
    step = make_step(_Reader(text, floats[3:], tensors).prepared(), len(weight_VH))
    product = Product(hidden_PH, weight_VH, bias_V, Head(floats[0], floats[1] or None, bool(floats[2])))
    num_columns, chunk_positions = sizes
    loss, values_D1, gradients = run_chunks(product, step, tuple(wanted), chunk_positions)
    hidden, weight, bias = (hidden_PH.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return (
        loss,
        values_D1.double().expand(num_columns).clone() if num_columns else loss.new_empty(0, dtype=torch.float64),
        hidden,
        weight,
        bias,
    )


def _fake_fused(hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    loss, (sizes, wanted) = hidden_PH.new_empty((), dtype=loss_dtype(hidden_PH.dtype)), rest[-2:]
    shapes = (hidden_PH.shape, weight_VH.shape, () if bias_V is None else bias_V.shape)
    gradients = [hidden_PH.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)]
    return (loss, hidden_PH.new_empty(sizes[0], dtype=torch.float64), *gradients)


def _scale_all(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Any, ...]:
    refuse_second_derivative("use sparse_kd_loss with LossSettings(backend='torch')")
    scaled = [
        scale_gradient(gradient, upstream) if want else None
        for gradient, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return (*scaled, *ctx.others[len(scaled) :])


_fused.register_fake(_fake_fused)
_fused.register_autograd(_scale_all, setup_context=_keep_outputs)
