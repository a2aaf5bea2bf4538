"""Work done ahead by threads, handed out in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

THREAD_NAME = "kdcache-prefetch"


def prefetch(
    function: Callable[[Job], Result], jobs: Iterable[Job], *, num_threads: int, look_ahead: int
) -> Generator[Result, None, None]:
    """`map(function, jobs)` with at most `look_ahead` results computed before they are asked for.

    An exception of `function` comes out in place of its job's result, after all results before it. When the generator ends, is
    closed or is collected, jobs that have not begun are dropped, and those that have are waited for: afterwards no thread of it
    touches anything.

    Args:
        function: called from `num_threads` threads; from the caller's for `num_threads` 0.
        jobs: drawn by the caller's thread, no further ahead than the results.
        num_threads: >= 0.
        look_ahead: >= 1.
    """
    if num_threads == 0:
        for job in jobs:
            yield function(job)
        return
    ours: set[int] = set()
    pool = ThreadPoolExecutor(num_threads, THREAD_NAME, initializer=lambda: ours.add(threading.get_ident()))
    pending: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(function, job))
            if len(pending) > look_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # The garbage collector may run this in one of the pool's own threads, which cannot wait for itself.
        pool.shutdown(wait=threading.get_ident() not in ours, cancel_futures=True)
