"""Stopping a capture: gracefully after the current unit, or at once. Nothing that is published is lost either way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the capture at once.

    Attributes:
        signum: the signal; the exit status of the command is 128 more.
    """

    signum: int = signal.SIGINT


class StopRequest:
    """Asked by a capture between two units; also holds what ends it in the middle of one.

    Attributes:
        is_requested: finish the current unit, then stop.
        is_working: a unit is being captured, so there is something to finish.
        signum: the signal that ended the capture at once.
        stalled: why the capture must end now, if its watch has decided so.
        owns_process: the process exists only for this capture and may be ended if nothing else helps.
        reinstall: installs the handlers of `stopping_on_signals` again, after a library has set its own.
    """

    def __init__(self) -> None:
        self.is_requested = self.is_working = self.owns_process = False
        self.signum = signal.SIGINT
        self.stalled: str | None = None
        self.reinstall: Callable[[], None] = lambda: None

    def request(self) -> None:
        """Ask to stop before the next unit; from any thread or signal handler."""
        self.is_requested = True

    def interrupted(self, *sentence: str) -> Interrupted:
        """Make the exception for the signal that ended the capture at once; libraries turn ours into a plain one."""
        interrupt = Interrupted(*sentence)
        interrupt.signum = self.signum
        return interrupt

    @contextmanager
    def working(self) -> Iterator[None]:
        """Mark the time during which units are captured."""
        self.is_working = True
        try:
            yield
        finally:
            self.is_working = False


@contextmanager
def stopping_on_signals(stop: StopRequest) -> Iterator[None]:
    """Let SIGINT and SIGTERM ask the capture to stop; a second one, or one before the first unit, raises Interrupted.

    Does nothing outside the main thread, where Python runs no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def handle(signum: int, _: FrameType | None) -> None:
        if not stop.is_working or stop.is_requested or stop.stalled is not None:
            _restore(before)  # a third one is not ours to delay
            stop.signum = signal.Signals(signum)
            raise stop.interrupted()
        stop.request()
        name = signal.Signals(signum).name
        # Not print: the signal may have come while something was printed, and Python's streams refuse to be entered twice.
        os.write(2, f"\nkdcache: {name}: stopping after the current unit; send it again to stop at once\n".encode())

    stop.reinstall = lambda: _restore(dict.fromkeys(SIGNALS, handle))
    stop.reinstall()
    stop.owns_process = True
    try:
        yield
    finally:
        _restore(before)


def _restore(handlers: dict[signal.Signals, signal._HANDLER]) -> None:
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
