"""The row kernels on a CPU: in place, no [P, V] temporary, about 0.4 ns per logit and core. Defined by `reference`.

Shape letters: P positions (rows), K entries per position (padded), V the student's vocabulary.

How a row is done, all but the O(K) part vectorised:
1. its support's logits are lifted out into a K-buffer, -inf is left in their place: what remains is the tail;
2. the tail's maximum, then exp(z - maximum) in place and its sum: log Q_tail without the cancellation of 1 - sum(Q), and
   no underflow however small the tail is beside the support;
3. the divergence on K+1 buckets, in float64: loss and h (see `reference` for the general form);
4. the row times one scalar, and K entries written over it.

Serial functions that release the GIL; `kdcache.kernels.threads` splits the rows. Every function is in this file: numba's
on-disk cache notices a change of this file only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from kdcache.kernels.base import TAIL_POLICIES, Objective, Targets, make_targets
from kdcache.kernels.threads import for_row_blocks

# reassoc is what vectorised sums need. Not nnan and ninf: they would make -inf logits undefined and let NaN vanish.
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "nsz", "contract"}, "error_model": "numpy"}
_DROP, _RENORMALIZE, _BUCKET = range(len(TAIL_POLICIES))

# Float32 sums are closed after so many terms and added up in float64: the error does not grow with the vocabulary.
_SUM_BLOCK = 4096
# Below this many logits per block, handing a block to another thread (50 to 100 microseconds) costs more than it saves.
_LOGITS_PER_BLOCK = 1 << 19

_LOG2_E = 1.4426950408889634
# ln 2 in two parts; the first has few enough bits that its product with an exponent is exact, with or without fma.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Minimax on |r| <= ln(2)/2, from the Cephes library's expf.
_EXP_COEFFICIENTS = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0,
)  # fmt: skip
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call and keep the machine code on disk, where some folder can be written."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        return njit(**_OPTIONS)(function)


def _call_llvm(builder: ir.IRBuilder, name: str, *arguments: Any) -> Any:
    signature = ir.FunctionType(_FLOAT, [_FLOAT] * len(arguments))
    return builder.call(builder.module.declare_intrinsic(name, (_FLOAT,), signature), arguments)


def _float(value: float) -> ir.Constant:
    return ir.Constant(_FLOAT, float(np.float32(value)))


def _typed(num_arguments: int, emit: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
    """What an intrinsic returns: a signature of float32 only, and emit(builder, *arguments) as its code."""

    def generate(*call: Any) -> Any:
        _, builder, _, arguments = call
        return emit(builder, *arguments)

    return types.float32(*[types.float32] * num_arguments), generate


def _emit_exp(builder: ir.IRBuilder, x: Any) -> Any:
    # NaN must not reach the conversion to an integer (undefined): maxnum gives the number there, and r keeps the NaN.
    clamped = _call_llvm(builder, "llvm.maxnum", x, _float(-88.0))
    n = _call_llvm(builder, "llvm.rint", builder.fmul(clamped, _float(_LOG2_E)))
    r = _call_llvm(builder, "llvm.fmuladd", n, _float(-_LN2_HIGH), x)
    r = _call_llvm(builder, "llvm.fmuladd", n, _float(-_LN2_LOW), r)
    value = _float(_EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        value = _call_llvm(builder, "llvm.fmuladd", value, r, _float(coefficient))
    exponent = builder.add(builder.fptosi(n, _INT), ir.Constant(_INT, 127))
    power = builder.bitcast(builder.shl(exponent, ir.Constant(_INT, 23)), _FLOAT)
    return builder.select(builder.fcmp_ordered("<", x, _float(-87.3)), _float(0.0), builder.fmul(value, power))


def _emit_maximum(builder: ir.IRBuilder, x: Any, y: Any) -> Any:
    return _call_llvm(builder, "llvm.maximum", x, y)


def _declare_exp(typing_context: Any, x: Any) -> Any:
    """exp of a float32 <= 88, within 2e-7 of its value; 0 below -87.3 (no denormals), NaN for NaN.

    2^n * polynomial(x - n ln 2), without a branch: LLVM vectorises it. math.exp becomes one libm call per element (5 to 11
    ns instead of 0.3): the llvmlite wheels are built without SVML. Multiply-adds are calls of llvm.fmuladd, because
    fastmath may reassociate plain ones and then takes the two parts of ln 2 together.
    """
    del typing_context, x
    return _typed(1, _emit_exp)


def _declare_maximum(typing_context: Any, x: Any, y: Any) -> Any:
    """The larger of two float32; NaN if either is.

    llvm.maximum and not llvm.maxnum or Python's max: only its reduction is vectorised without the nnan flag (0.04 ns per
    element instead of 1.4), and it lets NaN through.
    """
    del typing_context, x, y
    return _typed(2, _emit_maximum)


_exp: Callable[..., Any] = intrinsic(_declare_exp)
_maximum: Callable[..., Any] = intrinsic(_declare_maximum)


@_kernel
def _maximum_of(row_V):
    top = np.float32(-np.inf)
    for j in range(len(row_V)):
        top = _maximum(top, row_V[j])
    return top


@_kernel
def _exp_in_place(row_V, top):
    """row = exp(row - top), and its sum."""
    total = 0.0
    for start in range(0, len(row_V), _SUM_BLOCK):
        block = row_V[start : start + _SUM_BLOCK]
        block_total = np.float32(0.0)
        for j in range(len(block)):
            e = _exp(block[j] - top)
            block[j] = e
            block_total += e
        total += block_total
    return total


@_kernel
def _scale(row_V, factor):
    for j in range(len(row_V)):
        row_V[j] *= factor


@_kernel
def _lift_support(row_V, ids_K, z_K):
    """Move the support's logits into z_K (-inf at padding), leaving -inf behind; the number of entries."""
    num_entries = 0
    for k in range(len(ids_K)):
        z_K[k] = -np.inf
        if ids_K[k] >= 0:
            z_K[k] = row_V[ids_K[k]]
            row_V[ids_K[k]] = -np.inf
            num_entries += 1
    return num_entries


@_kernel
def _with_support(z_K, tail_lse):
    """log(exp(tail_lse) + sum(exp(z_K))), float64."""
    top = tail_lse
    for k in range(len(z_K)):
        if z_K[k] > top:
            top = np.float64(z_K[k])
    total = math.exp(tail_lse - top)
    for k in range(len(z_K)):
        total += _exp(np.float32(z_K[k] - top))
    return top + math.log(total)


@_kernel
def _teacher_masses(ids_K, logprobs_K, tail, p_K):
    """Write the teacher's masses; the log of what they, and so their logs, are to be multiplied with (`renormalize`)."""
    total = 0.0
    for k in range(len(ids_K)):
        p_K[k] = np.float32(0.0)
        if ids_K[k] >= 0:
            p_K[k] = _exp(logprobs_K[k])
        total += p_K[k]
    if tail != _RENORMALIZE or total == 0.0:
        return 0.0
    for k in range(len(ids_K)):
        p_K[k] = np.float32(p_K[k] / total)
    return -math.log(total)


@_kernel
def _forward_kl(p_K, logprobs_K, log_scale, tail_mass, z_K, lse, tail_lse):
    """Sum over buckets of P log(P/Q), and the sum of P (which is -H). Here h = -P, so that it needs no array of its own."""
    loss, total = 0.0, 0.0
    for k in range(len(p_K)):
        if p_K[k] > 0:
            loss += p_K[k] * (np.float64(logprobs_K[k]) + log_scale - np.float64(z_K[k]) + lse)
            total += p_K[k]
    if tail_mass > 0:
        loss += tail_mass * (math.log(tail_mass) - (tail_lse - lse))
        total += tail_mass
    return loss, total


@_kernel
def _do_row(row_V, ids_K, logprobs_K, tail_mass, label, weight, tail, alpha, z_K, p_K, want_gradient):
    """One row's loss; the row becomes weight * gradient, or is left in disorder where no gradient is wanted."""
    label_share = 1.0 - alpha if label >= 0 else 0.0
    label_z = np.float64(row_V[label]) if label_share > 0 else 0.0
    num_entries = _lift_support(row_V, ids_K, z_K)
    if tail != _BUCKET or num_entries == len(row_V):
        tail_mass = 0.0

    top = _maximum_of(row_V)
    if top == -np.inf:
        # No tail, or one that the student cannot give.
        tail_sum, tail_lse = 1.0, -np.inf
        row_V[:] = np.float32(0.0)
    else:
        tail_sum = _exp_in_place(row_V, top)
        tail_lse = top + math.log(tail_sum)
    lse = _with_support(z_K, tail_lse)

    loss, total = 0.0, 0.0
    if alpha > 0:
        log_scale = _teacher_masses(ids_K, logprobs_K, tail, p_K)
        loss, total = _forward_kl(p_K, logprobs_K, log_scale, tail_mass, z_K, lse, tail_lse)
        loss, total = alpha * loss, alpha * total
    if label_share > 0:
        loss += label_share * (lse - label_z)
        total += label_share
    if not want_gradient:
        return loss

    _scale(row_V, np.float32(weight * (total * math.exp(tail_lse - lse) - alpha * tail_mass) / tail_sum))
    for k in range(len(ids_K)):
        if ids_K[k] >= 0:
            # Subtracted in float64 and rounded once: near convergence q - p is a small difference of large numbers.
            gradient = total * math.exp(z_K[k] - lse)
            if alpha > 0:
                gradient -= alpha * p_K[k]
            row_V[ids_K[k]] = weight * gradient
    if label_share > 0:
        row_V[label] = row_V[label] - weight * label_share
    return loss


@_kernel
def _float32_rows(
    logits_PV, ids_PK, logprobs_PK, tail_mass_P, labels_P, weights_P, tail, alpha, want_gradient, start, stop, losses_P
):
    z_K, p_K = np.empty(ids_PK.shape[1], np.float32), np.empty(ids_PK.shape[1], np.float32)
    copy_V = np.empty(0 if want_gradient else logits_PV.shape[1], np.float32)
    for i in range(start, stop):
        if weights_P[i] == 0.0:
            losses_P[i] = 0.0
            if want_gradient:
                logits_PV[i] = np.float32(0.0)
            continue
        row_V = logits_PV[i]
        if not want_gradient:
            copy_V[:] = row_V
            row_V = copy_V
        losses_P[i] = _do_row(
            row_V, ids_PK[i], logprobs_PK[i], tail_mass_P[i], labels_P[i], weights_P[i], tail, alpha, z_K, p_K, want_gradient
        )


@_kernel
def _bfloat16_rows(
    logits_PV, ids_PK, logprobs_PK, tail_mass_P, labels_P, weights_P, tail, alpha, want_gradient, start, stop, losses_P
):
    """As _float32_rows, for the bits of bfloat16: through one float32 row, which stays in the core's cache."""
    z_K, p_K = np.empty(ids_PK.shape[1], np.float32), np.empty(ids_PK.shape[1], np.float32)
    bits_V = np.empty(logits_PV.shape[1], np.uint32)
    row_V = bits_V.view(np.float32)
    for i in range(start, stop):
        if weights_P[i] == 0.0:
            losses_P[i] = 0.0
            if want_gradient:
                logits_PV[i] = np.uint16(0)
            continue
        for j in range(len(bits_V)):
            bits_V[j] = np.uint32(logits_PV[i, j]) << np.uint32(16)
        losses_P[i] = _do_row(
            row_V, ids_PK[i], logprobs_PK[i], tail_mass_P[i], labels_P[i], weights_P[i], tail, alpha, z_K, p_K, want_gradient
        )
        if want_gradient:
            _narrow(bits_V, logits_PV[i])


@_kernel
def _narrow(bits_V, out_V):
    """float32 bits to bfloat16 bits: to nearest, ties to even; NaN stays NaN instead of rounding over into a number."""
    for j in range(len(bits_V)):
        bits = bits_V[j]
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out_V[j] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)


def row_losses(
    logits_PV: NDArray[Any], targets: Targets, objective: Objective, losses_P: NDArray[np.float64], num_threads: int = 1
) -> None:
    """See `kdcache.kernels.base.KernelBackend`."""
    _run(logits_PV, targets, objective, losses_P, num_threads, want_gradient=False)


def row_losses_and_gradients(
    logits_PV: NDArray[Any], targets: Targets, objective: Objective, losses_P: NDArray[np.float64], num_threads: int = 1
) -> None:
    """See `kdcache.kernels.base.KernelBackend`."""
    _run(logits_PV, targets, objective, losses_P, num_threads, want_gradient=True)


def warm_up() -> None:
    """Compile everything now (or load it from disk) instead of at the first loss."""
    targets = make_targets([[0]], [[-1.0]], [0.5], vocab_size=2)
    for dtype in (np.float32, np.uint16):
        row_losses_and_gradients(np.zeros((1, 2), dtype), targets, Objective(), np.empty(1))


def _run(
    logits_PV: NDArray[Any],
    targets: Targets,
    objective: Objective,
    losses_P: NDArray[np.float64],
    num_threads: int,
    *,
    want_gradient: bool,
) -> None:
    _check_arrays(logits_PV, targets, losses_P)
    kernel = _float32_rows if logits_PV.dtype == np.float32 else _bfloat16_rows
    fixed = (targets.token_ids_PK, targets.logprobs_PK, targets.tail_mass_P, targets.labels_P, targets.weights_P)
    tail, alpha = TAIL_POLICIES.index(objective.tail), float(objective.alpha)

    def work(start: int, stop: int) -> None:
        kernel(logits_PV, *fixed, tail, alpha, want_gradient, start, stop, losses_P)

    block = max(1, _LOGITS_PER_BLOCK // max(targets.vocab_size, 1))
    for_row_blocks(work, len(logits_PV), num_threads=num_threads, block=block)


def _check_arrays(logits_PV: NDArray[Any], targets: Targets, losses_P: NDArray[np.float64]) -> None:
    """Raise ValueError where the kernel, which does not look, would compile anew or read past an end."""
    expected = (len(targets.token_ids_PK), targets.vocab_size)
    if logits_PV.shape != expected or logits_PV.dtype not in (np.float32, np.uint16) or not logits_PV.flags.c_contiguous:
        raise ValueError(
            f"logits must be float32 or uint16, C-contiguous, {expected}; they are {logits_PV.dtype}, strides "
            f"{logits_PV.strides}, {logits_PV.shape}"
        )
    if losses_P.shape != expected[:1] or losses_P.dtype != np.float64 or not losses_P.flags.c_contiguous:
        raise ValueError(f"losses must be float64, C-contiguous, {expected[:1]}; they are {losses_P.dtype}, {losses_P.shape}")
