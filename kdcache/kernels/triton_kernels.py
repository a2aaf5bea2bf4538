"""The kernels for CUDA, in Triton: two passes over a position's logits, with the O(K) part of a divergence between them.

1. `lift`: the logits of the lifted ids are copied out and -inf is left in their address: what remains is the tail.
2. `tail_statistics`: maximum, sum of exp and, for a uniform tail, the sum of the tail; one read.
3. (by the caller, on (P, K+1) values in torch) the divergence: one factor and one offset per position, and L gradients.
4. `write_gradient`: z = factor * exp(z - maximum) + offset, in address, one read and one write; `put` writes the lifted ids.

Every gradient is written once, from float32, so that bfloat16 rounds it once. Launched with torch tensors by
`kdcache.loss.steps.triton_passes`; torch itself is not imported here.

Only `tl.constexpr` parameters have annotations: Triton's compiler looks every other annotation up as a name that the kernel
uses, and refuses it. Its interpreter does not; `tests/kernels/test_triton_compiles.py` compiles each kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_SIZE = 4096
NUM_WARPS = 8


@triton.jit
def lift(logits, stride, ids, lifted, left, V, NUM_IDS: tl.constexpr, BLOCK_IDS: tl.constexpr):
    """lifted (P, K+1) float32 = the logits of ids (P, K+1), -inf where the id is -1; `left` is left in their address.

    An id of V or more is not in the vocabulary: NaN, and nothing is read or written for it.
    """
    position = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_IDS)
    inside = columns < NUM_IDS
    id_ = tl.load(ids + position * NUM_IDS + columns, mask=inside, other=-1)
    is_id = (id_ >= 0) & (id_ < V)
    value = tl.load(logits + position * stride + id_, mask=is_id, other=float("-inf")).to(tl.float32)
    tl.store(lifted + position * NUM_IDS + columns, tl.where(id_ < V, value, float("nan")), mask=inside)
    filling = tl.zeros([BLOCK_IDS], tl.float32) + left
    tl.store(logits + position * stride + id_, filling.to(logits.dtype.element_ty), mask=is_id)


@triton.jit
def put(logits, stride, ids, values, V, NUM_IDS: tl.constexpr, BLOCK_IDS: tl.constexpr):
    """logits at ids (P, K+1) = values (P, K+1); nothing where the id is -1, or V or more."""
    position = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_IDS)
    id_ = tl.load(ids + position * NUM_IDS + columns, mask=columns < NUM_IDS, other=-1)
    value = tl.load(values + position * NUM_IDS + columns, mask=columns < NUM_IDS, other=0.0)
    tl.store(logits + position * stride + id_, value.to(logits.dtype.element_ty), mask=(id_ >= 0) & (id_ < V))


@triton.jit
def tail_statistics(logits, stride, inverse_temperature, tops, sums, totals, V, BLOCK: tl.constexpr):
    """Of z = logits / T: tops (P,) = max z; sums (P,) = sum exp(z - top), 1 where top is -inf; totals (P,) = sum z.

    The running maximum and sum are kept per lane and joined at the end: one read of the logits.
    """
    position = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    sum_ = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + lanes < V
        z = tl.load(logits + position * stride + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        z = z * inverse_temperature
        larger = tl.maximum(top, z)
        # exp(-inf - -inf) is NaN; a lane that has seen nothing but -inf has the sum 0.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        sum_ = sum_ * tl.exp(top - shift) + tl.exp(z - shift)
        total += tl.where(inside, z, 0.0)
        top = larger
    highest = tl.max(top, axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    summed = tl.sum(sum_ * tl.exp(top - shift), axis=0)
    tl.store(tops + position, highest)
    tl.store(sums + position, tl.where(highest == float("-inf"), 1.0, summed))
    tl.store(totals + position, tl.sum(total, axis=0))


@triton.jit
def write_gradient(
    logits, stride, inverse_temperature, tops, factors, offsets,
    target_tops, target_factors, read, V, WITH_TARGET_IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits = factor * exp(z / T - top) + offset, plus the target id's term at another temperature; 0 for positions unread."""
    position = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    top = tl.load(tops + position)
    shift = tl.where(top == float("-inf"), 0.0, top)
    factor = tl.load(factors + position)
    offset = tl.load(offsets + position)
    is_read = tl.load(read + position) != 0
    target_top = tl.load(target_tops + position)
    target_shift = tl.where(target_top == float("-inf"), 0.0, target_top)
    target_factor = tl.load(target_factors + position)
    for start in range(0, V, BLOCK):
        address = logits + position * stride + start + lanes
        inside = start + lanes < V
        z = tl.load(address, mask=inside, other=float("-inf")).to(tl.float32)
        gradient = factor * tl.exp(z * inverse_temperature - shift) + offset
        if WITH_TARGET_IDS:
            gradient += target_factor * tl.exp(z - target_shift)
        gradient = tl.where(is_read, gradient, 0.0)
        tl.store(address, gradient.to(logits.dtype.element_ty), mask=inside)
