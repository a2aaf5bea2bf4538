"""Where a bar goes to a file, its states are lines, few of them; on a terminal it is tqdm's own."""

import io
import sys
import time

import pytest
from tqdm import tqdm

from kdcache import bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", 0.05)
    with tqdm(**bars.bar_options(total=3, desc="training", unit="step")) as bar:
        for number in range(3):
            time.sleep(0.06)
            bar.set_postfix(loss=number, refresh=False)
            bar.update()
    return stream.getvalue()


def test_a_file_gets_whole_lines_and_a_terminal_one_that_is_overwritten(monkeypatch: pytest.MonkeyPatch):
    text = shown(monkeypatch, io.StringIO())
    assert "\r" not in text
    lines = text.splitlines()
    assert 2 <= len(lines) <= 5
    assert all(line.startswith("training: ") for line in lines)
    assert "3/3" in lines[-1]
    assert "loss=2" in lines[-1]
    assert "\r" in shown(monkeypatch, Terminal())


def test_a_short_bar_with_a_delay_says_nothing_in_a_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with tqdm(**bars.bar_options(total=100, delay=2)) as bar:
        for _ in range(100):
            bar.update()
    assert stream.getvalue() == ""
