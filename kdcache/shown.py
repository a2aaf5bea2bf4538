"""Text from a file, a server or a library as it can be printed: nothing in it moves a cursor, hides or goes on for ever.

A name in a stranger's cache may hold what a terminal obeys (escape sequences), what turns a line around (bidirectional
overrides), or what cannot be seen. The one place where such text becomes plain: errors, warnings, progress and results all
come through here, and leave without the secrets in them (`kdcache.credentials`).
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from kdcache.credentials import masked

MOST_CHARACTERS = 2000
"""Of one line: room for a sentence with a few long paths in it."""
MOST_LINES = 1000
_MOST_READ = 20_000

# Invisible, although Python calls them printable: fillers, joiners and variation selectors. Everything else that is not seen,
# or moves what is seen, is of the kinds that `str.isprintable` knows: Cc, Cf, Cs, Co, Cn, Zl, Zp, and blanks other than U+0020.
_UNSEEN = "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef"
_IS_UNSEEN = re.compile(f"[{_UNSEEN}]")


class Lines(str):
    """Text of several lines whose breaks are ours; what stands in them is shown already."""

    __slots__ = ()


def shown(value: Any, most: int = MOST_CHARACTERS) -> str:
    """One line of a terminal or a log: what is not plain text is written as Python's escapes, `\\x1b`, `\\u202e`, `\\n`, and
    secrets are masked.

    Args:
        value: text, or what is made text by `str`.
        most: characters; of a longer text the middle is left out, as what to do stands at a sentence's end.
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
    """Several lines, each as `shown` has it; text is taken apart at its line feeds."""
    parts = lines.split("\n") if isinstance(lines, str) else list(lines)
    left_out = len(parts) - MOST_LINES
    if left_out > 0:
        parts = [*parts[: MOST_LINES // 2], f"... {left_out:,} lines are left out ...", *parts[-MOST_LINES // 2 :]]
    return Lines("\n".join(shown(part, most) for part in parts))


def is_plain(text: str) -> bool:
    """Whether a text can be printed as it is, on one line."""
    return text.isprintable() and (text.isascii() or _IS_UNSEEN.search(text) is None)


def as_printed(text: str) -> str:
    """A text whose line breaks stay, of any length, as JSON is: characters that would not be plain as its `\\u` escapes, and
    secrets masked.

    Right for JSON, where they can stand in strings alone; what is read from it is what was written.
    """
    text = masked(text)
    if all(map(is_plain, text.split("\n"))):
        return text
    return "".join(character if character == "\n" or is_plain(character) else _json_escaped(character) for character in text)


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines: to stdout, or to `file`. All that commands print comes through here.

    A stream that cannot write a character, as in a C locale, gets its escape.
    """
    write(shown_lines(text), file)


def write(text: str, file: TextIO | None = None) -> None:
    """Print text that is plain already, as `as_printed` gives it, in the characters that the stream has."""
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's text, without its full stop, for a sentence of ours; its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of ours; what it says is shown, whoever handles it."""
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
