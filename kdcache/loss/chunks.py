"""The output projection and the losses, chunk by chunk: one buffer of logits, three matrix products.

Per chunk: logits = hidden W^T into one buffer, used again for every chunk; the kernel turns it into the gradient with respect
to the logits, in place; then d_hidden = G W and dW += G^T hidden. Three matrix products are the floor for a loss with its
gradients.

Half precision that a CPU only emulates is multiplied in float32, the weight widened a block at a time: see README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.half_precision import is_emulated
from kdcache.loss.steps.step import PositionStep

_HALF = (torch.bfloat16, torch.float16)
# Elements of the weight that are widened to float32 at a time, into one block.
_WIDENED_ELEMENTS = 1 << 22
# Elements of dW that are summed at a time where the sum is in another dtype than the product.
_SUMMED_ELEMENTS = 1 << 21
# Positions per chunk by default. Reading and writing dW once per chunk costs a share of the products that falls with them.
_CPU_BYTES_PER_ID = 2048
# On a device each chunk also costs about a hundred small launches: a small vocabulary gets more positions in the same memory.
_DEVICE_POSITIONS, _DEVICE_LOGITS = 4096, 1 << 29


@dataclass(frozen=True, slots=True)
class Head:
    """What a model does between the product with its output projection and the softmax.

    Attributes:
        logit_scale: the product (with its bias) times this, as in Cohere's and Granite's models.
        softcap: then cap * tanh(logits / cap), as in Gemma's models; None for none. Above 0.
        float32_logits: for bfloat16 and float16: make the logits in float32 from the same weights. Near convergence the
            rounding of bfloat16 logits is most of the gradient's error; on a CPU the product then takes several times as long,
            unless half precision is only emulated there, where logits are float32 in any case.
        vocab_size: ids that exist; those of the weight from there on are padding, get no probability and no gradient. None
            for all.

    Raises:
        LossError: a number outside its range.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    float32_logits: bool = False
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.logit_scale) and self.logit_scale != 0):
            raise LossError(f"logit_scale is {self.logit_scale!r}, but must be finite and not 0")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise LossError(f"softcap is {self.softcap!r}, but must be finite and above 0, or None")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise LossError(f"vocab_size is {self.vocab_size!r}, but must be at least 1, or None")


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """hidden (P, H), weight (V, H), bias (V,) or None, and what follows their product."""

    hidden_PH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    head: Head

    @property
    def logits_dtype(self) -> torch.dtype:
        """Of the logits that the kernel gets: tanh in half precision would undo what the cap is for."""
        dtype = product_dtype(self.hidden_PH)
        return torch.float32 if dtype in _HALF and (self.head.float32_logits or self.head.softcap is not None) else dtype


def run_chunks(
    product: Product, step: PositionStep, wanted: tuple[bool, ...], chunk_positions: int
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """The sums of the scaled losses and values, and gradients with respect to hidden, weight and bias: None where not wanted.

    Args:
        product: makes the logits.
        step: the losses of a chunk's positions, and their gradients.
        wanted: gradients with respect to hidden, weight and bias.
        chunk_positions: 0 for `default_chunk_positions`, which a graph that is traced could not ask for.

    Returns:
        A scalar of `loss_dtype`, (D + 1,) float64 or nothing where no values are asked for, and tensors of hidden's dtype.
    """
    hidden_PH = product.hidden_PH
    chunk_positions = chunk_positions or default_chunk_positions(hidden_PH, len(product.weight_VH))
    loss = torch.zeros((), dtype=torch.float64, device=hidden_PH.device)
    values_D1 = torch.zeros_like(loss)
    gradients = _Gradients.zeros(product, wanted, chunk_positions)
    # Under autocast the products would come in another dtype than the buffer's.
    with torch.no_grad(), torch.autocast(hidden_PH.device.type, enabled=False):
        for start, logits_CV, slope_CV in _chunks_of_logits(product, chunk_positions):
            losses_C, gradient_CV, values_CD1 = step(logits_CV, start, any(wanted))
            loss += losses_C.sum()
            if values_CD1 is not None:
                values_D1 = values_D1 + values_CD1.sum(dim=0)
            if slope_CV is not None:
                gradient_CV.mul_(slope_CV)
            elif product.head.logit_scale != 1:
                gradient_CV.mul_(product.head.logit_scale)
            gradients.add(gradient_CV.to(product_dtype(hidden_PH)), product, start)
            del losses_C, logits_CV, slope_CV, gradient_CV  # else the buffer lives until the gradients are rounded
    return loss.to(loss_dtype(hidden_PH.dtype)), values_D1, gradients.finish(hidden_PH.dtype)


def default_chunk_positions(hidden_PH: Tensor, vocab_size: int) -> int:
    """512 on a CPU in float32, 1024 in half precision: the same bytes. On a device 4096, more for a small vocabulary."""
    if hidden_PH.device.type == "cpu":
        return max(1, _CPU_BYTES_PER_ID // product_dtype(hidden_PH).itemsize)
    return max(_DEVICE_POSITIONS, _DEVICE_LOGITS // max(vocab_size, 1) // 1024 * 1024)


def product_dtype(hidden_PH: Tensor) -> torch.dtype:
    """Of the matrix products of these numbers: float32 where a CPU only emulates their half precision."""
    return torch.float32 if is_emulated(hidden_PH.dtype, hidden_PH.device.type) else hidden_PH.dtype


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(slots=True, eq=False)
class _Gradients:
    """Accumulators; None for those that nobody wants."""

    hidden_PH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(cls, product: Product, wanted: tuple[bool, ...], chunk_positions: int) -> _Gradients:
        hidden_PH, weight_VH, bias_V = product.hidden_PH, product.weight_VH, product.bias_V
        # A sum over many chunks in 8 bits of mantissa loses the later ones; one chunk is rounded once in any case.
        half = hidden_PH.dtype in _HALF and len(hidden_PH) > chunk_positions
        dtype = torch.float32 if half else hidden_PH.dtype
        return cls(
            torch.empty_like(hidden_PH, memory_format=torch.contiguous_format) if wanted[0] else None,
            torch.zeros(weight_VH.shape, dtype=dtype, device=weight_VH.device) if wanted[1] else None,
            torch.zeros(bias_V.shape, dtype=dtype, device=bias_V.device) if bias_V is not None and wanted[2] else None,
        )

    def add(self, gradient_CV: Tensor, product: Product, start: int) -> None:
        positions = slice(start, start + len(gradient_CV))
        hidden_CH = product.hidden_PH[positions].to(gradient_CV.dtype)
        if self.hidden_PH is not None:
            _multiply_gradient(gradient_CV, product.weight_VH, self.hidden_PH[positions])
        if self.weight_VH is not None and self.weight_VH.dtype == gradient_CV.dtype:
            self.weight_VH.addmm_(gradient_CV.T, hidden_CH)
        elif self.weight_VH is not None and has_mixed_product(gradient_CV):
            # Summed within the product: no float32 product beside dW, and no pass over both.
            torch.addmm(self.weight_VH, gradient_CV.T, hidden_CH, out_dtype=torch.float32, out=self.weight_VH)
        elif self.weight_VH is not None:
            _add_product(self.weight_VH, gradient_CV, hidden_CH)
        if self.bias_V is not None:
            self.bias_V += gradient_CV.sum(dim=0, dtype=torch.promote_types(self.bias_V.dtype, gradient_CV.dtype))

    def finish(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.to(dtype) for g in (self.hidden_PH, self.weight_VH, self.bias_V))


def has_mixed_product(tensor: Tensor) -> bool:
    """Whether torch multiplies half precision into float32 there: on NVIDIA's GPUs."""
    return tensor.is_cuda and torch.version.hip is None


def _add_product(weight_VH: Tensor, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
    """weight += gradient^T hidden, the weight in another dtype than both, where torch has no mixed product.

    Some ids of the weight at a time, through one block that stays in the cache: a whole half precision product, written to
    fresh memory and read again, took as long for that as for the product.
    """
    num_ids = max(1, _SUMMED_ELEMENTS // max(hidden_CH.shape[1], 1))
    block_VH = hidden_CH.new_empty((min(num_ids, len(weight_VH)), hidden_CH.shape[1]))
    for start in range(0, len(weight_VH), num_ids):
        part_CV = gradient_CV[:, start : start + num_ids]
        product_VH = block_VH[: part_CV.shape[1]]
        torch.mm(part_CV.T, hidden_CH, out=product_VH)
        weight_VH[start : start + num_ids] += product_VH


def _chunks_of_logits(product: Product, chunk_positions: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(first position, logits, their derivative by the product or None) of each chunk.

    All are in the same memory each time: done with before the next is asked for.
    """
    hidden_PH, head = product.hidden_PH, product.head
    buffer_CV = hidden_PH.new_empty((min(chunk_positions, len(hidden_PH)), len(product.weight_VH)), dtype=product.logits_dtype)
    slope_CV = None if head.softcap is None else torch.empty_like(buffer_CV)
    for start in range(0, len(hidden_PH), chunk_positions):
        part_CH = hidden_PH[start : start + chunk_positions]
        logits_CV = buffer_CV[: len(part_CH)]
        _multiply(part_CH, product, logits_CV)
        if head.logit_scale != 1:
            logits_CV.mul_(head.logit_scale)
        if slope_CV is None or head.softcap is None:
            yield start, logits_CV, None
            continue
        slope = slope_CV[: len(part_CH)]
        logits_CV.div_(head.softcap).tanh_()
        torch.mul(logits_CV, logits_CV, out=slope)
        slope.neg_().add_(1).mul_(head.logit_scale)
        logits_CV.mul_(head.softcap)
        yield start, logits_CV, slope


def write_logits(product: Product, positions: slice, logits_CV: Tensor) -> None:
    """The logits of some positions, into memory of `Product.logits_dtype`; for a side that gets no gradient."""
    _multiply(product.hidden_PH[positions], product, logits_CV)
    if product.head.logit_scale != 1:
        logits_CV.mul_(product.head.logit_scale)
    if product.head.softcap is not None:
        logits_CV.div_(product.head.softcap).tanh_().mul_(product.head.softcap)


def _multiply(part_CH: Tensor, product: Product, logits_CV: Tensor) -> None:
    """logits = part W^T + bias, in the logits' dtype."""
    weight_VH, bias_V = product.weight_VH, product.bias_V
    if logits_CV.dtype == part_CH.dtype and bias_V is None:
        torch.mm(part_CH, weight_VH.T, out=logits_CV)
    elif logits_CV.dtype == part_CH.dtype:
        torch.addmm(bias_V, part_CH, weight_VH.T, out=logits_CV)  # pyright: ignore[reportArgumentType]
    elif product_dtype(part_CH) == part_CH.dtype and not product.head.float32_logits:
        logits_CV.copy_(part_CH @ weight_VH.T)
        if bias_V is not None:
            logits_CV += bias_V
    else:
        if has_mixed_product(part_CH):
            torch.mm(part_CH, weight_VH.T, out_dtype=torch.float32, out=logits_CV)
        else:
            part_CH = part_CH.float()
            for ids, block_VH in _widened_blocks(weight_VH):
                torch.mm(part_CH, block_VH.T, out=logits_CV[:, ids])
        if bias_V is not None:
            logits_CV += bias_V


def _multiply_gradient(gradient_CV: Tensor, weight_VH: Tensor, out_CH: Tensor) -> None:
    """out = gradient weight."""
    if gradient_CV.dtype == weight_VH.dtype:
        torch.mm(gradient_CV, weight_VH, out=out_CH)
        return
    sum_CH = gradient_CV.new_zeros(out_CH.shape)
    for ids, block_VH in _widened_blocks(weight_VH):
        sum_CH.addmm_(gradient_CV[:, ids], block_VH)
    out_CH.copy_(sum_CH)


def _widened_blocks(weight_VH: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some ids of the weight at a time in float32, in the same memory each time."""
    num_ids = max(1, _WIDENED_ELEMENTS // max(weight_VH.shape[1], 1))
    block_VH = weight_VH.new_empty((min(num_ids, len(weight_VH)), weight_VH.shape[1]), dtype=torch.float32)
    for start in range(0, len(weight_VH), num_ids):
        ids = slice(start, start + num_ids)
        part_VH = weight_VH[ids]
        yield ids, block_VH[: len(part_VH)].copy_(part_VH)
