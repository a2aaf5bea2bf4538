"""When to send a request to a server again, and what a refusal says. Pure functions; the caller has the clock."""

from __future__ import annotations

import html
import random
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Statuses that may pass: overload, a proxy without its server, a server without its engine."""

LIMIT_WORDS = ("max allowed:", "less than or equal to", "at most", "maximum", "<=")
"""What precedes the number in the sentences in which servers refuse a k."""

MOST_DIGITS = 18
"""The most digits of such a number."""


_HEAD_BYTES, _MAX_ERROR_BYTES = 4096, 2**20
_SECONDS = re.compile(r"[0-9]{1,9}")
_PAGE = re.compile(r"\s*<(!doctype|html|head|body)\b", re.IGNORECASE)
_UNSEEN = re.compile(r"<(script|style)\b.*?(</\1>|$)", re.IGNORECASE | re.DOTALL)
_MARKUP = re.compile(r"<[^>]*>?")


def is_transient(status: int) -> bool:
    """Whether a request with this status may succeed when it is sent again."""
    return status in TRANSIENT


def seconds_to_wait(attempt: int, key: str, retry_after: str | None = None, now: datetime | None = None) -> float:
    """Seconds to wait before a request is sent again.

    Args:
        attempt: tries so far, from 1.
        key: of the request; it spreads the waits of many requests that failed at once, and is the same in every run.
        retry_after: the header of that name, in seconds or as a date. Waits are at least this long.
        now: the time, to compare with a date.
    """
    longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** (attempt - 1))
    wait = longest * (0.5 + 0.5 * random.Random(f"kdcache.retry:{key}:{attempt}").random())
    return max(wait, retry_after_seconds(retry_after, now or datetime.now(UTC)))


def retry_after_seconds(header: str | None, now: datetime) -> float:
    """The seconds that a Retry-After header asks for (RFC 9110, 10.2.3); 0 if it is absent or cannot be read."""
    if header is None:
        return 0.0
    if _SECONDS.fullmatch(header.strip()):
        return float(header.strip())
    try:
        moment = parsedate_to_datetime(header)
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        return max(0.0, (moment - now).total_seconds())
    except (ValueError, OverflowError, TypeError, IndexError):
        return 0.0


def refusal(status: int, body: bytes, location: str | None = None) -> str:
    """What a server says of a request that it refused, in one line: its own sentence if there is one.

    Args:
        status: of HTTP.
        body: of the response.
        location: the header of that name: where the server redirects the request.
    """
    text = _message(body)
    elsewhere = f" (it redirects to {location}: set teacher.server.url to where that leads)" if location else ""
    return f"status {status}{elsewhere}" + (f": {text}" if text else "")


def error_in(body: bytes, *, status_without_one: int) -> tuple[int, str] | None:
    """The status and sentence of an error that a server sent with status 200; None for any other answer.

    The status is the one that the error names, else `status_without_one`.
    """
    if len(body) > _HEAD_BYTES and b"error" not in body[:_HEAD_BYTES]:
        return None  # a whole answer, which would be decoded twice
    if len(body) > _MAX_ERROR_BYTES:
        return None
    try:
        fields: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(fields, Mapping) or fields.get("choices"):
        return None
    error = fields.get("error") or (fields if fields.get("object") == "error" else None)
    if not error:
        return None
    named = [part.get(name) for part in (error, fields) if isinstance(part, Mapping) for name in ("code", "status")]
    statuses = [
        int(value) for value in map(_in_short, named) if len(value) == 3 and value.isdecimal() and 400 <= int(value) < 600
    ]
    return (statuses or [status_without_one])[0], f"status 200 with an error: {_message(body)}"


def _in_short(value: Any) -> str:
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""


def unreadable(body: bytes, error: Exception) -> str:
    """What came instead of a JSON answer, in one line: a page's own words, or where the answer is cut off."""
    if body.lstrip()[:1] in (b"{", b"["):
        return f"an answer that is cut off or not JSON ({error})"
    words = _message(body)
    return f"an answer that is not JSON: {words}" if words else "an empty answer"


def limit_in(sentence: str) -> int | None:
    """The largest k that a sentence allows, as in "Requested logprobs of 64, which is greater than max allowed: 20"."""
    lowered = sentence.lower()
    for words in LIMIT_WORDS:
        _, found, rest = lowered.partition(words)
        digits = rest.strip().split(" ")[0].strip(".,;()") if found else ""
        if digits.isdecimal() and len(digits) <= MOST_DIGITS:
            return int(digits)
    return None


def _message(body: bytes) -> str:
    try:
        fields: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _one_line(_words(body[:4000].decode("utf-8", "replace")))
    # {"error": {"message": ...}} (OpenAI, vLLM), {"message": ...}, {"detail": ...} (FastAPI), {"error": "..."}
    for name in ("error", "message", "detail"):
        if isinstance(fields, Mapping) and name in fields:
            fields = fields[name]
    if isinstance(fields, str):
        return _one_line(fields)
    return _one_line(msgspec.json.encode(fields).decode()) if fields else ""


def _words(text: str) -> str:
    """The words of a page, without its markup."""
    if not _PAGE.match(text):
        return text
    return html.unescape(_MARKUP.sub(" ", _UNSEEN.sub(" ", text)))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return (line if len(line) <= 300 else line[:297] + "...").rstrip(". ")
