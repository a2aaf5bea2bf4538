"""The terms of a loss while a student was trained: a line of text for each, and the data of a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.report.evaluation import Curves, curve_lines

_MOST_POINTS = 200


def term_curves(metrics: Sequence[Mapping[str, Any]]) -> Curves:
    """Of each term, (tokens read, its mean before its weight), in order; empty where a loss has one term.

    Args:
        metrics: the lines of a run's `metrics.jsonl`.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        terms = line.get("terms")
        for name, value in terms.items() if isinstance(terms, dict) else ():
            # What a dot is in is a weight or a measure of the term before it.
            if "." not in name and isinstance(value, float):
                curves.setdefault(name, []).append((line["tokens"], value))
    return curves


def term_lines(curves: Curves, *, encoding: str | None = "utf-8") -> list[str]:
    """Draw a sparkline per term, each on its own scale, with its first and last mean."""
    width = max(map(len, curves), default=0)
    return [
        line for name, points in curves.items() for line in curve_lines({name.ljust(width): _means(points)}, encoding=encoding)
    ]


def _means(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most 200 points, each the mean of its neighbours: steps are noisy."""
    size = -(-len(points) // _MOST_POINTS)
    parts = [points[at : at + size] for at in range(0, len(points), max(1, size))]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def smoothed(curves: Curves) -> Curves:
    """The curves as they are drawn."""
    return {name: _means(points) for name, points in curves.items()}
