"""A curve in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
"""Eight heights of the Unicode block elements."""

ASCII = "_.-~=+*#"
"""Eight heights for a terminal that cannot show them."""


def sparkline(
    values: Sequence[float],
    *,
    width: int = 40,
    low: float | None = None,
    high: float | None = None,
    encoding: str | None = "utf-8",
) -> str:
    """Draw up to `width` characters, one per value or per mean of neighbouring values; a blank where a value is not finite.

    Args:
        values: in order.
        width: most characters.
        low, high: values of the lowest and highest character; by default those of the values, so that curves to be compared
            should be given the same.
        encoding: of the terminal; where it has no block elements, ASCII is used.
    """
    points = _means(values, width)
    finite = [v for v in points if math.isfinite(v)]
    if not finite:
        return " " * len(points)
    bottom = min(finite) if low is None else low
    span = (max(finite) if high is None else high) - bottom
    heights = BLOCKS if _can_show(BLOCKS, encoding) else ASCII
    return "".join(_character(v, bottom, span, heights) for v in points)


def _character(value: float, bottom: float, span: float, heights: str) -> str:
    if not math.isfinite(value):
        return " "
    share = (value - bottom) / span if span > 0 else 0.0
    return heights[min(len(heights) - 1, max(0, int(share * len(heights))))]


def _means(values: Sequence[float], width: int) -> list[float]:
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else [0]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _can_show(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
