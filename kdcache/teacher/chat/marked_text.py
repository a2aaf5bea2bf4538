"""Text whose characters know where they come from, so that a chat template's output can be traced back to the messages.

A chat template is a program. Whatever it does with a message (trims it, splits it at `</think>`, folds it into another turn), a
`MarkedText` records from inside: each operation that gives a part of it, or joins it with other text, carries the characters'
origins along. An operation that does not carry them gives plain text of unknown origin: that leaves less to prove with, but
proves nothing wrong.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

OFFSET_BITS = 32
GENERATED = np.int64(1) << np.int64(62)
"""The bit of characters between a template's generation tags."""


class MarkedText(str):
    """A text with an origin for each character.

    Attributes:
        origins: int64 for each character. 0 is the template's own text; else (source + 1) << 32 | offset into that source.
            GENERATED may be added to either.
    """

    origins: NDArray[np.int64]

    def __new__(cls, text: str, origins: NDArray[np.int64]) -> MarkedText:
        """A text with its origins, of the same length."""
        made = super().__new__(cls, text)
        assert len(made) == len(origins)
        made.origins = origins
        return made

    def __str__(self) -> MarkedText:
        return self

    def __add__(self, other: str) -> MarkedText:
        return concatenate((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> MarkedText:
        return concatenate((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> MarkedText:
        return concatenate([self] * int(times))

    def __rmul__(self, times: SupportsIndex) -> MarkedText:
        return self * times

    def __getitem__(self, key: SupportsIndex | slice) -> MarkedText:
        # Templates ask a text for its field `content`, which has to fail as a text's does.
        origins = self.origins[key if isinstance(key, slice) else [operator.index(key)]]
        return MarkedText(super().__getitem__(key), origins)

    def __iter__(self) -> Iterator[MarkedText]:
        return (self[index] for index in range(len(self)))

    def strip(self, chars: str | None = None, /) -> MarkedText:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> MarkedText:
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> MarkedText:
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str, /) -> MarkedText:
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> MarkedText:
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[MarkedText]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._found(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[MarkedText]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._found(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[MarkedText]:  # pyright: ignore[reportIncompatibleMethodOverride]
        lines = self._found(super().splitlines(True), "")
        return lines if keepends else [line[: len(text)] for line, text in zip(lines, super().splitlines(), strict=True)]

    def partition(self, sep: str, /) -> tuple[MarkedText, MarkedText, MarkedText]:
        before, middle, after = self._found(super().partition(sep), "")
        return before, middle, after

    def rpartition(self, sep: str, /) -> tuple[MarkedText, MarkedText, MarkedText]:
        before, middle, after = self._found(super().rpartition(sep), "")
        return before, middle, after

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        return interleave(new, self.split(old, count)) if old else super().replace(old, new, count)

    def join(self, parts: Iterable[str], /) -> str:
        return interleave(self, parts)

    def upper(self) -> str:
        return self._of_equal_length(super().upper())

    def lower(self) -> str:
        return self._of_equal_length(super().lower())

    def capitalize(self) -> str:
        return self._of_equal_length(super().capitalize())

    def title(self) -> str:
        return self._of_equal_length(super().title())

    def as_json(self, *, ensure_ascii: bool) -> MarkedText:
        """The inside of a JSON string; each escape has the origin of its character."""
        escaped = [json.dumps(char, ensure_ascii=ensure_ascii)[1:-1] for char in str.__str__(self)]
        return MarkedText("".join(escaped), np.repeat(self.origins, [len(text) for text in escaped]))

    def _found(self, parts: Iterable[str], sep: str | None) -> list[MarkedText]:
        """Find parts that follow one another in this text, as slices of it."""
        found, start = [], 0
        for part in parts:
            start = super().find(part, start) if sep is None else start
            found.append(self[start : start + len(part)])
            start += len(part) + len(sep or "")
        return found

    def _of_equal_length(self, text: str) -> str:
        return MarkedText(text, self.origins) if len(text) == len(self) else text


def mark(text: str, source: int) -> MarkedText:
    """Mark a text whose characters all come from one source, counted from 0."""
    return MarkedText(text, (np.int64(source + 1) << np.int64(OFFSET_BITS)) + np.arange(len(text), dtype=np.int64))


def mark_generated(text: str) -> MarkedText:
    """Mark a text as standing between generation tags."""
    return MarkedText(text, origins_of(text) | GENERATED)


def origins_of(text: str) -> NDArray[np.int64]:
    """The origins of any text; 0 where it is not marked."""
    return text.origins if isinstance(text, MarkedText) else np.zeros(len(text), np.int64)


def sources_of(origins: NDArray[np.int64]) -> NDArray[np.int64]:
    """The source of each character; -1 if it has none."""
    return ((origins & ~GENERATED) >> np.int64(OFFSET_BITS)) - 1


def offsets_of(origins: NDArray[np.int64]) -> NDArray[np.int64]:
    """The offset of each character in its source."""
    return origins & ((np.int64(1) << np.int64(OFFSET_BITS)) - 1)


def concatenate(parts: Iterable[str]) -> MarkedText:
    """Join the parts."""
    parts = list(parts)
    return MarkedText("".join(parts), np.concatenate([np.zeros(0, np.int64), *map(origins_of, parts)]))


def interleave(separator: str, parts: Iterable[str]) -> MarkedText:
    """Join the parts with a separator."""
    between = [piece for part in parts for piece in (separator, part)]
    return concatenate(between[1:])


def dump_json(value: Any, **options: Any) -> str:
    """Like `json.dumps`, but the marks of the values' texts survive; keys of objects are not marked."""
    marked: list[MarkedText] = []
    sign = "@"
    while sign in json.dumps(value, **options):
        sign += "@"
    pieces: list[str] = re.split(f"{sign}([0-9]+){sign}", json.dumps(_with_signs(value, marked, sign), **options))
    for index in range(1, len(pieces), 2):  # every other piece is a number
        pieces[index] = marked[int(pieces[index])].as_json(ensure_ascii=options.get("ensure_ascii", True))
    return concatenate(pieces) if marked else pieces[0]


def _with_signs(value: Any, marked: list[MarkedText], sign: str) -> Any:
    if isinstance(value, MarkedText):
        marked.append(value)
        return f"{sign}{len(marked) - 1}{sign}"
    if isinstance(value, dict):
        return {key: _with_signs(child, marked, sign) for key, child in value.items()}
    return [_with_signs(child, marked, sign) for child in value] if isinstance(value, (list, tuple)) else value


def runs(keep: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The (start, stop) of each run of true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in list(pairwise(edges))[::2]]
