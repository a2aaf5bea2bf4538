"""The watch over a capture: if the teacher has not answered for too long, report it, show where, and end the run.

A hung collective, a dead driver or a full network disk leave a process that neither fails nor works, and holds its
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

from kdcache.capture.watch.signals import StopRequest
from kdcache.config.capture import RunConfig

GRACE_SECONDS = 30.0
"""Seconds from the interrupt of a stalled capture until its process is ended, if the capture owns the process."""

_STDERR = 2


class Heartbeat:
    """Watches the time between two beats. Each `beat()` says that something was done; the watch starts with the first.

    Args:
        run: its `stall_seconds` is the longest time from one beat to the next, its `load_stall_seconds` that from `load()` to
            the next beat; None waits forever.
        on_stall: called once, from the watch's thread, with the sentence that says what happened and an event that is set when
            the watch is over.
    """

    def __init__(self, run: RunConfig, on_stall: Callable[[str, threading.Event], None]) -> None:
        self._limits = {name: getattr(run, name) for name in ("stall_seconds", "load_stall_seconds")}
        self._on_stall = on_stall
        # One tuple, as the watch must not see a limit without its time: when, which limit holds from there, what is done.
        self._last = (float("inf"), "stall_seconds", "")

    def beat(self, doing: str | None = None) -> None:
        """Note that something was done; `doing` says what comes next, for the message."""
        self._last = (time.monotonic(), "stall_seconds", self._last[2] if doing is None else doing)

    def load(self, doing: str) -> None:
        """Note that the teacher is loading until the next beat, which may take longer than anything else."""
        self._last = (time.monotonic(), "load_stall_seconds", doing)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the end of the block."""
        limits = [seconds for seconds in self._limits.values() if seconds is not None]
        if not limits:
            yield
            return
        over = threading.Event()
        pause = min(1.0, *(seconds / 4 for seconds in limits))
        threading.Thread(target=self._watch, args=(over, pause), name="kdcache-watch", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, over: threading.Event, pause: float) -> None:
        while not over.wait(pause):
            last, limit, doing = self._last
            seconds = self._limits[limit]
            if seconds is not None and time.monotonic() - last > seconds:
                sentence = f"no progress for {seconds:g} seconds (run.{limit}) while {doing}"
                os.write(_STDERR, f"\nkdcache: {sentence}; the stacks of all threads follow\n".encode())
                faulthandler.dump_traceback(_STDERR, all_threads=True)
                self._on_stall(sentence, over)
                return


def interrupting(stop: StopRequest, thread: int) -> Callable[[str, threading.Event], None]:
    """Make the reaction to a stall: interrupt a thread, then end the process if that does not help and `stop` owns it.

    Args:
        stop: gets the sentence as `stalled`, so that whoever handles the interrupt knows what it means.
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
            os.write(_STDERR, f"kdcache: error: {sentence}; the process does not respond and is ended\n".encode())
            os._exit(2)

    return interrupt


def end_process(sentence: str, _: threading.Event) -> None:
    """End a stalled worker of a cluster: the driver notices, and another worker does its unit again."""
    os.write(_STDERR, f"kdcache: {sentence}; this worker is ended\n".encode())
    os._exit(2)
