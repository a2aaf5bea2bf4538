"""What is printed of a file's text: no character that a terminal obeys or hides, and no more than a line's worth."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import CacheNotFoundError, CorruptCacheError, InputError, KdcacheError
from kdcache.shown import Lines, as_printed, get_logger, is_plain, say, shown, shown_lines

HOSTILE = (
    *map(chr, range(0x20)), "\x7f", *map(chr, range(0x80, 0xA0)), "\u061c", "\u200b", "\u200c", "\u200d", "\u200e", "\u200f",
    "\u2028", "\u2029", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2060, 0x2070)), "\u3164", "\ufe0f", "\ufeff",
    "\ud800", "\U000e0001", "\U000e0041", "\U000e0100",
)  # fmt: skip


@pytest.mark.parametrize("character", HOSTILE, ids=lambda character: f"{ord(character):04x}")
def test_what_a_terminal_obeys_or_hides_is_written_as_an_escape(character: str):
    assert is_plain(shown(f"a{character}b"))
    assert re.fullmatch(r"a\\(x..|u....|U........|[tnr])b", shown(f"a{character}b"))


@given(st.text(), st.integers(8, 300))
def test_any_text_is_plain_bounded_and_shown_once(text: str, most: int):
    line = shown(text, most)
    assert len(line) <= most
    assert all(unicodedata.category(character)[0] != "C" or not character.strip() for character in line)
    assert shown(line, most) == line
    if is_plain(text) and len(text) <= most:
        assert line == text


def test_of_a_long_text_the_middle_is_left_out():
    line = shown("file: " + "x" * 10**6 + "; delete it", 100)
    assert len(line) == 100
    assert line.startswith("file: xxx")
    assert line.endswith("xxx; delete it")
    assert len(shown("\x1b" * 10**6, 100)) <= 100


def test_lines_keep_their_own_breaks_alone():
    text = shown_lines(["first", "a\nforged: line"])
    assert text == "first\na\\nforged: line"
    assert shown_lines("\n".join(map(str, range(5000)))).count("\n") == 1000


def test_every_error_of_ours_is_plain_wherever_it_is_printed():
    error = CorruptCacheError("manifest: \x1b[2Jname\nkdcache: error: forged")
    assert str(error) == "manifest: \\x1b[2Jname\\nkdcache: error: forged"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(CacheNotFoundError("no cache at '\x9b'")) == "no cache at '\\x9b'"
    assert len(str(InputError("x" * 10**6))) <= 2000
    several = InputError(shown_lines(["refused:", "  one\r"]))
    assert str(several) == "refused:\n  one\\r"
    assert str(pickle.loads(pickle.dumps(several))) == str(several)
    assert isinstance(several.args[0], Lines)


def test_json_stays_json_and_says_the_same():
    values = ["".join(HOSTILE).replace("\ud800", ""), "plain \u00e9\u4e2d", "\U0001f600\U000e0041"]
    text = as_printed(json.dumps(values, ensure_ascii=False))
    assert json.loads(text) == values
    assert is_plain(text)
    assert "\u00e9\u4e2d" in text


def test_a_logger_of_ours_shows_what_it_says(caplog: pytest.LogCaptureFixture):
    get_logger("kdcache.tests").warning("%s: damaged", "\x1b]0;title\x07")
    get_logger("kdcache.tests").warning("%s", "x" * 10**5)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "\\x1b]0;title\\x07: damaged"
    assert len(second) <= 2000


def test_a_stream_that_lacks_a_character_gets_its_escape():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("caf\u00e9 \x1b", stream)
    stream.seek(0)
    assert stream.read() == "caf\\xe9 \\x1b\n"


def test_a_bug_s_traceback_is_shown_too(capsys: pytest.CaptureFixture[str]):
    from kdcache.cli.main import _show_bug

    try:
        raise RuntimeError("a library's text \x1b[2J")
    except RuntimeError:
        _show_bug(*sys.exc_info())  # pyright: ignore[reportArgumentType]
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "a library's text \\x1b[2J" in told


def test_no_module_prints_or_logs_but_by_these_ways():
    """Else the next line that somebody adds would print a file's text as it is."""
    root = Path(__file__).parents[1] / "kdcache"
    pattern = re.compile(
        r"(?<![.\w])print\(|logging\.getLogger\((?!\")|sys\.std(?:out|err)\.write|traceback\.print_|warnings\.warn"
    )
    found = {
        f"{path.relative_to(root)}: {line.strip()}"
        for path in root.rglob("*.py")
        if path.name != "shown.py"
        for line in path.read_text().splitlines()
        if pattern.search(line)
    }
    assert not found


def test_errors_of_every_kind_go_through_the_same_gate():
    def kinds(of: type[KdcacheError]) -> list[type[KdcacheError]]:
        return [of, *(kind for sub in of.__subclasses__() for kind in kinds(sub))]

    for kind in kinds(KdcacheError):
        if kind.__module__ == "kdcache.errors" and kind.__name__ != "MissingDependencyError":
            assert is_plain(str(kind("\x1b"))), kind
