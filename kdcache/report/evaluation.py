"""An evaluation as people read it: its table, its sentences and its lines for the terminal.

Takes the plain data that `results.json` holds (see `kdcache.train.evaluation.compare`), so that a saved evaluation can be shown
again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.report.sparkline import sparkline
from kdcache.report.table import Table

TEACHER = "teacher"

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Student -> (tokens read, held-out nats per token), in order; what the runs measured while training."""


def evaluation_table(results: Mapping[str, Any]) -> Table:
    """Make a line per model, the teacher first: loss, KL and top-1 agreement with standard errors, and the gap closed."""
    headers = [
        "model",
        "loss, nats/token",
        "nats/byte",
        "KL to teacher, nats",
        "top-1 agreement",
        "accuracy",
        "loss gap closed",
    ]
    lines = [
        [
            name,
            _with_error(metrics["nats_per_token"], 4),
            f"{metrics['nats_per_byte']['value']:.4f}",
            _with_error(metrics["kl"], 4),
            _with_error(metrics["top1_agreement"], 1, percent=True),
            f"{100 * metrics['accuracy']['value']:.1f}%",
            _gap(results, name),
        ]
        for name, metrics in results["models"].items()
    ]
    return Table(headers, lines)


def evaluation_sentences(results: Mapping[str, Any]) -> list[str]:
    """Say of each student but the baseline whether it is better, by how much, and how sure that is."""
    baseline = results["baseline"]
    return [
        f"{name} against {baseline}: "
        + "; ".join(_difference(metric, unit, entry[metric], sign) for metric, unit, sign in _VERDICTS)
        for name, entry in results["comparisons"].items()
    ]


def curve_lines(curves: Curves, *, encoding: str | None = "utf-8") -> list[str]:
    """Draw a sparkline per student on a common scale, with first and last held-out loss.

    The scale leaves out each curve's first point, an untrained student: its fall would flatten all that follows.
    """
    values = {name: [loss for _, loss in points] for name, points in curves.items() if points}
    if not values:
        return []
    settled = [loss for losses in values.values() for loss in losses[1:] or losses]
    low, high = min(settled), max(settled)
    width = max(map(len, values))
    return [
        f"{name.ljust(width)}  {losses[0]:.3f} {sparkline(losses, low=low, high=high, encoding=encoding)} {losses[-1]:.3f}"
        for name, losses in values.items()
    ]


_VERDICTS = (
    ("nats_per_token", "nats/token of loss", -1),
    ("kl", "nats of KL", -1),
    ("top1_agreement", "of top-1 agreement", 1),
)
"""Metric, words, and the sign of an improvement."""


def _difference(metric: str, unit: str, interval: Mapping[str, float | None], better: int) -> str:
    value, low, high = interval["value"], interval["low"], interval["high"]
    scale, suffix = (100.0, " points") if metric == "top1_agreement" else (1.0, "")
    digits = 1 if scale != 1 else 4
    if value is None or low is None or high is None:
        return f"{_signed(value, scale, digits)}{suffix} {unit} (no interval: too little data)"
    verdict = (
        "better"
        if min(low * better, high * better) > 0
        else "worse"
        if max(low * better, high * better) < 0
        else "no clear difference"
    )
    spread = f"95% interval {_signed(low, scale, digits)} to {_signed(high, scale, digits)}"
    return f"{_signed(value, scale, digits)}{suffix} {unit} ({spread}): {verdict}"


def _signed(value: float | None, scale: float, digits: int) -> str:
    return "n/a" if value is None else f"{value * scale:+.{digits}f}"


def _with_error(entry: Mapping[str, float | None], digits: int, *, percent: bool = False) -> str:
    scale, sign = (100, "%") if percent else (1, "")
    value, error = entry["value"], entry["standard_error"]
    assert value is not None
    spread = f" +- {error * scale:.{digits}f}" if error else ""
    return f"{value * scale:.{digits}f}{sign}{spread}"


def _gap(results: Mapping[str, Any], name: str) -> str:
    if name == TEACHER:
        return "100%"
    if name == results["baseline"]:
        return "0%"
    share = results["gap_closed"][name]["nats_per_token"]
    if share["value"] is None:
        return "n/a"
    spread = (
        f" [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"
        if share["low"] is not None and share["high"] is not None
        else ""
    )
    return f"{100 * share['value']:.0f}%{spread}"
