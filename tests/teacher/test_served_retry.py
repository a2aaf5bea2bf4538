from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from kdcache.teacher.served.retry import (
    LONGEST_WAIT_SECONDS,
    is_transient,
    limit_in,
    refusal,
    retry_after_seconds,
    seconds_to_wait,
)

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)


def test_waits_grow_up_to_a_bound_and_differ_between_requests():
    waits = [seconds_to_wait(attempt, "a") for attempt in range(1, 12)]
    assert 0.25 <= waits[0] <= 0.5
    assert all(LONGEST_WAIT_SECONDS / 2 <= wait <= LONGEST_WAIT_SECONDS for wait in waits[7:])
    assert waits == [seconds_to_wait(attempt, "a") for attempt in range(1, 12)]
    assert len({seconds_to_wait(1, str(request)) for request in range(50)}) == 50


def test_a_wait_is_never_shorter_than_the_server_asks_for():
    assert seconds_to_wait(1, "a", "17") == 17.0
    assert seconds_to_wait(9, "a", "0") >= LONGEST_WAIT_SECONDS / 2
    assert seconds_to_wait(1, "a", format_datetime(NOW + timedelta(seconds=90), usegmt=True), NOW) == 90.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0.0),
        ("120", 120.0),
        (" 3 ", 3.0),
        ("-3", 0.0),
        ("soon", 0.0),
        ("", 0.0),
        ("1e3", 0.0),
        ("9" * 400, 0.0),
        ("\u0663", 0.0),
        ("3, 3", 0.0),
        ("2026-11-22T12:01:00Z", 0.0),
        ("Sun, 22 Nov 2026 25:01:00 GMT", 0.0),
        ("Sun, 22 Nov 2026 12:01:00 +99999999999999999", 0.0),
        ("Sunday, 22-Nov-26 12:01:00 GMT", 60.0),
        ("Sun Nov 22 12:01:00 2026", 60.0),
        ("Sun, 22 Nov 2026 12:01:00 GMT", 60.0),
        ("Sun, 22 Nov 2026 12:01:00", 60.0),
        ("Sun, 22 Nov 2026 11:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float):
    assert retry_after_seconds(header, NOW) == seconds


def test_only_what_may_pass_is_tried_again():
    assert all(map(is_transient, (408, 429, 500, 502, 503, 504, 529)))
    assert not any(map(is_transient, (301, 400, 401, 403, 404, 405, 413, 422, 501)))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b'{"error": {"message": "The model `x` does not exist.", "code": 404}}', ": The model `x` does not exist"),
        (b'{"detail": "Not Found"}', ": Not Found"),
        (b'{"message": "no"}', ": no"),
        (b'{"error": "plain"}', ": plain"),
        (b'{"detail": [{"loc": ["body"], "msg": "bad"}]}', ': [{"loc":["body"],"msg":"bad"}]'),
        (b"<html>\n  <b>Bad &quot;gateway</b>\n</html>", ': Bad "gateway'),
        (b"x <3 y", ": x <3 y"),
        (b"{}", ""),
        (b"\xff\xfe", ": \ufffd\ufffd"),
        (b"", ""),
    ],
)
def test_a_servers_own_sentence_is_shown_in_one_line(body: bytes, sentence: str):
    assert refusal(404, body) == f"status 404{sentence}"


def test_a_long_sentence_is_cut():
    assert len(refusal(500, b"x" * 10_000)) < 330


@pytest.mark.parametrize(
    ("sentence", "limit"),
    [
        ("Requested prompt logprobs of 64, which is greater than max allowed: 20 (parameter=prompt_logprobs, value=64)", 20),
        ("Input should be less than or equal to 5", 5),
        ("logprobs must be at most 5.", 5),
        ("64 is greater than the maximum of what we do", None),
        ("logprobs: 64 not supported", None),
    ],
)
def test_the_limit_is_learnt_from_the_servers_sentence(sentence: str, limit: int | None):
    assert limit_in(sentence) == limit
