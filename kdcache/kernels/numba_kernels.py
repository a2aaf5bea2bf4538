"""The kernels on a CPU: `_numba_positions` compiled for one signature per dtype, positions split between threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from kdcache.compiled import compiled
from kdcache.kernels import _numba_positions
from kdcache.kernels.base import (
    TAIL_POLICIES,
    KernelInputs,
    Objective,
    Summand,
    SumOutputs,
    exact_counts,
    make_kernel_inputs,
)
from kdcache.kernels.divergences._numba import get_address
from kdcache.kernels.threads import for_blocks

# Below this many logits per block, handing a block to another thread (50 to 100 microseconds) costs more than it saves.
_LOGITS_PER_BLOCK = 1 << 19

_KERNELS = {
    np.dtype(np.float32): (types.float32, _numba_positions.float32_positions),
    np.dtype(np.uint16): (types.uint16, _numba_positions.bfloat16_positions),
}


@cache
def _compiled_kernel(dtype: np.dtype[Any]) -> Callable[..., Any]:
    """The kernel for logits of a dtype, compiled with one fixed signature: divergences are arguments, not a part of it."""
    element, function = _KERNELS[dtype]
    float64, float64_PD, float64_P = types.float64, types.float64[:, ::1], types.float64[::1]
    entries = (types.int32[:, ::1], types.float32[:, :, ::1], types.int32[:, ::1], types.float32[:, ::1])
    divergences = (float64_PD, types.float64[:, :, ::1], types.int64[::1], types.int64[::1])
    positions = (types.int32[::1], float64_P, float64_P, float64)
    run = (types.boolean, types.int64, types.int64, float64_P, float64_PD)
    return compiled(types.void(element[:, ::1], *entries, *divergences, *positions, *run))(function)


def position_losses(
    logits_PV: NDArray[Any], inputs: KernelInputs, objective: Objective, losses_P: NDArray[np.float64], num_threads: int = 1
) -> None:
    """See `kdcache.kernels.base.KernelBackend`."""
    outputs = SumOutputs(losses_P, np.empty((len(losses_P), 2)))
    summed_losses(logits_PV, [Summand(inputs, objective)], outputs, num_threads, want_gradient=False)


def position_losses_and_gradients(
    logits_PV: NDArray[Any], inputs: KernelInputs, objective: Objective, losses_P: NDArray[np.float64], num_threads: int = 1
) -> None:
    """See `kdcache.kernels.base.KernelBackend`."""
    outputs = SumOutputs(losses_P, np.empty((len(losses_P), 2)))
    summed_losses(logits_PV, [Summand(inputs, objective)], outputs, num_threads, want_gradient=True)


def warm_up() -> None:
    """Compile everything now (or load it from disk) instead of at the first loss."""
    inputs = make_kernel_inputs([[0]], [[-1.0]], [0.5], vocab_size=2)
    for dtype in (np.float32, np.uint16):
        position_losses_and_gradients(np.zeros((1, 2), dtype), inputs, Objective(), np.empty(1))


def summed_losses(
    logits_PV: NDArray[Any], summands: Sequence[Summand], outputs: SumOutputs, num_threads: int = 1, *, want_gradient: bool
) -> None:
    """See `kdcache.kernels.base.KernelBackend`."""
    inputs, temperature = summands[0].inputs, summands[0].objective.temperature
    _check_arrays(logits_PV, inputs, outputs.losses_P)
    # An alpha of 0 reads no entries at all.
    columns = [column for column, summand in enumerate(summands) if summand.objective.alpha > 0]
    read = [summands[column] for column in columns]
    target_shares_P = np.zeros(len(logits_PV))
    for summand in summands:
        target_shares_P += (1.0 if summand.factor_P is None else summand.factor_P) * (1.0 - summand.objective.alpha)
    fixed = (*_stacked(summands, read), inputs.target_ids_P, target_shares_P, inputs.weights_P, float(temperature))
    kernel, values_PD1 = _compiled_kernel(logits_PV.dtype), np.empty((len(logits_PV), len(read) + 1))

    def work(start: int, stop: int) -> None:
        kernel(logits_PV, *fixed, want_gradient, start, stop, outputs.losses_P, values_PD1)

    block = max(1, _LOGITS_PER_BLOCK // max(inputs.vocab_size, 1))
    for_blocks(work, len(logits_PV), num_threads=num_threads, block=block)
    outputs.values_PD1[:] = 0
    outputs.values_PD1[:, [*columns, -1]] = values_PD1


def _stacked(summands: Sequence[Summand], read: Sequence[Summand]) -> tuple[NDArray[Any], ...]:
    """What the divergences are given, a line for each position: ids, then entries, factors, options, tails and addresses.

    A logprob of +inf stands for an entry that a divergence does not read.
    """
    ids_PK = summands[0].inputs.token_ids_PK
    for summand in summands[1:]:
        ids_PK = np.maximum(ids_PK, summand.inputs.token_ids_PK)
    shape = (len(ids_PK), len(read))
    num_options = max((len(summand.objective.divergence.options) for summand in read), default=0)
    logprobs_PDK, options_PD = np.empty((*shape, ids_PK.shape[1]), np.float32), np.zeros((*shape, num_options))
    num_exact_PD, tail_mass_PD, factors_PD = np.empty(shape, np.int32), np.empty(shape, np.float32), np.empty(shape)
    for column, summand in enumerate(read):
        own, objective = summand.inputs, summand.objective
        if len(summands) > 1:
            is_own_PK = own.token_ids_PK >= 0
            if (is_own_PK & (own.token_ids_PK != ids_PK)).any():
                raise ValueError("the summands have other token ids in the same column")
            logprobs_PDK[:, column] = np.where(is_own_PK, own.logprobs_PK, np.inf)
        else:
            logprobs_PDK[:, column] = own.logprobs_PK
        num_exact_PD[:, column] = exact_counts(own, objective.divergence)
        tail_mass_PD[:, column] = own.tail_mass_P
        factors_PD[:, column] = objective.alpha * (1.0 if summand.factor_P is None else summand.factor_P)
        for index, option in enumerate(objective.divergence.options.values()):
            options_PD[:, column, index] = option
    tails_D = np.array([TAIL_POLICIES.index(summand.objective.tail) for summand in read], np.int64)
    addresses_D = np.array([get_address(type(summand.objective.divergence)) for summand in read], np.int64)
    return ids_PK, logprobs_PDK, num_exact_PD, tail_mass_PD, factors_PD, options_PD, tails_D, addresses_D


def _check_arrays(logits_PV: NDArray[Any], inputs: KernelInputs, losses_P: NDArray[np.float64]) -> None:
    """Raise ValueError where the kernel, which does not look, would be compiled again or read past an end."""
    expected = (len(inputs.token_ids_PK), inputs.vocab_size)
    if logits_PV.shape != expected or logits_PV.dtype not in (np.float32, np.uint16) or not logits_PV.flags.c_contiguous:
        raise ValueError(
            f"logits must be float32 or uint16, C-contiguous, {expected}; they are {logits_PV.dtype}, strides "
            f"{logits_PV.strides}, {logits_PV.shape}"
        )
    if losses_P.shape != expected[:1] or losses_P.dtype != np.float64 or not losses_P.flags.c_contiguous:
        raise ValueError(f"losses must be float64, C-contiguous, {expected[:1]}; they are {losses_P.dtype}, {losses_P.shape}")
