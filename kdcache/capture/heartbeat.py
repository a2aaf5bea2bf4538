"""The watch over a capture: when the teacher has answered nothing for too long, say so, show where, and end it.

A hung collective, a dead driver or a full network disk leave a process that neither fails nor works, and a job that holds its
machines until its time is up. The watch is a thread of its own, so it sees them.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kdcache.capture.signals import StopRequest

GRACE_SECONDS = 30.0
"""From the interrupt of a stalled capture to the end of its process, where the capture owns that and is still there."""

_STDERR = 2


class Heartbeat:
    """Watches the time between two beats; each `beat()` says that something has been done. Before the first there is none.

    Args:
        stall_seconds: longest time between two beats; None watches nothing.
        on_stall: called once, from the watch's thread, with the sentence that says what happened and an event that is set when
            the watch is over.
    """

    def __init__(self, stall_seconds: float | None, on_stall: Callable[[str, threading.Event], None]) -> None:
        self._stall_seconds, self._on_stall = stall_seconds, on_stall
        self._last, self._doing = float("inf"), ""

    def beat(self, doing: str | None = None) -> None:
        """Something has been done; `doing` says what is done next, for the message."""
        self._last = time.monotonic()
        if doing is not None:
            self._doing = doing

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the end of the block."""
        if self._stall_seconds is None:
            yield
            return
        over = threading.Event()
        threading.Thread(target=self._watch, args=(over, self._stall_seconds), name="kdcache-watch", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, over: threading.Event, stall_seconds: float) -> None:
        while not over.wait(min(1.0, stall_seconds / 4)):
            if time.monotonic() - self._last > stall_seconds:
                sentence = f"no progress for {stall_seconds:g} seconds (run.stall_seconds) while {self._doing}"
                os.write(_STDERR, f"\nkdcache: {sentence}; the stacks of all threads follow\n".encode())
                faulthandler.dump_traceback(_STDERR, all_threads=True)
                self._on_stall(sentence, over)
                return


def interrupting(stop: StopRequest, thread: int) -> Callable[[str, threading.Event], None]:
    """What to do about a stall: interrupt a thread, and end the process if that does not help and `stop` owns it.

    Args:
        stop: gets the sentence as `stalled`, so that who meets the interrupt knows what it means.
        thread: the identifier of the thread that captures.
    """

    def interrupt(sentence: str, over: threading.Event) -> None:
        stop.stalled = sentence
        # A shell starts its background jobs with SIGINT ignored: there the signal would do nothing.
        if thread == threading.main_thread().ident and callable(signal.getsignal(signal.SIGINT)):
            signal.pthread_kill(thread, signal.SIGINT)  # a real signal: it also ends system calls
        else:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))
        if stop.owns_process and not over.wait(GRACE_SECONDS):
            # Stuck in native code. What is published is safe whenever a process ends.
            os.write(_STDERR, f"kdcache: error: {sentence}; the process does not react and is ended\n".encode())
            os._exit(2)

    return interrupt


def end_process(sentence: str, _: threading.Event) -> None:
    """What a worker of a cluster does about a stall: others notice that it is gone and do its unit again."""
    os.write(_STDERR, f"kdcache: {sentence}; this worker is ended\n".encode())
    os._exit(2)
