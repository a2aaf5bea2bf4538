"""Make text from a file, a server or a library safe to print: nothing moves the cursor, hides, or is endless.

A name in a stranger's cache may hold escape sequences, bidirectional overrides that reverse a line, or invisible characters.
All errors, warnings, progress and results pass through this module, which also masks secrets (`kdcache.credentials`).
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from kdcache.credentials import masked

MOST_CHARACTERS = 2000
"""Of one line: enough for a sentence with a few long paths."""
MOST_LINES = 1000
_MOST_READ = 20_000

# Invisible, although Python calls them printable: fillers, joiners and variation selectors. `str.isprintable` knows all other
# characters that are invisible or move text: Cc, Cf, Cs, Co, Cn, Zl, Zp, and blanks other than U+0020.
_UNSEEN = "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef"
_IS_UNSEEN = re.compile(f"[{_UNSEEN}]")


class Lines(str):
    """Text of several lines that is already safe to print; its line breaks are ours."""

    __slots__ = ()


def shown(value: Any, most: int = MOST_CHARACTERS) -> str:
    """One line that is safe to print: other characters become Python's escapes (`\\x1b`, `\\u202e`, `\\n`), secrets are masked.

    Args:
        value: text, or a value that `str` turns into text.
        most: characters; a longer text loses its middle, because the end of a sentence says what to do.
    """
    text = str(value)
    if len(text) > _MOST_READ:
        text = _without_middle(text, _MOST_READ)
    text = masked(text)
    if len(text) > most:
        text = _without_middle(text, most)
    if not is_plain(text):
        text = "".join(character if is_plain(character) else _escaped(character) for character in text)
        text = _without_middle(text, most) if len(text) > most else text
    return text


def shown_lines(lines: str | Iterable[Any], most: int = MOST_CHARACTERS) -> Lines:
    """Several lines, each as from `shown`; a text is split at its line feeds."""
    parts = lines.split("\n") if isinstance(lines, str) else list(lines)
    left_out = len(parts) - MOST_LINES
    if left_out > 0:
        parts = [*parts[: MOST_LINES // 2], f"... {left_out:,} lines are left out ...", *parts[-MOST_LINES // 2 :]]
    return Lines("\n".join(shown(part, most) for part in parts))


def is_plain(text: str) -> bool:
    """Whether a text can be printed as it is, on one line."""
    return text.isprintable() and (text.isascii() or _IS_UNSEEN.search(text) is None)


def as_printed(text: str) -> str:
    """Make JSON of any length safe to print: unsafe characters become `\\u` escapes, secrets are masked, line breaks stay.

    This does not change what the JSON means, because such characters occur in strings only.
    """
    text = masked(text)
    if all(map(is_plain, text.split("\n"))):
        return text
    return "".join(character if character == "\n" or is_plain(character) else _json_escaped(character) for character in text)


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines to stdout or to `file`. Everything that commands print passes through here.

    A stream that cannot write a character, as in a C locale, gets its escape.
    """
    write(shown_lines(text), file)


def write(text: str, file: TextIO | None = None) -> None:
    """Print text that is already safe, in the characters that the stream supports."""
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's text, without its full stop, for a sentence of ours; its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def get_logger(name: str) -> logging.Logger:
    """The logger of one of our modules; its messages are made safe to print for every handler."""
    logger = logging.getLogger(name)
    if not any(isinstance(known, _ShownFilter) for known in logger.filters):
        logger.addFilter(_ShownFilter())
    return logger


class _ShownFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage()), ()
        return True


def _without_middle(text: str, most: int) -> str:
    head = max(0, most - 5) * 2 // 3
    tail = max(0, most - 5 - head)
    return f"{text[:head]} ... {text[len(text) - tail :]}"[:most]


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _json_escaped(character: str) -> str:
    return "".join(f"\\u{unit:04x}" for unit in memoryview(character.encode("utf-16-le", "surrogatepass")).cast("H"))
