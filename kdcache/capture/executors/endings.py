"""How a run that does not reach its end leaves: what is published is folded, and an interrupt says what it means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kdcache.capture.executors.tally import Tally
from kdcache.capture.watch.signals import Interrupted, StopRequest
from kdcache.errors import CaptureError


@contextmanager
def translated_interrupts(stop: StopRequest) -> Iterator[None]:
    """Raise what an interrupt means, before there is a tally of the run: CaptureError for a stall, else Interrupted."""
    try:
        yield
    except KeyboardInterrupt as error:
        if stop.stalled is not None:
            raise CaptureError(f"{stop.stalled}; run the same command again, with a higher limit if it needs longer") from error
        if isinstance(error, Interrupted):
            raise
        raise stop.interrupted() from error


@contextmanager
def folded_on_failure(tally: Tally, stop: StopRequest) -> Iterator[None]:
    """Fold what is published when the run fails, and raise what an interrupt means, with a sentence on how to resume."""
    try:
        yield
    except BaseException as error:
        tally.give_up()
        if isinstance(error, KeyboardInterrupt) and stop.stalled is not None:
            raise CaptureError(f"{stop.stalled}; {tally.how_to_go_on}") from error
        if isinstance(error, KeyboardInterrupt):
            raise stop.interrupted(tally.how_to_go_on) from error
        raise
