"""Numbers as people read them."""

import pytest

from kdcache.cli.wording import aligned, count, duration, size


@pytest.mark.parametrize(("number", "text"), [(0, "0 units"), (1, "1 unit"), (12345, "12,345 units")])
def test_counts(number, text):
    assert count(number, "unit") == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (999_499, "999 kB"), (999_600, "1 MB"), (3_421_000, "3.42 MB"),
     (5e12, "5 TB"), (2e19, "2e+04 PB")],
)  # fmt: skip
def test_sizes(num_bytes, text):
    assert size(num_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0.0 s"), (59.94, "59.9 s"), (310, "5 min 10 s"), (12_000, "3 h 20 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_lines_are_aligned():
    assert aligned({"a": "1", "long": "2"}) == "a     1\nlong  2"
    assert aligned({}) == ""


def test_a_long_value_takes_a_line_for_each_of_its_parts() -> None:
    long = "; ".join(f"loss {i} of some length, with a tail policy that fits" for i in range(4))
    lines = aligned({"text": "one; short", "losses": long}).splitlines()
    assert lines[0] == "text    one; short"
    assert [line[8:12] for line in lines[1:]] == ["loss"] * 4
    assert lines[1].startswith("losses  loss 0")
    assert lines[1].endswith(";")
    assert not lines[4].endswith(";")
