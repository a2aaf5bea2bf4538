"""The compiled kernels: in place, no [P, V] temporary, about 0.4 ns per logit and core. Defined by `reference`.

How the logits of a position become its gradient, all but the O(K) part vectorised:
1. its support's logits are lifted out into a K-buffer, -inf is left there: what remains is the tail;
2. the tail's maximum, then exp(z - maximum) in place and its sum: log Q_tail without the cancellation of 1 - sum(Q), and
   no underflow however small the tail is next to the support;
3. each of D divergences on K+1 buckets, in float64: loss and h (see `reference` for the general form, `divergences._numba` for
   the functions, whose addresses are an argument here); what a divergence does not read of the K is in its tail;
4. the logits times one scalar, and K entries written over them.
Target ids at another temperature than the teacher's cost a second exp per logit, and a uniform tail one more sum.

Serial functions that release the GIL; `numba_kernels` splits the positions between threads. Every function that is called by
name is in this file: numba's on-disk cache notices a change of this file only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kdcache.compiled import inlined
from kdcache.kernels.divergences import TAIL_POLICIES

_DROP, _RENORMALIZE, _BUCKET, _UNIFORM = range(len(TAIL_POLICIES))
_LOG_P, _P, _LOG_Q, _Q, _H, _ESTIMATE, _TARGET = range(7)

# Float32 sums are closed after so many terms and added up in float64: the error does not grow with the vocabulary.
_SUM_BLOCK = 4096

_LOG2_E = 1.4426950408889634
_MAGIC = 1.5 * 2**23 + 127
# ln 2 in two parts; the first has few enough bits that its product with an exponent is exact.
_COARSE_LN2, _FINE_LN2 = 0.693359375, -2.12194440e-4
# Minimax on |r| <= ln(2)/2, from the Cephes library's expf.
_EXP_COEFFICIENTS = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0,
)  # fmt: skip
_FLOAT, _INT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_LANES = 16
_STRIP = 8 * _LANES


def _constant(like: Any, value: float) -> ir.Constant:
    """Of a scalar's type, or one for each lane of a vector."""
    constant = value if like.type in (_INT, ir.VectorType(_INT, _LANES)) else float(np.float32(value))
    return ir.Constant(like.type, [constant] * _LANES if isinstance(like.type, ir.VectorType) else constant)


def _call_llvm(builder: ir.IRBuilder, name: str, *arguments: Any) -> Any:
    (kind, *_) = kinds = [argument.type for argument in arguments]
    suffix = f"v{_LANES}f32" if isinstance(kind, ir.VectorType) else "f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, kinds), f"{name}.{suffix}")
    return builder.call(function, arguments)


def _multiply_add(builder: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    return _call_llvm(builder, "llvm.fmuladd", x, y, z)


def _emit_exp(builder: ir.IRBuilder, x: Any) -> Any:
    # A float32 this large has no bits after the point, and the exponent of 2^n as its last ones.
    t = _multiply_add(builder, x, _constant(x, _LOG2_E), _constant(x, _MAGIC))
    n = builder.fsub(t, _constant(x, _MAGIC))
    r = _multiply_add(builder, n, _constant(x, -_COARSE_LN2), x)
    r = _multiply_add(builder, n, _constant(x, -_FINE_LN2), r)
    value = _constant(x, _EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        value = _multiply_add(builder, value, r, _constant(x, coefficient))
    bits = builder.bitcast(t, ir.VectorType(_INT, _LANES) if isinstance(x.type, ir.VectorType) else _INT)
    power = builder.bitcast(builder.shl(bits, _constant(bits, 23)), x.type)
    is_none = builder.fcmp_ordered("<", x, _constant(x, -87.3))
    return builder.select(is_none, _constant(x, 0.0), builder.fmul(value, power))


def _typed(num_arguments: int, emit: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
    """What an intrinsic returns: a signature of float32 only, and emit(builder, *arguments) as its code."""

    def generate(*call: Any) -> Any:
        _, builder, _, arguments = call
        return emit(builder, *arguments)

    return types.float32(*[types.float32] * num_arguments), generate


def _declare_exp(typing_context: Any, x: Any) -> Any:
    """exp of a float32 <= 88, within 2e-7 of its value; 0 below -87.3 (no denormals), NaN for NaN.

    2^n * polynomial(x - n ln 2), without a branch. math.exp becomes one libm call per element (5 to 11 ns instead of 0.3): the
    llvmlite wheels are built without SVML.
    """
    del typing_context, x
    return _typed(1, _emit_exp)


def _over_strips(first: float, combine: Callable[..., Any], join: Callable[..., Any], *kinds: Any) -> Any:
    """What an intrinsic over whole strips of a vector returns: a float32, which four vectors in registers come to.

    Always these lanes, joined in one order: numba's own loops have as many as a processor likes, and other sums on each.

    Args:
        first: of every lane.
        combine: (builder, lanes so far, 16 numbers, further arguments) -> the lanes, and what is written back, or None.
        join: (builder, one, other) -> two of them joined.
        kinds: numba's types of the vector and of the further arguments.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        values, vector = context.make_array(signature.args[0])(context, builder, arguments[0]), ir.VectorType(_FLOAT, _LANES)
        lanes = [cgutils.alloca_once_value(builder, ir.Constant(vector, [first] * _LANES)) for _ in range(_STRIP // _LANES)]
        for lane in lanes:
            builder.store(ir.Constant(vector, [first] * _LANES), lane)
        size = builder.extract_value(values.shape, 0)
        with cgutils.for_range(builder, builder.udiv(size, ir.Constant(_LONG, _STRIP))) as loop:
            for i, lane in enumerate(lanes):
                start = builder.add(builder.mul(loop.index, ir.Constant(_LONG, _STRIP)), ir.Constant(_LONG, i * _LANES))
                pointer = builder.bitcast(builder.gep(values.data, [start]), vector.as_pointer())
                joined, written = combine(builder, builder.load(lane), builder.load(pointer, align=4), *arguments[1:])
                builder.store(joined, lane)
                if written is not None:
                    builder.store(written, pointer, align=4)
        found = [builder.load(lane) for lane in lanes]
        while len(found) > 1:
            found = [join(builder, one, other) for one, other in zip(found[::2], found[1::2], strict=True)]
        (found,) = found
        for half in [_LANES >> n for n in range(1, _LANES.bit_length())]:
            upper = ir.Constant(ir.VectorType(_INT, _LANES), [(lane + half) % _LANES for lane in range(_LANES)])
            found = join(builder, found, builder.shuffle_vector(found, found, upper))
        return builder.extract_element(found, ir.Constant(_INT, 0))

    return types.float32(*kinds), generate


def _add(builder: ir.IRBuilder, x: Any, y: Any) -> Any:
    return builder.fadd(x, y)


def _larger(builder: ir.IRBuilder, x: Any, y: Any) -> Any:
    return _call_llvm(builder, "llvm.maximum", x, y)


def _declare_maximum(typing_context: Any, values: Any) -> Any:
    """Maximum of whole strips; NaN if any is: llvm.maximum, unlike llvm.maxnum and Python's max, lets NaN through."""
    del typing_context
    return _over_strips(-math.inf, lambda builder, lanes, x: (_larger(builder, lanes, x), None), _larger, values)


def _declare_sum(typing_context: Any, values: Any) -> Any:
    """Sum of whole strips."""
    del typing_context
    return _over_strips(0.0, lambda builder, lanes, x: (builder.fadd(lanes, x), None), _add, values)


def _declare_exp_strips(typing_context: Any, values: Any, top: Any) -> Any:
    """exp(x - top) in place, of whole strips; their sum."""
    del typing_context, top

    def combine(builder: ir.IRBuilder, lanes: Any, x: Any, top: Any) -> Any:
        first = builder.insert_element(ir.Constant(x.type, ir.Undefined), top, ir.Constant(_INT, 0))
        tops = builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_INT, _LANES), [0] * _LANES))
        e = _emit_exp(builder, builder.fsub(x, tops))
        return builder.fadd(lanes, e), e

    return _over_strips(0.0, combine, _add, values, types.float32)


def _declare_call(typing_context: Any, address: Any, x: Any, options: Any) -> Any:
    """The divergence at an address, of numba's own calling convention."""
    del typing_context, address

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        conventions, (result, kinds) = context.call_conv, (signature.return_type, signature.args[1:])
        kind = conventions.get_function_type(result, kinds).as_pointer()
        pointer = builder.inttoptr(arguments[0], kind)
        status, value = conventions.call_function(builder, pointer, result, kinds, arguments[1:])
        with cgutils.if_unlikely(builder, status.is_error):
            conventions.return_status_propagate(builder, status)
        return value

    return types.float64(types.int64, x, options), generate


_call: Callable[..., Any] = intrinsic(_declare_call)
_exp: Callable[..., Any] = intrinsic(_declare_exp)
_maximum_of_strips: Callable[..., Any] = intrinsic(_declare_maximum)
_sum_of_strips: Callable[..., Any] = intrinsic(_declare_sum)
_exp_strips: Callable[..., Any] = intrinsic(_declare_exp_strips)


@inlined
def _maximum_of(z_V):
    whole = len(z_V) // _STRIP * _STRIP
    top = _maximum_of_strips(z_V[:whole])
    for j in range(whole, len(z_V)):
        # A NaN in either stays.
        if not z_V[j] <= top:
            top = z_V[j] if top == top else top
    return top


@inlined
def _to_exp(z_V, top):
    """z = exp(z - top), and its sum."""
    total, whole = 0.0, len(z_V) // _STRIP * _STRIP
    for start in range(0, whole, _SUM_BLOCK):
        total += np.float64(_exp_strips(z_V[start : min(start + _SUM_BLOCK, whole)], top))
    for j in range(whole, len(z_V)):
        z_V[j] = _exp(z_V[j] - top)
        total += np.float64(z_V[j])
    return total


@inlined
def _sum_of(z_V):
    total, whole = 0.0, len(z_V) // _STRIP * _STRIP
    for start in range(0, whole, _SUM_BLOCK):
        total += np.float64(_sum_of_strips(z_V[start : min(start + _SUM_BLOCK, whole)]))
    for j in range(whole, len(z_V)):
        total += np.float64(z_V[j])
    return total


@inlined
def _scale(z_V, factor, offset):
    for j in range(len(z_V)):
        z_V[j] = z_V[j] * factor + offset


@inlined
def _add_scaled(z_V, factor, other_V):
    for j in range(len(z_V)):
        z_V[j] += factor * other_V[j]


@inlined
def _lift_support(z_V, ids_K, z_K, left):
    """Move the support's logits into z_K (-inf at padding), leaving `left` there."""
    for k in range(len(ids_K)):
        z_K[k] = -np.inf
        if ids_K[k] >= 0:
            z_K[k] = z_V[ids_K[k]]
            z_V[ids_K[k]] = left


@inlined
def _write_support(z_V, ids_K, value):
    for k in range(len(ids_K)):
        if ids_K[k] >= 0:
            z_V[ids_K[k]] = value


@inlined
def _total(x_K1):
    """Sum of float64, in an order that no vector's width changes."""
    one, two, three, four = 0.0, 0.0, 0.0, 0.0
    whole = len(x_K1) // 4 * 4
    for b in range(0, whole, 4):
        one += x_K1[b]
        two += x_K1[b + 1]
        three += x_K1[b + 2]
        four += x_K1[b + 3]
    for b in range(whole, len(x_K1)):
        one += x_K1[b]
    return (one + two) + (three + four)


@inlined
def _with_support(z_K, tail_lse, room_K):
    """log(exp(tail_lse) + sum(exp(z_K))), float64."""
    top = tail_lse
    for k in range(len(z_K)):
        if z_K[k] > top:
            top = np.float64(z_K[k])
    for k in range(len(z_K)):
        room_K[k] = _exp(np.float32(z_K[k] - top))
    return top + math.log(math.exp(tail_lse - top) + _total(room_K))


@inlined
def _fill_student(z_K, tail_lse, lse, student_2K1):
    for k in range(len(z_K)):
        student_2K1[0, k] = z_K[k] - lse
        student_2K1[1, k] = math.exp(z_K[k] - lse)
    student_2K1[0, len(z_K)] = tail_lse - lse
    student_2K1[1, len(z_K)] = math.exp(tail_lse - lse)


@inlined
def _is_read(ids_K, logprobs_K, k):
    """A logprob of +inf marks an entry that this divergence does not read, see `numba_kernels`."""
    return ids_K[k] >= 0 and logprobs_K[k] != np.inf


@inlined
def _count_read(ids_K, logprobs_K, stop):
    count = 0
    for k in range(stop):
        count += _is_read(ids_K, logprobs_K, k)
    return count


@inlined
def _fill_teacher(ids_K, logprobs_K, num_exact, tail, tail_mass, target_id, x_7K1):
    """The teacher's masses and their logs, and which entry is what; `tail_mass` is that of the bucket."""
    num_entries, in_tail = len(ids_K), 1.0 if target_id >= 0 else 0.0
    x_7K1[_ESTIMATE] = 0.0
    x_7K1[_TARGET] = 0.0
    for k in range(num_entries):
        x_7K1[_LOG_P, k], x_7K1[_P, k] = -np.inf, 0.0
        if _is_read(ids_K, logprobs_K, k):
            if k >= num_exact:
                x_7K1[_ESTIMATE, k] = 1.0
            x_7K1[_LOG_P, k], x_7K1[_P, k] = logprobs_K[k], _exp(logprobs_K[k])
            if ids_K[k] == target_id:
                x_7K1[_TARGET, k], in_tail = 1.0, 0.0
    x_7K1[_TARGET, num_entries] = in_tail
    total = _total(x_7K1[_P, :num_entries])
    x_7K1[_LOG_P, num_entries], x_7K1[_P, num_entries] = math.log(tail_mass), tail_mass
    if tail == _RENORMALIZE and total > 0:
        log_total = math.log(total)
        for k in range(num_entries):
            x_7K1[_LOG_P, k] -= log_total
            x_7K1[_P, k] /= total


@inlined
def _close_tail(ids_K, logprobs_K, student_2K1, x_7K1):
    """Copy the student's buckets, those that are not read into the tail; log of the tail's mass."""
    last = len(ids_K)
    log_tail = student_2K1[0, last]
    x_7K1[_LOG_Q], x_7K1[_Q] = student_2K1[0], student_2K1[1]
    for k in range(last):
        if logprobs_K[k] == np.inf and ids_K[k] >= 0:
            top = max(log_tail, student_2K1[0, k])
            if top != -np.inf:
                log_tail = top + math.log(math.exp(log_tail - top) + math.exp(student_2K1[0, k] - top))
            x_7K1[_LOG_Q, k], x_7K1[_Q, k] = -np.inf, 0.0
    x_7K1[_LOG_Q, last], x_7K1[_Q, last] = log_tail, math.exp(log_tail)
    return log_tail


@inlined
def _open_tail(ids_K, logprobs_K, log_tail, student_2K1, x_7K1):
    """The tail's h shared among what is in it, as the masses are."""
    last = len(ids_K)
    h = x_7K1[_H, last]
    for k in range(last):
        if logprobs_K[k] == np.inf and ids_K[k] >= 0:
            x_7K1[_H, k] = h * math.exp(student_2K1[0, k] - log_tail) if h != 0 and log_tail != -np.inf else 0.0
    if log_tail != -np.inf:
        x_7K1[_H, last] = h * math.exp(student_2K1[0, last] - log_tail)


@inlined
def _to_tail(z_V):
    """z = exp(z - its maximum), 0 where that is -inf; log(sum(exp(z))), and the sum of what is now in z."""
    top = _maximum_of(z_V)
    if top == -np.inf:
        # No tail, or one that the student cannot give.
        z_V[:] = np.float32(0.0)
        return top, 1.0
    total = _to_exp(z_V, top)
    return top + math.log(total), total


@inlined
def _do_position(
    i, z_V, ids_K, logprobs_PDK, num_exact_PD, tail_mass_PD, factors_PD, options_PD, tails_D, addresses_D,
    target_id, target_share, weight, temperature, z_K, rooms, target_V, values_D1, want_gradient,
):  # fmt: skip
    """One position's loss; its logits become weight * gradient, or are left in disorder where no gradient is wanted."""
    student_2K1, x_7K1, h_K1 = rooms
    target_share = target_share if target_id >= 0 else 0.0
    # At temperature 1 target ids need no exp of their own.
    share_here = target_share if temperature == 1 else 0.0
    target_z = np.float64(z_V[target_id]) if target_share > 0 else 0.0
    if temperature != 1:
        if target_share > 0:
            target_V[:] = z_V
        _scale(z_V, np.float32(1 / temperature), np.float32(0.0))

    is_uniform = False
    for d in range(len(tails_D)):
        is_uniform |= tails_D[d] == _UNIFORM
    # 0 is left where the tail's logits are to be added up.
    _lift_support(z_V, ids_K, z_K, np.float32(0.0 if is_uniform else -np.inf))
    outside_z = 0.0
    if is_uniform:
        outside_z = _sum_of(z_V)
        _write_support(z_V, ids_K, np.float32(-np.inf))
    tail_lse, tail_sum = _to_tail(z_V)
    lse = _with_support(z_K, tail_lse, x_7K1[_Q, : len(z_K)])
    _fill_student(z_K, tail_lse, lse, student_2K1)

    loss, total, offset = 0.0, share_here, 0.0
    h_K1[:] = 0.0
    for d in range(len(tails_D)):
        logprobs_K, tail, tail_mass = logprobs_PDK[i, d], tails_D[d], tail_mass_PD[i, d]
        num_read = _count_read(ids_K, logprobs_K, len(ids_K))
        # The tail is what is no exact entry: estimates, where there are any, are within it.
        has_tail = len(z_V) > _count_read(ids_K, logprobs_K, min(num_exact_PD[i, d], len(ids_K)))
        _fill_teacher(
            ids_K, logprobs_K, num_exact_PD[i, d], tail, tail_mass if tail == _BUCKET and has_tail else 0.0, target_id, x_7K1
        )
        log_tail = _close_tail(ids_K, logprobs_K, student_2K1, x_7K1)
        x_7K1[_H] = 0.0
        value, slope = _call(addresses_D[d], x_7K1, options_PD[i, d]), factors_PD[i, d] * temperature
        _open_tail(ids_K, logprobs_K, log_tail, student_2K1, x_7K1)
        if slope > 0:
            for b in range(x_7K1.shape[1]):
                h = x_7K1[_H, b] * slope
                h_K1[b] += h
                total -= h
        if tail == _UNIFORM and tail_mass > 0 and len(z_V) > num_read:
            num_outside, mean_z = len(z_V) - num_read, outside_z
            for k in range(len(ids_K)):
                if ids_K[k] >= 0 and not _is_read(ids_K, logprobs_K, k):
                    mean_z += z_K[k]
                    h_K1[k] -= slope * tail_mass / num_outside
            value += tail_mass * (math.log(tail_mass) - math.log(num_outside) - mean_z / num_outside + lse)
            total += slope * tail_mass
            offset -= slope * tail_mass / num_outside
        values_D1[d] = value * temperature * temperature
        if slope > 0:
            loss += value * (slope * temperature)
    if share_here > 0:
        values_D1[len(tails_D)] = lse - target_z
        loss += target_share * (lse - target_z)

    if want_gradient:
        dense = (total * student_2K1[1, len(ids_K)] + h_K1[len(ids_K)]) / tail_sum
        _scale(z_V, np.float32(weight * dense), np.float32(weight * offset))
        for k in range(len(ids_K)):
            if ids_K[k] >= 0:
                # Added in float64 and rounded once: near convergence q - p is a small difference of large numbers.
                z_V[ids_K[k]] = weight * (total * student_2K1[1, k] + h_K1[k])
    if share_here != target_share:
        target_lse, target_sum = _to_tail(target_V)
        values_D1[len(tails_D)] = target_lse - target_z
        loss += target_share * (target_lse - target_z)
        if want_gradient:
            _add_scaled(z_V, np.float32(weight * target_share / target_sum), target_V)
    if want_gradient and target_share > 0:
        z_V[target_id] = z_V[target_id] - weight * target_share
    return loss


@inlined
def _rooms(num_entries):
    """Of one thread: a position's buckets of the student, of one divergence, and h of all."""
    return np.empty((2, num_entries + 1)), np.empty((7, num_entries + 1)), np.empty(num_entries + 1)


def float32_positions(
    logits_PV, ids_PK, logprobs_PDK, num_exact_PD, tail_mass_PD, factors_PD, options_PD, tails_D, addresses_D,
    target_ids_P, target_shares_P, weights_P, temperature, want_gradient, start, stop, losses_P, values_PD1,
):  # fmt: skip
    num_entries, vocab_size = ids_PK.shape[1], logits_PV.shape[1]
    z_K, rooms = np.empty(num_entries, np.float32), _rooms(num_entries)
    copy_V = np.empty(0 if want_gradient else vocab_size, np.float32)
    target_V = np.empty(vocab_size if temperature != 1 else 0, np.float32)
    for i in range(start, stop):
        values_PD1[i] = 0.0
        if weights_P[i] == 0.0:
            losses_P[i] = 0.0
            if want_gradient:
                logits_PV[i] = np.float32(0.0)
            continue
        z_V = logits_PV[i]
        if not want_gradient:
            copy_V[:] = z_V
            z_V = copy_V
        losses_P[i] = _do_position(
            i, z_V, ids_PK[i], logprobs_PDK, num_exact_PD, tail_mass_PD, factors_PD, options_PD, tails_D, addresses_D,
            target_ids_P[i], target_shares_P[i], weights_P[i], temperature, z_K, rooms, target_V, values_PD1[i], want_gradient,
        )  # fmt: skip


def bfloat16_positions(
    logits_PV, ids_PK, logprobs_PDK, num_exact_PD, tail_mass_PD, factors_PD, options_PD, tails_D, addresses_D,
    target_ids_P, target_shares_P, weights_P, temperature, want_gradient, start, stop, losses_P, values_PD1,
):  # fmt: skip
    """As float32_positions, for the bits of bfloat16: through one float32 copy of a position's logits, which stays in the
    core's cache."""
    num_entries, vocab_size = ids_PK.shape[1], logits_PV.shape[1]
    z_K, rooms = np.empty(num_entries, np.float32), _rooms(num_entries)
    bits_V = np.empty(vocab_size, np.uint32)
    z_V = bits_V.view(np.float32)
    target_V = np.empty(vocab_size if temperature != 1 else 0, np.float32)
    for i in range(start, stop):
        values_PD1[i] = 0.0
        if weights_P[i] == 0.0:
            losses_P[i] = 0.0
            if want_gradient:
                logits_PV[i] = np.uint16(0)
            continue
        for j in range(len(bits_V)):
            bits_V[j] = np.uint32(logits_PV[i, j]) << np.uint32(16)
        losses_P[i] = _do_position(
            i, z_V, ids_PK[i], logprobs_PDK, num_exact_PD, tail_mass_PD, factors_PD, options_PD, tails_D, addresses_D,
            target_ids_P[i], target_shares_P[i], weights_P[i], temperature, z_K, rooms, target_V, values_PD1[i], want_gradient,
        )  # fmt: skip
        if want_gradient:
            _narrow(bits_V, logits_PV[i])


@inlined
def _narrow(bits_V, out_V):
    """float32 bits to bfloat16 bits: to nearest, ties to even; NaN stays NaN instead of rounding over into a number."""
    for j in range(len(bits_V)):
        bits = bits_V[j]
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out_V[j] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)
