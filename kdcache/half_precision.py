"""Whether half precision pays on this processor: measured once, since libraries may not use what a processor's flags promise.

Where bfloat16 or float16 is only emulated, a product takes 15 to 80 times as long as in float32.
"""

from __future__ import annotations

import time
from functools import cache

import torch

from kdcache.shown import get_logger

_SIZE, _ROUNDS = 192, 5
_WORTH_A_WARNING = 1.5

log = get_logger(__name__)

_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@cache
def float32_gain(dtype: torch.dtype) -> float:
    """How many times as fast a product is on this CPU in float32 as in a half-precision dtype; below 1 where that is faster.

    Of CPU seconds of one thread, the best of some small products: neither other jobs nor threads that wait by spinning count.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds(dtype) / _seconds(torch.float32)
    finally:
        torch.set_num_threads(num_threads)


@torch.no_grad()
def _seconds(dtype: torch.dtype) -> float:
    matrix = torch.full((_SIZE, _SIZE), 0.5, dtype=dtype, device="cpu")
    best = float("inf")
    for _ in range(_ROUNDS):
        started = time.thread_time()
        torch.mm(matrix, matrix)
        best = min(best, time.thread_time() - started)
    return max(best, 1e-6)


def is_emulated(dtype: torch.dtype, device: str = "cpu") -> bool:
    """Whether products in this dtype would be faster in float32."""
    return device == "cpu" and dtype in _HALF.values() and float32_gain(dtype) > 1


def warn_if_emulated(dtype: str, device: str, remedy: str = "`teacher.dtype: float32`") -> None:
    """One warning a process where a model's dtype is one that this CPU only emulates, with what float32 would gain.

    Args:
        dtype: by name; any.
        device: that the model runs on.
        remedy: how float32 is asked for.
    """
    half = _HALF.get(dtype)
    if half is not None and device == "cpu" and float32_gain(half) > _WORTH_A_WARNING:
        _warn(dtype, remedy, f"{float32_gain(half):.0f}")


@cache
def _warn(dtype: str, remedy: str, gain: str) -> None:
    log.warning(
        "this CPU only emulates %s: a matrix product of it takes %s times as long as in float32, measured just now; "
        "%s runs that much faster, on twice the memory",
        dtype,
        gain,
        remedy,
    )
