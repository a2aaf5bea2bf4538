"""Maxima, sums of exp and searches of a block of logits in vector registers. Keys are those of `_numba_vectors`.

A block is a C-contiguous array with the bits of bfloat16 as uint16, or of float32 as int32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kdcache.compiled import inlined
from kdcache.teacher.select._numba_vectors import (
    FLOAT,
    FLOATS,
    LANES,
    LONG,
    WORD,
    WORDS,
    Array,
    Exp,
    Weight,
    call,
    fill,
    fma,
    splat,
    sum_of,
)
from kdcache.teacher.select.exact_weights import STRIP

BLOCK = 4096
"""Logits that are read several times while they are in the core's first-level cache."""

UNIT, SPAN = STRIP, 256
"""How many tokens one step looks at; a block is a whole number of spans."""

FEWEST_LANES = 128
"""The fewest lanes that `find_maxima` takes."""

MINUS_INF = np.int32(-0x800000)
"""The bits of a float32."""


def _intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba's decorator: the function gives a signature and a generator of the code."""
    return intrinsic(function)


@_intrinsic
def _emit_maxima(typing_context, block, maxima):  # noqa: ARG001 - numba's calling convention
    def generate(context, builder, signature, arguments):
        source, target = (Array(context, builder, *pair) for pair in zip(signature.args, arguments, strict=True))
        step = 512 // source.bits
        lowest = fill(ir.VectorType(ir.IntType(source.bits), step), -(2 ** (source.bits - 1)))
        smax = f"llvm.smax.v{step}i{source.bits}"
        chunk = ir.Constant(LONG, FEWEST_LANES)
        with cgutils.for_range(builder, builder.udiv(target.size, chunk)) as lanes:
            first = builder.mul(lanes.index, chunk)
            best = [cgutils.alloca_once_value(builder, lowest) for _ in range(FEWEST_LANES // step)]
            for register in best:
                builder.store(lowest, register)
            with cgutils.for_range(builder, builder.udiv(source.size, target.size)) as strip:
                address = source.at(builder.add(first, builder.mul(strip.index, target.size)))
                for i, register in enumerate(best):
                    keys = source.keys(address, i * step)
                    builder.store(call(builder, smax, keys.type, builder.load(register), keys), register)
            for i, register in enumerate(best):
                found = builder.load(register)
                found = found if source.bits == 32 else builder.sext(found, ir.VectorType(WORD, step))
                target.store(found, target.at(first), i * step)
        return context.get_dummy_value()

    return types.void(block, maxima), generate


@_intrinsic
def _emit_sum(typing_context, block, top, scale):  # noqa: ARG001
    def generate(context, builder, signature, arguments):
        source, exp = Array(context, builder, signature.args[0], arguments[0]), Exp(builder, *arguments[1:])
        totals = [cgutils.alloca_once_value(builder, fill(FLOATS, 0.0)) for _ in range(UNIT // LANES)]
        with _units_of(builder, source) as address:
            _prefetch(builder, source, address)
            for i in range(0, len(totals), 2):
                for x, total in zip(source.floats_in_any_order(address, i * LANES), totals[i : i + 2], strict=True):
                    builder.store(exp.add(x, builder.load(total)), total)
        return sum_of(builder, [builder.load(total) for total in totals])

    return types.float32(block, types.float32, types.float32), generate


@_intrinsic
def _emit_falls(typing_context, block, top):  # noqa: ARG001
    def generate(context, builder, signature, arguments):
        source = Array(context, builder, signature.args[0], arguments[0])
        exp = Exp(builder, arguments[1], ir.Constant(FLOAT, 1.0))
        total = cgutils.alloca_once_value(builder, fill(FLOATS, 0.0))
        with _units_of(builder, source) as address:
            for i in range(0, UNIT, LANES):
                is_some, power, exponent, difference = exp.terms(source.floats(address, i))
                added = fma(builder, builder.fmul(power, exponent), difference, builder.load(total))
                builder.store(builder.select(is_some, added, builder.load(total)), total)
        return sum_of(builder, [builder.load(total)])

    return types.float32(block, types.float32), generate


@_intrinsic
def _emit_strips(typing_context, block, top, sums):  # noqa: ARG001
    def generate(context, builder, signature, arguments):
        source, target = (Array(context, builder, signature.args[i], arguments[i]) for i in (0, 2))
        weight = Weight(builder, arguments[1])
        with cgutils.for_range(builder, target.size) as loop:
            address = source.at(builder.mul(loop.index, ir.Constant(LONG, UNIT)))
            _prefetch(builder, source, address)
            parts = [weight.of(source.floats(address, i)) for i in range(0, UNIT, LANES)]
            target.store(sum_of(builder, parts), target.at(loop.index))
        return context.get_dummy_value()

    return types.void(block, types.float32, sums), generate


@_intrinsic
def _emit_weights(typing_context, unit, top, out):  # noqa: ARG001
    def generate(context, builder, signature, arguments):
        source, target = (Array(context, builder, signature.args[i], arguments[i]) for i in (0, 2))
        weight, first = Weight(builder, arguments[1]), ir.Constant(LONG, 0)
        for i in range(0, UNIT, LANES):
            target.store(weight.of(source.floats(source.at(first), i)), target.at(first), i)
        return context.get_dummy_value()

    return types.void(unit, types.float32, out), generate


@_intrinsic
def weight_of(typing_context, logit, top):  # noqa: ARG001
    """The weight of one logit, as in `exact_weights`."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        return Weight(builder, arguments[1]).of(arguments[0])

    return types.float32(types.float32, types.float32), generate


@_intrinsic
def _emit_sum_of_unit(typing_context, weights):  # noqa: ARG001
    def generate(context, builder, signature, arguments):
        source = Array(context, builder, signature.args[0], arguments[0])
        return sum_of(builder, [source.load(source.at(ir.Constant(LONG, 0)), FLOATS, i) for i in range(0, UNIT, LANES)])

    return types.float32(weights), generate


@contextmanager
def _units_of(builder: Any, source: Array) -> Iterator[Any]:
    """Loop over the addresses of an array's units."""
    with cgutils.for_range(builder, builder.udiv(source.size, ir.Constant(LONG, UNIT))) as loop:
        yield source.at(builder.mul(loop.index, ir.Constant(LONG, UNIT)))


def _prefetch(builder: Any, source: Array, address: Any) -> None:
    """Prefetch the unit one block after this one, by cache lines; an address without memory does no harm."""
    kind, hints = ir.IntType(8).as_pointer(), (ir.Constant(WORD, n) for n in (0, 3, 1))
    ahead, hints = builder.add(address, ir.Constant(LONG, BLOCK * source.bits // 8)), tuple(hints)
    for line in range(0, UNIT * source.bits // 8, 64):
        pointer = builder.inttoptr(builder.add(ahead, ir.Constant(LONG, line)), kind)
        call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *hints)


@_intrinsic
def _emit_any(typing_context, block, start, bound):  # noqa: ARG001
    # Whether the key of any of SPAN tokens reaches the bound: maxima first, one comparison at the end.
    def generate(context, builder, signature, arguments):
        source = Array(context, builder, signature.args[0], arguments[0])
        step, address = 512 // source.bits, source.at(arguments[1])
        vectors = [source.keys(address, i) for i in range(0, SPAN, step)]
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [call(builder, f"llvm.smax.v{step}i{source.bits}", one.type, one, other) for one, other in pairs]
        bits = builder.bitcast(source.reaches(vectors[0], arguments[2]), ir.IntType(step))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(block, types.int64, types.int32), generate


@_intrinsic
def _emit_which(typing_context, block, start, bound):  # noqa: ARG001
    # A mask of a unit's 64 tokens: those whose key reaches the bound.
    def generate(context, builder, signature, arguments):
        source = Array(context, builder, signature.args[0], arguments[0])
        step, address, mask = 512 // source.bits, source.at(arguments[1]), ir.Constant(LONG, 0)
        for i in range(0, UNIT, step):
            reaches = source.reaches(source.keys(address, i), arguments[2])
            bits = builder.zext(builder.bitcast(reaches, ir.IntType(step)), LONG)
            mask = builder.or_(mask, builder.shl(bits, ir.Constant(LONG, i)))
        return mask

    return types.uint64(block, types.int64, types.int32), generate


@_intrinsic
def logit_of(typing_context, bits):  # noqa: ARG001
    """The float32 that an element's bits are."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        (word,) = arguments
        if signature.args[0].bitwidth == 16:
            word = builder.shl(builder.zext(word, WORD), ir.Constant(WORD, 16))
        return builder.bitcast(word, FLOAT)

    return types.float32(bits), generate


@_intrinsic
def _trailing_zeros(typing_context, mask):  # noqa: ARG001
    def generate(context, builder, signature, arguments):  # noqa: ARG001
        return call(builder, "llvm.cttz.i64", LONG, arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@_intrinsic
def _emit_count(typing_context, keys, bound):  # noqa: ARG001
    def generate(context, builder, signature, arguments):
        source, bounds = Array(context, builder, signature.args[0], arguments[0]), splat(builder, arguments[1])
        total = cgutils.alloca_once_value(builder, fill(WORDS, 0))
        with cgutils.for_range(builder, builder.udiv(source.size, ir.Constant(LONG, LANES))) as loop:
            keys_16 = source.load(source.at(builder.mul(loop.index, ir.Constant(LONG, LANES))), WORDS)
            count, reaches = builder.load(total), builder.icmp_signed(">=", keys_16, bounds)
            builder.store(builder.select(reaches, builder.add(count, fill(WORDS, 1)), count), total)
        return call(builder, f"llvm.vector.reduce.add.v{LANES}i32", WORD, builder.load(total))

    return types.int32(keys, types.int32), generate


@inlined
def fill_last(bits_V, last):
    """Copy what follows the last whole block into a block, and pad it with -inf."""
    rest = len(bits_V) // BLOCK * BLOCK
    last[: len(bits_V) - rest] = bits_V[rest:]
    last[len(bits_V) - rest :] = MINUS_INF >> (32 - 8 * bits_V.itemsize)


@inlined
def block_of(bits_V, start, last):
    """The block that starts there, of a position's bits and its `fill_last`."""
    return bits_V[start : start + BLOCK] if start + BLOCK <= len(bits_V) else last


@inlined
def find_maxima(block, maxima):
    """maxima[l] = max over w of the key of token w * len(maxima) + l; len(maxima) is FEWEST_LANES times a power of two."""
    _emit_maxima(block, maxima)


@inlined
def sum_exp(block, top, scale):
    """Sum of exp((x - top) * scale); NaN if any logit is NaN or +inf. Prefetches the next block."""
    return _emit_sum(block, top, scale)


@inlined
def sum_falls(block, top):
    """Sum of exp(x - top) * (x - top), without terms whose exp is below 2^-126."""
    return _emit_falls(block, top)


@inlined
def sum_strips(block, top, sums):
    """sums[g] = sum of weights over the g-th unit. Prefetches the next block."""
    _emit_strips(block, top, sums)


@inlined
def weigh(unit, top, out):
    """out = the weights of one unit as in `exact_weights`: exp(x - top), 0 below 2^-100."""
    _emit_weights(unit, top, out)


@inlined
def sum_unit(weights):
    """Sum of one unit's weights, in the order of `sum_strips`."""
    return _emit_sum_of_unit(weights)


@inlined
def collect(block, first_id, num_tokens, bound, logits, ids, count):
    """Append logit and id of each of the first num_tokens whose key reaches the bound, by rising id. Gives the new count."""
    for span in range(0, num_tokens, SPAN):
        if not _emit_any(block, span, bound):
            continue
        for start in range(span, min(span + SPAN, num_tokens), UNIT):
            mask = _emit_which(block, start, bound)
            if num_tokens - start < UNIT:
                mask &= (np.uint64(1) << np.uint64(num_tokens - start)) - np.uint64(1)
            while mask != 0:
                j = start + _trailing_zeros(mask)
                logits[count] = logit_of(block[j])
                ids[count] = first_id + j
                count += 1
                mask &= mask - np.uint64(1)
    return count


@inlined
def find_bound(keys, k, lowest):
    """A key that at least k of the keys reach, and at most k + k // 8 where bisection finds such a one.

    `lowest` if fewer than k are above it. len(keys) is a multiple of 16.
    """
    low, high = np.int64(lowest), np.int64(lowest)
    for j in range(len(keys)):
        high = max(high, np.int64(keys[j]))
    high += 1
    while high - low > 1:
        middle = (low + high) >> 1
        count = _emit_count(keys, np.int32(middle))
        if count < k:
            high = middle
        else:
            low = middle
            if count <= k + k // 8:
                break
    return np.int32(low)
