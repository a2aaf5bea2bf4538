"""LLVM's own vectors for numba's intrinsics: logits and keys of an array, exp, sums.

numba's loops leave much of a processor unused; for one, bits that are reinterpreted as floats go through memory. LLVM turns a
vector into whatever the processor has, 512 bits or less, so one version serves all. A sum has the same lanes everywhere, joined
in one order.

Keys are integers in the order of the logits and as wide: the bits, with all but the first inverted if they are negative. A NaN
is above or below all numbers, depending on its sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from kdcache.teacher.select.exact_weights import COEFFICIENTS, LOG2_E, LOWEST_WEIGHT_EXPONENT, MAGIC

_LOWEST_EXPONENT = -126
FLOAT, BIT, HALF, WORD, LONG = ir.FloatType(), ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64)
LANES = 16
FLOATS, WORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(WORD, LANES)


def fill(kind: ir.VectorType, value: float) -> ir.Constant:
    if kind.element == FLOAT:
        value = float(np.float32(value))
    return ir.Constant(kind, [value] * kind.count)


def splat(builder: Any, value: Any, count: int = LANES) -> Any:
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(WORD, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(WORD, count), [0] * count))


def call(builder: Any, name: str, kind: Any, *arguments: Any) -> Any:
    function = ir.FunctionType(kind, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return call(builder, f"llvm.fmuladd.v{LANES}f32", FLOATS, x, y, z)


class Array:
    """A one-dimensional C-contiguous array in a function that is being built."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any) -> None:
        made = context.make_array(kind)(context, builder, value)
        self._builder = builder
        self._address = builder.ptrtoint(made.data, LONG)
        self.size = builder.extract_value(made.shape, 0)
        self.bits = kind.dtype.bitwidth

    def at(self, index: Any) -> Any:
        """The address of an element."""
        return self._builder.add(self._address, self._builder.mul(index, ir.Constant(LONG, self.bits // 8)))

    def load(self, address: Any, kind: Any, offset: int = 0) -> Any:
        """A vector that starts `offset` elements after an address."""
        return self._builder.load(self._pointer(address, kind, offset), align=self.bits // 8)

    def store(self, value: Any, address: Any, offset: int = 0) -> None:
        self._builder.store(value, self._pointer(address, value.type, offset), align=self.bits // 8)

    def _pointer(self, address: Any, kind: Any, offset: int) -> Any:
        address = self._builder.add(address, ir.Constant(LONG, offset * self.bits // 8))
        return self._builder.inttoptr(address, kind.as_pointer())

    def floats(self, address: Any, offset: int) -> Any:
        """16 logits."""
        if self.bits == 32:
            return self.load(address, FLOATS, offset)
        halves = self.load(address, ir.VectorType(HALF, LANES), offset)
        words = self._builder.shl(self._builder.zext(halves, WORDS), fill(WORDS, 16))
        return self._builder.bitcast(words, FLOATS)

    def floats_in_any_order(self, address: Any, offset: int) -> tuple[Any, Any]:
        """32 logits; of bfloat16 those at even and at odd offsets, so that no half has to move to another word."""
        if self.bits == 32:
            return self.load(address, FLOATS, offset), self.load(address, FLOATS, offset + LANES)
        words, builder = self.load(address, WORDS, offset), self._builder
        even, odd = builder.shl(words, fill(WORDS, 16)), builder.and_(words, fill(WORDS, -0x10000))
        return builder.bitcast(even, FLOATS), builder.bitcast(odd, FLOATS)

    def keys(self, address: Any, offset: int) -> Any:
        """The keys of 32 or 16 logits."""
        kind = ir.VectorType(ir.IntType(self.bits), 512 // self.bits)
        x = self.load(address, kind, offset)
        sign = self._builder.ashr(x, fill(kind, self.bits - 1))
        return self._builder.xor(x, self._builder.and_(sign, fill(kind, 2 ** (self.bits - 1) - 1)))

    def reaches(self, keys: Any, bound: Any) -> Any:
        """Which of the keys are at least an int32."""
        bound = bound if self.bits == 32 else self._builder.trunc(bound, keys.type.element)
        return self._builder.icmp_signed(">=", keys, splat(self._builder, bound, keys.type.count))


class Exp:
    """exp((x - top) * scale) for x <= top; 0 below 2^-126; NaN for NaN.

    Its relative error is at most 3e-7, and 7.5e-8 more for each nat below 1, since x - top and
    log2(e) are rounded. All processors with fused multiply-add give the same bits; others round
    multiply-adds twice, so their last bits differ.
    """

    def __init__(self, builder: Any, top: Any, scale: Any) -> None:
        self._builder = builder
        self._top = splat(builder, top)
        self._factor = splat(builder, builder.fmul(scale, ir.Constant(FLOAT, float(np.float32(LOG2_E)))))

    def terms(self, x: Any) -> tuple[Any, Any, Any, Any]:
        """Whether exp is not 0; its factors 2^f and 2^n; x - top."""
        builder, magic = self._builder, fill(FLOATS, MAGIC)
        difference = builder.fsub(x, self._top)
        t = fma(builder, difference, self._factor, magic)
        f = fma(builder, difference, self._factor, builder.fsub(magic, t))
        power = fill(FLOATS, COEFFICIENTS[0])
        for coefficient in COEFFICIENTS[1:]:
            power = fma(builder, power, f, fill(FLOATS, coefficient))
        exponent = builder.bitcast(builder.shl(builder.bitcast(t, WORDS), fill(WORDS, 23)), FLOATS)
        is_some = builder.fcmp_unordered(">=", t, fill(FLOATS, MAGIC + _LOWEST_EXPONENT))
        return is_some, power, exponent, difference

    def add(self, x: Any, total: Any) -> Any:
        """The total plus exp."""
        is_some, power, exponent, _ = self.terms(x)
        return self._builder.select(is_some, fma(self._builder, power, exponent, total), total)


class Weight:
    """exp(x - top) of a number or a vector; 0 below 2^-100, NaN for NaN. The same bits on every processor: see `exact_weights`.

    Its relative error is at most 4e-7, and 1.5e-7 more for each nat below 1. Without meaning for x > top.
    """

    def __init__(self, builder: Any, top: Any) -> None:
        self._builder, self._top = builder, top

    def of(self, x: Any) -> Any:
        builder, is_vector = self._builder, isinstance(x.type, ir.VectorType)

        def constant(value: float, kind: Any = x.type) -> ir.Constant:
            return fill(kind, value) if is_vector else ir.Constant(kind, float(np.float32(value)) if kind == FLOAT else value)

        words = WORDS if is_vector else WORD
        difference = builder.fsub(x, splat(builder, self._top) if is_vector else self._top)
        scaled = builder.fmul(difference, constant(LOG2_E))
        t = builder.fadd(scaled, constant(MAGIC))
        f = builder.fsub(scaled, builder.fsub(t, constant(MAGIC)))
        power = constant(COEFFICIENTS[0])
        for coefficient in COEFFICIENTS[1:]:
            power = builder.fadd(builder.fmul(power, f), constant(coefficient))
        exponent = builder.bitcast(builder.shl(builder.bitcast(t, words), constant(23, words)), x.type)
        is_some = builder.fcmp_unordered(">=", t, constant(MAGIC + LOWEST_WEIGHT_EXPONENT))
        return builder.select(is_some, builder.fmul(power, exponent), constant(0.0))


def sum_of(builder: Any, vectors: list[Any]) -> Any:
    """Add pairs of vectors first, then halves of the last one, in the order of `_torch_draws.sum_strips`."""
    while len(vectors) > 1:
        vectors = [builder.fadd(one, other) for one, other in zip(vectors[::2], vectors[1::2], strict=True)]
    (found,) = vectors
    for half in (8, 4, 2, 1):
        upper = ir.Constant(ir.VectorType(WORD, LANES), [(lane + half) % LANES for lane in range(LANES)])
        found = builder.fadd(found, builder.shuffle_vector(found, found, upper))
    return builder.extract_element(found, ir.Constant(WORD, 0))
