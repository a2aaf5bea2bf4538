from __future__ import annotations

import logging

import pytest

from kdcache.errors import CorruptCacheError, StorageError
from kdcache.store.files import retry
from kdcache.store.files.retry import RetryPolicy, retried


class Clock:
    """Time that passes when one sleeps or works."""

    def __init__(self, monkeypatch):
        self.now, self.waits = 0.0, []
        monkeypatch.setattr(retry.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(retry.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


POLICY = RetryPolicy(deadline_seconds=100.0, timeout_seconds=7.0)


def failing(*errors):
    errors = list(errors)

    def attempt(seconds: float) -> str:
        if errors:
            raise errors.pop(0)
        return "answer"

    return attempt


def test_waits_double_up_to_a_limit_and_are_drawn_from_their_upper_half(clock):
    assert retried(failing(*[OSError("503")] * 12), POLICY, what="reading") == "answer"
    for number, wait in enumerate(clock.waits):
        most = min(10.0, 0.1 * 2**number)
        assert most / 2 <= wait <= most


@pytest.mark.parametrize("error", [FileNotFoundError(), FileExistsError(), CorruptCacheError("x"), KeyError()])
def test_answers_and_bugs_are_not_tried_again(clock, error):
    with pytest.raises(type(error)):
        retried(failing(error), POLICY, what="reading")
    assert clock.waits == []


def test_refused_access_is_told_at_once(clock):
    with pytest.raises(StorageError, match=r"reading x: access is refused .*check the store's credentials"):
        retried(failing(PermissionError(13, "no key")), POLICY, what="reading x")
    assert clock.waits == []


def test_the_deadline_ends_it_and_no_wait_goes_beyond(clock, caplog):
    with pytest.raises(StorageError, match=r"reading x: no good answer within 100 s and \d+ attempts; the last one: 503"):
        retried(failing(*[OSError("503")] * 1000), POLICY, what="reading x")
    assert clock.now < 100.0
    assert [record.levelno for record in caplog.records if record.levelno >= logging.WARNING] == [logging.WARNING]


def test_an_attempt_is_given_the_time_that_its_bytes_take_and_never_more_than_is_left(clock):
    given = []

    def attempt(seconds: float) -> None:
        given.append(seconds)
        clock.now += seconds
        raise TimeoutError

    with pytest.raises(StorageError, match="TimeoutError"):
        retried(attempt, POLICY, what="reading", num_bytes=20_000_000)
    assert given[0] == pytest.approx(27.0)
    assert clock.now <= 100.1
