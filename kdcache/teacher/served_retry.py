"""When a request to a server is sent again, and what a refusal says. Pure functions; the clock is the caller's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Statuses that may be another the next time: overload, a proxy without its server, a server without its engine."""

LIMIT_WORDS = ("max allowed:", "less than or equal to", "at most", "maximum", "<=")
"""What stands before the number in the sentences with which servers refuse a k."""


def is_transient(status: int) -> bool:
    """Whether a request with this status may be answered when it is sent again."""
    return status in TRANSIENT


def seconds_to_wait(attempt: int, key: str, retry_after: str | None = None, now: datetime | None = None) -> float:
    """How long to wait before a request is sent again.

    Args:
        attempt: tries so far, from 1.
        key: of the request; spreads the waits of many requests that failed at once, and is the same in every run.
        retry_after: the header of that name: seconds or a date. Waits are not shorter than it says.
        now: for a date.
    """
    longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** (attempt - 1))
    wait = longest * (0.5 + 0.5 * random.Random(f"kdcache.retry:{key}:{attempt}").random())
    return max(wait, retry_after_seconds(retry_after, now or datetime.now(UTC)))


def retry_after_seconds(header: str | None, now: datetime) -> float:
    """What a Retry-After header asks for (RFC 9110, 10.2.3); 0 where it is absent or cannot be read."""
    if header is None:
        return 0.0
    if header.strip().isdecimal():
        return float(header.strip())
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - now).total_seconds())


def refusal(status: int, body: bytes) -> str:
    """What a server says of a request that it refused, in one line: its own sentence where there is one."""
    text = _message(body)
    return f"status {status}" + (f": {text}" if text else "")


def limit_in(sentence: str) -> int | None:
    """The largest k that a sentence allows, as in "Requested logprobs of 64, which is greater than max allowed: 20"."""
    lowered = sentence.lower()
    for words in LIMIT_WORDS:
        _, found, rest = lowered.partition(words)
        number = rest.strip().split(" ")[0].strip(".,;()") if found else ""
        if number.isdecimal():
            return int(number)
    return None


def _message(body: bytes) -> str:
    try:
        fields: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _one_line(body[:300].decode("utf-8", "replace"))
    # {"error": {"message": ...}} (OpenAI, vLLM), {"message": ...}, {"detail": ...} (FastAPI), {"error": "..."}
    for name in ("error", "message", "detail"):
        if isinstance(fields, Mapping) and name in fields:
            fields = fields[name]
    return _one_line(fields if isinstance(fields, str) else msgspec.json.encode(fields).decode())


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return (line if len(line) <= 300 else line[:297] + "...").rstrip(". ")
