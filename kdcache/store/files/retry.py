"""Repeat a request that a remote store did not answer well, with growing waits, until a deadline."""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kdcache.errors import KdcacheError, StorageError
from kdcache.shown import get_logger

_log = get_logger(__name__)

Answer = TypeVar("Answer")

FIRST_WAIT_SECONDS = 0.1
MAX_WAIT_SECONDS = 10.0
PATIENCE_SECONDS = 5.0
"""A request that has been tried for this long is reported, once."""
SLOWEST_BYTES_PER_SECOND = 1e6
"""An attempt that is slower than this is given up: its connection has most likely died without saying so."""

_jitter = random.Random()


@dataclass(frozen=True)
class RetryPolicy:
    """How long one request is repeated.

    Attributes:
        deadline_seconds: over all attempts and the waits between them.
        timeout_seconds: of one attempt, on top of the time that its bytes take.
    """

    deadline_seconds: float
    timeout_seconds: float


def retried(attempt: Callable[[float], Answer], policy: RetryPolicy, *, what: str, num_bytes: int = 0) -> Answer:
    """The first good answer of `attempt`, which is given the seconds that it has.

    Tried again is every OSError but those that are answers: the object is missing, exists, or may not be touched. Waits double
    from 0.1 to 10 s, each drawn from its upper half, so that clients that failed together do not come back together.

    Args:
        num_bytes: that the attempt moves; they lengthen its time.

    Raises:
        FileNotFoundError, FileExistsError: the store's own answer. KdcacheError: as `attempt` raises it.
        StorageError: no good answer by the deadline, or access is refused; the last error is chained.
    """
    started, num_attempts, has_warned = time.monotonic(), 0, False
    limit = policy.timeout_seconds + num_bytes / SLOWEST_BYTES_PER_SECOND
    deadline = max(policy.deadline_seconds, limit)
    while True:
        try:
            return attempt(min(limit, max(0.01, started + deadline - time.monotonic())))
        except (FileNotFoundError, FileExistsError, KdcacheError):
            raise
        except OSError as error:
            if isinstance(error, PermissionError) or error.errno in (errno.EACCES, errno.EPERM):
                raise StorageError(f"{what}: access is refused ({error}); check the store's credentials") from error
            num_attempts += 1
            wait = min(MAX_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (num_attempts - 1)) * _jitter.uniform(0.5, 1.0)
            taken = time.monotonic() - started
            if taken + wait >= deadline:
                raise StorageError(
                    f"{what}: no good answer within {deadline:.0f} s and {num_attempts} attempts; the last one: {_shown(error)}"
                ) from error
            is_first_long = taken + wait >= PATIENCE_SECONDS and not has_warned
            has_warned |= is_first_long
            level = logging.WARNING if is_first_long else logging.DEBUG
            _log.log(level, "%s: %s; trying again for up to %.0f s", what, _shown(error), deadline - taken)
            time.sleep(wait)


def _shown(error: OSError) -> str:
    return str(error) or type(error).__name__
