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
    """Make a line per model, the teacher first: size, loss, KL, agreement, accuracy, and what is kept of the teacher's."""
    headers = [
        "model",
        "parameters",
        "loss, nats/token",
        "KL to teacher, nats",
        "top-1 agreement",
        "accuracy",
        "accuracy kept",
        "nats over unigram kept",
    ]
    lines = [
        [
            name,
            _size(results, name),
            _with_error(metrics["nats_per_token"], 4),
            _with_error(metrics["kl"], 4),
            _with_error(metrics["top1_agreement"], 1, percent=True),
            f"{100 * metrics['accuracy']['value']:.1f}%",
            _kept(results, name, "accuracy"),
            _kept(results, name, "nats_over_unigram"),
        ]
        for name, metrics in results["models"].items()
    ]
    return Table(headers, lines)


def retention_sentences(results: Mapping[str, Any]) -> list[str]:
    """Say of each student what it keeps of the teacher, with how many of its parameters; and why where nats are unknown."""
    sentences = []
    for name, kept in results["retention"].items():
        shares = [f"{_share(kept['accuracy'])} of the teacher's top-1 accuracy"]
        if kept["nats_over_unigram"] is not None:
            shares.append(f"{_share(kept['nats_over_unigram'])} of its nats over unigram")
        sizes = [results["sizes"][model]["non_embedding"] for model in (name, TEACHER)]
        size = f", with {sizes[0] / sizes[1]:.0%} of its non-embedding parameters" if sizes[1] else ""
        sentences.append(f"{name} keeps {' and '.join(shares)}{size}")
    if results["unigram"] is None:
        why = results["inputs"]["unigram"]["missing"]
        sentences.append(f"nats over unigram are not known ({why}); name training text or a cache of it with --unigram")
    return sentences


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


def _size(results: Mapping[str, Any], name: str) -> str:
    """Non-embedding parameters, and their share of the teacher's."""
    own, teacher = (results["sizes"][model]["non_embedding"] for model in (name, TEACHER))
    share = "" if name == TEACHER or not teacher else f" ({own / teacher:.0%})"
    return f"{own:,}{share}"


def _kept(results: Mapping[str, Any], name: str, metric: str) -> str:
    if name == TEACHER:
        return "100%"
    share = results["retention"][name][metric]
    return "n/a" if share is None else _share(share)


def _share(share: Mapping[str, float | None]) -> str:
    if share["value"] is None:
        return "n/a"
    spread = "" if share["low"] is None or share["high"] is None else f" [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
    return f"{100 * share['value']:.1f}%{spread}"
