"""The row kernels for CUDA, in Triton: two passes over a row, with the O(K) part of a divergence between them.

Shape letters: P positions (rows), L lifted ids per row (the support and the label), V the student's vocabulary.

1. `lift`: the logits of the lifted ids are copied out and -inf is left in their place: what remains is the tail.
2. `tail_statistics`: maximum, sum of exp and, for a uniform tail, the sum of a row's tail; one read.
3. (by the caller, on (P, L) numbers in torch) the divergence: one factor and one offset per row, and L gradients.
4. `write_gradient`: row = factor * exp(z - maximum) + offset, in place, one read and one write; `put` writes the lifted ids.

Every gradient is written once, from float32, so that bfloat16 rounds it once. Launched with torch tensors by
`kdcache.loss.triton_passes`; torch itself is not imported here.

Only `tl.constexpr` parameters have annotations: Triton's compiler looks every other annotation up as a name that the kernel
uses, and refuses it. Its interpreter does not; `tests/kernels/test_triton_compiles.py` compiles each kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_SIZE = 4096
NUM_WARPS = 8


@triton.jit
def lift(logits, row_stride, ids, lifted, left, V, NUM_IDS: tl.constexpr, BLOCK_IDS: tl.constexpr):
    """lifted (P, L) float32 = the logits of ids (P, L), -inf where the id is -1; `left` is left in their place.

    An id of V or more is no logit of this row: NaN, and nothing is read or written for it.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_IDS)
    inside = columns < NUM_IDS
    id_ = tl.load(ids + row * NUM_IDS + columns, mask=inside, other=-1)
    is_id = (id_ >= 0) & (id_ < V)
    value = tl.load(logits + row * row_stride + id_, mask=is_id, other=float("-inf")).to(tl.float32)
    tl.store(lifted + row * NUM_IDS + columns, tl.where(id_ < V, value, float("nan")), mask=inside)
    filling = tl.zeros([BLOCK_IDS], tl.float32) + left
    tl.store(logits + row * row_stride + id_, filling.to(logits.dtype.element_ty), mask=is_id)


@triton.jit
def put(logits, row_stride, ids, values, V, NUM_IDS: tl.constexpr, BLOCK_IDS: tl.constexpr):
    """logits at ids (P, L) = values (P, L); nothing where the id is -1, or V or more."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_IDS)
    id_ = tl.load(ids + row * NUM_IDS + columns, mask=columns < NUM_IDS, other=-1)
    value = tl.load(values + row * NUM_IDS + columns, mask=columns < NUM_IDS, other=0.0)
    tl.store(logits + row * row_stride + id_, value.to(logits.dtype.element_ty), mask=(id_ >= 0) & (id_ < V))


@triton.jit
def tail_statistics(logits, row_stride, inverse_temperature, tops, sums, totals, V, BLOCK: tl.constexpr):
    """Of z = logits / T: tops (P,) = max z; sums (P,) = sum exp(z - top), 1 where top is -inf; totals (P,) = sum z.

    The running maximum and sum are kept per lane and joined at the end: one read of the row.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    sum_ = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + lanes < V
        z = tl.load(logits + row * row_stride + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        z = z * inverse_temperature
        larger = tl.maximum(top, z)
        # exp(-inf - -inf) is NaN; a lane that has seen nothing but -inf has the sum 0.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        sum_ = sum_ * tl.exp(top - shift) + tl.exp(z - shift)
        total += tl.where(inside, z, 0.0)
        top = larger
    row_top = tl.max(top, axis=0)
    shift = tl.where(row_top == float("-inf"), 0.0, row_top)
    row_sum = tl.sum(sum_ * tl.exp(top - shift), axis=0)
    tl.store(tops + row, row_top)
    tl.store(sums + row, tl.where(row_top == float("-inf"), 1.0, row_sum))
    tl.store(totals + row, tl.sum(total, axis=0))


@triton.jit
def write_gradient(
    logits, row_stride, inverse_temperature, tops, factors, offsets,
    label_tops, label_factors, read, V, WITH_LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits = factor * exp(z / T - top) + offset, plus the labels' at temperature 1 where it is another; 0 for rows unread."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    top = tl.load(tops + row)
    shift = tl.where(top == float("-inf"), 0.0, top)
    factor = tl.load(factors + row)
    offset = tl.load(offsets + row)
    is_read = tl.load(read + row) != 0
    label_top = tl.load(label_tops + row)
    label_shift = tl.where(label_top == float("-inf"), 0.0, label_top)
    label_factor = tl.load(label_factors + row)
    for start in range(0, V, BLOCK):
        place = logits + row * row_stride + start + lanes
        inside = start + lanes < V
        z = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
        gradient = factor * tl.exp(z * inverse_temperature - shift) + offset
        if WITH_LABELS:
            gradient += label_factor * tl.exp(z - label_shift)
        gradient = tl.where(is_read, gradient, 0.0)
        tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)
