"""Lines of a matrix worked on by several threads: the only module that knows about the pool.

A pool of Python threads over serial kernels that release the GIL, not numba's prange: see the decision in README.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

_pool: ThreadPoolExecutor | None = None


def for_blocks(work: Callable[[int, int], None], num_positions: int, *, num_threads: int, block: int) -> None:
    """Call work(start, stop) for consecutive blocks of positions that together are 0..num_positions, each once, in any order.

    Args:
        work: must release the GIL to gain anything; must write to positions start..stop only.
        num_threads: the caller's own thread is one of them.
        block: positions per call; blocks are taken as threads come free, since positions of weight 0 cost nothing.

    Raises:
        Whatever work raises.
    """
    helpers = min(num_threads, -(-num_positions // block)) - 1
    if helpers < 1:
        work(0, num_positions)
        return
    starts = iter(range(0, num_positions, block))

    def drain(starts: Iterator[int]) -> None:
        for start in starts:
            work(start, min(start + block, num_positions))

    futures = [_get_pool().submit(drain, starts) for _ in range(helpers)]
    try:
        drain(starts)
    finally:
        # Also when the caller's own share failed: nobody may still be writing to its arrays when it returns.
        for future in futures:
            future.exception()
    for future in futures:
        future.result()


def available_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _get_pool() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        # Threads are started as they are needed; the maximum only bounds them.
        _pool = ThreadPoolExecutor(max_workers=max(available_cpus(), 8), thread_name_prefix="kdcache-kernel")
    return _pool


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    # A forked child has the executor object but none of its threads, and would wait for them for ever.
    os.register_at_fork(after_in_child=_forget_pool)
