"""Drawing with matplotlib, imported only here; without pyplot, so without global state or a display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from kdcache.report.evaluation import TEACHER, Curves
from kdcache.report.terms import smoothed

_COLORS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#846358")
_TEACHER_COLOR = "#555555"
_BARS = (
    ("nats_per_token", "Held-out loss", "nats per token (lower is better)", 1.0),
    ("kl", "KL(teacher || student)", "nats per token (lower is better)", 1.0),
    ("top1_agreement", "Same top-1 token as the teacher", "% of positions (higher is better)", 100.0),
)


def draw_evaluation(results: Mapping[str, Any], curves: Curves, path: Path) -> None:
    """Draw what `kdcache.report.plot.plot_evaluation` describes."""
    students = [name for name in results["models"] if name != TEACHER]
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(students)} | {TEACHER: _TEACHER_COLOR}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    num_panels = len(_BARS) + bool(curves)
    figure = Figure(figsize=(4.0 * num_panels + (1.5 if curves else 0), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [1.4] * bool(curves) + [1.0] * len(_BARS)
    panels = list(figure.subplots(1, num_panels, width_ratios=ratios))
    if curves:
        _draw_curves(panels.pop(0), curves, results["models"][TEACHER]["nats_per_token"]["value"], colors)
    for axes, (metric, title, unit, scale) in zip(panels, _BARS, strict=True):
        names = students if metric == "kl" or metric == "top1_agreement" else [*students, TEACHER]
        _draw_bars(axes, {name: results["models"][name][metric] for name in names}, scale, colors)
        axes.set_title(title, fontsize=11)
        axes.set_ylabel(unit)
    figure.suptitle(_caption(results), fontsize=9, color="#555555")
    figure.savefig(path, dpi=150)


def draw_terms(curves: Mapping[str, Curves], path: Path) -> None:
    """Draw what `kdcache.report.plot.plot_terms` describes."""
    terms = list(dict.fromkeys(name for own in curves.values() for name in own))
    columns = min(3, len(terms))
    lines = -(-len(terms) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, term in zip(panels, terms, strict=False):
        for i, (student, own) in enumerate(curves.items()):
            if term in own:
                tokens, means = zip(*smoothed({term: own[term]})[term], strict=True)
                axes.plot(tokens, means, color=_COLORS[i % len(_COLORS)], linewidth=1.5, label=student)
        axes.set_title(term, fontsize=11)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _tidy(axes)
    for axes in panels[len(terms) :]:
        axes.set_axis_off()
    panels[0].set_xlabel("tokens read")
    panels[0].set_ylabel("mean before its weight")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Axes, curves: Curves, teacher_loss: float, colors: Mapping[str, str]) -> None:
    for name, points in curves.items():
        tokens, losses = zip(*points, strict=True)
        axes.plot(tokens, losses, color=colors[name], linewidth=1.8, label=name)
    axes.axhline(teacher_loss, color=_TEACHER_COLOR, linestyle="--", linewidth=1.2, label="teacher")
    axes.set_ylim(top=_top(curves, teacher_loss))
    axes.set_title("Held-out loss while training", fontsize=11)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _tidy(axes)
    axes.legend(frameon=False)


def _top(curves: Curves, teacher_loss: float) -> float:
    """The plot's upper edge: the steep fall of the first tenth is cut off, or it would flatten all that follows."""
    end = max(points[-1][0] for points in curves.values())
    settled = [loss for points in curves.values() for tokens, loss in points[1:] if tokens >= end / 10]
    return teacher_loss + 1.1 * (max(settled, default=teacher_loss + 1) - teacher_loss)


def _draw_bars(axes: Axes, entries: Mapping[str, Mapping[str, float | None]], scale: float, colors: Mapping[str, str]) -> None:
    values = [scale * (entry["value"] or 0.0) for entry in entries.values()]
    errors = [scale * 1.96 * (entry["standard_error"] or 0.0) for entry in entries.values()]
    bars = axes.bar(
        list(entries), values, yerr=errors, color=[colors[name] for name in entries], width=0.6, capsize=4, ecolor="#222222"
    )
    digits = 1 if scale != 1 else 3
    axes.bar_label(bars, labels=[f"{value:.{digits}f}" for value in values], padding=4, fontsize=10)
    axes.set_ylim(0, 1.15 * max(v + e for v, e in zip(values, errors, strict=True)) or 1)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def _caption(results: Mapping[str, Any]) -> str:
    return (
        f"{results['num_tokens']:,} held-out tokens in {results['num_sequences']:,} sequences; "
        f"bars: 95% intervals over resampled {results['bootstrap']['resampled']}"
    )
