import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kdcache.loader.prefetch import THREAD_NAME, prefetch


def num_live_threads() -> int:
    return sum(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert num_live_threads() == 0


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_results_come_in_the_order_of_the_jobs(num_threads: int) -> None:
    def slow_if_even(job: int) -> int:
        time.sleep(0.002 * (job % 2 == 0))
        return job * job

    assert list(prefetch(slow_if_even, range(30), num_threads=num_threads, look_ahead=5)) == [i * i for i in range(30)]


def test_no_more_than_the_look_ahead_is_computed_before_it_is_asked_for() -> None:
    begun: list[int] = []
    results = prefetch(begun.append, range(100), num_threads=3, look_ahead=4)
    next(results)
    wait_until(lambda: len(begun) == 5)
    time.sleep(0.02)
    assert sorted(begun) == [0, 1, 2, 3, 4]
    results.close()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_exception_comes_in_its_job_s_place_after_the_results_before_it(num_threads: int) -> None:
    results = prefetch(lambda job: 12 // (3 - job), range(10), num_threads=num_threads, look_ahead=8)
    assert [next(results) for _ in range(3)] == [4, 6, 12]
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_closing_drops_what_has_not_begun_and_waits_for_what_has() -> None:
    begun, finished, go = [], [], threading.Event()

    def work(job: int) -> None:
        begun.append(job)
        if job:
            go.wait(10)
        finished.append(job)

    results = prefetch(work, range(100), num_threads=2, look_ahead=50)
    next(results)
    wait_until(lambda: len(begun) == 3)
    threading.Timer(0.02, go.set).start()
    results.close()
    assert sorted(begun) == sorted(finished) == [0, 1, 2]


def test_leaving_a_loop_ends_the_threads() -> None:
    for result in prefetch(lambda job: job, range(100), num_threads=2, look_ahead=4):
        if result == 3:
            break
    assert num_live_threads() == 0


def test_collection_by_one_of_its_own_threads_ends_the_threads() -> None:
    """A thread cannot wait for itself: without care this is an error in the collector, and threads stay."""
    holder: list[object] = []
    dropped = threading.Event()

    def collect(job: int) -> int:
        if job == 1:
            dropped.wait(10)
            gc.collect()
        return job

    results = prefetch(collect, range(10), num_threads=1, look_ahead=3)
    next(results)
    holder += [results, holder]
    gc.disable()
    try:
        del results, holder
        dropped.set()
        wait_until(lambda: num_live_threads() == 0)
    finally:
        gc.enable()
