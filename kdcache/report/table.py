"""Tables for people: aligned text for a terminal, Markdown for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdcache.shown import shown

MOST_CHARACTERS = 100
"""Most characters of a cell."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of formatted cells.

    Attributes:
        headers: one per column.
        lines: each as long as headers. The first column is text and aligned left, the others are numbers and aligned right.
    """

    headers: Sequence[str]
    lines: Sequence[Sequence[str]]

    def to_text(self) -> str:
        """Format as lines with columns two blanks apart and a rule under the headers."""
        cells = _plain([self.headers, *self.lines])
        widths = _widths(cells)
        lines = [_aligned(line, widths) for line in cells]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join(line.rstrip() for line in (lines[0], rule, *lines[1:]))

    def to_markdown(self) -> str:
        """Format as a GitHub table, readable as text too."""
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in _plain([self.headers, *self.lines])]
        widths = [max(3, width) for width in _widths(escaped)]
        rule = [":" + "-" * (width - 1) if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        lines = [_aligned(line, widths, " | ") for line in (escaped[0], rule, *escaped[1:])]
        return "\n".join(f"| {line} |" for line in lines)


def _plain(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[shown(cell, MOST_CHARACTERS) for cell in line] for line in lines]


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _aligned(line: Sequence[str], widths: Sequence[int], gap: str = "  ") -> str:
    cells = [
        cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    return gap.join(cells)
