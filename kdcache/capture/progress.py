"""What a capture tells the person who waits for it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from kdcache.capture.content import Item
from kdcache.capture.plan import Unit

_DELAY_SECONDS = 1.0
_SECONDS_BETWEEN_LINES = 10.0
"""Between two states of a bar that goes to a file, where each is a line and none is overwritten."""


class CaptureProgress:
    """Says nothing. Subclasses say it as they like; a capture calls the methods in the order in which they stand here."""

    def scanning(self, items: Iterable[Item]) -> Iterable[Item]:
        """Wraps the items while the plan is made."""
        return items

    def loading(self, model: str) -> None:
        """The teacher is about to be loaded."""

    def start(self, units: Sequence[Unit]) -> None:
        """These units, not published yet, are about to be captured."""

    def start_unit(self, unit: Unit, num_tokens: int) -> None:
        """A unit has been read and is this many tokens long."""

    def advance(self, num_tokens: int) -> None:
        """The teacher has answered for one more sequence."""

    def close(self) -> None:
        """Nothing follows, after success or failure."""


class BarProgress(CaptureProgress):
    """Bars on stderr: items while planning, tokens (with tokens/s and the time left) while capturing.

    The number of tokens to come is estimated from the characters to come and the tokens per character so far.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._chars_left = self._chars_read = self._tokens_read = 0

    def scanning(self, items: Iterable[Item]) -> Iterable[Item]:
        return tqdm(
            items,
            desc="reading the input",
            unit=" items",
            unit_scale=True,
            delay=_DELAY_SECONDS,
            mininterval=_interval(),
            file=sys.stderr,
        )

    def loading(self, model: str) -> None:
        tqdm.write(f"loading the teacher {model}", file=sys.stderr)

    def start(self, units: Sequence[Unit]) -> None:
        self._chars_left = sum(unit.num_chars for unit in units)
        self._bar = tqdm(
            desc=f"capturing {len(units)} unit{'' if len(units) == 1 else 's'}",
            unit=" tok",
            unit_scale=True,
            mininterval=_interval(),
            file=sys.stderr,
        )

    def start_unit(self, unit: Unit, num_tokens: int) -> None:
        self._chars_left -= unit.num_chars
        self._chars_read += unit.num_chars
        self._tokens_read += num_tokens
        if self._bar is not None and self._chars_read:
            self._bar.total = self._tokens_read + round(self._chars_left * self._tokens_read / self._chars_read)

    def advance(self, num_tokens: int) -> None:
        if self._bar is not None:
            self._bar.update(num_tokens)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _interval() -> float:
    return 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
