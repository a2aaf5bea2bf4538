"""The kernels on a CPU: `_numba_positions` compiled for one signature per dtype, positions split between threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from kdcache.compiled import compiled
from kdcache.kernels import _numba_positions
from kdcache.kernels.base import TAIL_POLICIES, KernelInputs, Objective, exact_counts, make_kernel_inputs
from kdcache.kernels.divergences import _numba as compiled_divergences
from kdcache.kernels.threads import for_blocks

# Below this many logits per block, handing a block to another thread (50 to 100 microseconds) costs more than it saves.
_LOGITS_PER_BLOCK = 1 << 19

_KERNELS = {
    np.dtype(np.float32): (types.float32, _numba_positions.float32_positions),
    np.dtype(np.uint16): (types.uint16, _numba_positions.bfloat16_positions),
}


@cache
def _compiled_kernel(dtype: np.dtype[Any]) -> Callable[..., Any]:
    """The kernel for logits of a dtype, compiled with one fixed signature: the divergence is an argument, not a part of it."""
    element, function = _KERNELS[dtype]
    counts, entries = types.int32[::1], (types.int32[:, ::1], types.float32[:, ::1])
    inputs = (*entries, counts, types.float32[::1], types.int32[::1], types.float64[::1])
    divergence = (types.FunctionType(compiled_divergences.SIGNATURE), types.float64[::1])
    objective = (types.int64, types.float64, types.float64, *divergence)
    positions = (types.boolean, types.int64, types.int64, types.float64[::1])
    return compiled(types.void(element[:, ::1], *inputs, *objective, *positions))(function)


def position_losses(
    logits_PV: NDArray[Any], inputs: KernelInputs, objective: Objective, losses_P: NDArray[np.float64], num_threads: int = 1
) -> None:
    """See `kdcache.kernels.base.KernelBackend`."""
    _run(logits_PV, inputs, objective, losses_P, num_threads, want_gradient=False)


def position_losses_and_gradients(
    logits_PV: NDArray[Any], inputs: KernelInputs, objective: Objective, losses_P: NDArray[np.float64], num_threads: int = 1
) -> None:
    """See `kdcache.kernels.base.KernelBackend`."""
    _run(logits_PV, inputs, objective, losses_P, num_threads, want_gradient=True)


def warm_up() -> None:
    """Compile everything now (or load it from disk) instead of at the first loss."""
    inputs = make_kernel_inputs([[0]], [[-1.0]], [0.5], vocab_size=2)
    for dtype in (np.float32, np.uint16):
        position_losses_and_gradients(np.zeros((1, 2), dtype), inputs, Objective(), np.empty(1))


def _run(
    logits_PV: NDArray[Any],
    inputs: KernelInputs,
    objective: Objective,
    losses_P: NDArray[np.float64],
    num_threads: int,
    *,
    want_gradient: bool,
) -> None:
    _check_arrays(logits_PV, inputs, losses_P)
    kernel, divergence = _compiled_kernel(logits_PV.dtype), objective.divergence
    entries = (inputs.token_ids_PK, inputs.logprobs_PK, exact_counts(inputs, divergence))
    fixed = (*entries, inputs.tail_mass_P, inputs.target_ids_P, inputs.weights_P)
    meaning = (
        TAIL_POLICIES.index(objective.tail),
        float(objective.alpha),
        float(objective.temperature),
        compiled_divergences.get_compiled(type(divergence)),
        np.array(divergence.parameters, np.float64),
    )

    def work(start: int, stop: int) -> None:
        kernel(logits_PV, *fixed, *meaning, want_gradient, start, stop, losses_P)

    block = max(1, _LOGITS_PER_BLOCK // max(inputs.vocab_size, 1))
    for_blocks(work, len(logits_PV), num_threads=num_threads, block=block)


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
