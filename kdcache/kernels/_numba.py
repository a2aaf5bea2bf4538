"""The row kernels on a CPU: `_numba_rows` compiled for one signature per dtype, its rows split between threads.

Shape letters: P positions (rows), K entries per position (padded), V the student's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from kdcache.compiled import compiled
from kdcache.kernels import _numba_divergences, _numba_rows
from kdcache.kernels.base import TAIL_POLICIES, Objective, Targets, exact_counts, make_targets
from kdcache.kernels.threads import for_row_blocks

# Below this many logits per block, handing a block to another thread (50 to 100 microseconds) costs more than it saves.
_LOGITS_PER_BLOCK = 1 << 19

_ROWS = {
    np.dtype(np.float32): (types.float32, _numba_rows.float32_rows),
    np.dtype(np.uint16): (types.uint16, _numba_rows.bfloat16_rows),
}


@cache
def _compiled_rows(dtype: np.dtype[Any]) -> Callable[..., Any]:
    """The kernel for logits of a dtype, compiled with one fixed signature: the divergence is an argument, not a part of it."""
    element, function = _ROWS[dtype]
    counts, entries = types.int32[::1], (types.int32[:, ::1], types.float32[:, ::1])
    targets = (*entries, counts, types.float32[::1], types.int32[::1], types.float64[::1])
    divergence = (types.FunctionType(_numba_divergences.SIGNATURE), types.float64[::1])
    objective = (types.int64, types.float64, types.float64, *divergence)
    rows = (types.boolean, types.int64, types.int64, types.float64[::1])
    return compiled(types.void(element[:, ::1], *targets, *objective, *rows))(function)


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
    kernel, divergence = _compiled_rows(logits_PV.dtype), objective.divergence
    entries = (targets.token_ids_PK, targets.logprobs_PK, exact_counts(targets, divergence))
    fixed = (*entries, targets.tail_mass_P, targets.target_ids_P, targets.weights_P)
    meaning = (
        TAIL_POLICIES.index(objective.tail),
        float(objective.alpha),
        float(objective.temperature),
        _numba_divergences.get_compiled(type(divergence)),
        np.array(divergence.parameters, np.float64),
    )

    def work(start: int, stop: int) -> None:
        kernel(logits_PV, *fixed, *meaning, want_gradient, start, stop, losses_P)

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
