"""Curves of a loss's terms: as lines of text and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdcache.report.plot import plot_terms
from kdcache.report.terms import smoothed, term_curves, term_lines


def metrics(num_steps: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "heldout_nats_per_token": 3.0}]
    for step in range(num_steps):
        terms = {"divergence": 4.0 - step / num_steps, "codes": 100.0 + step, "codes.weight": 0.1, "codes.largest": 7.0}
        lines.append({"step": step + 1, "tokens": 10 * (step + 1), "loss": 1.0, "terms": terms})
    return lines


def test_each_term_has_a_curve_of_its_means_alone() -> None:
    curves = term_curves(metrics(5))
    assert list(curves) == ["divergence", "codes"]
    assert curves["codes"] == [(10, 100.0), (20, 101.0), (30, 102.0), (40, 103.0), (50, 104.0)]
    first, second = term_lines(curves)
    assert first.startswith("divergence  4.000 ")
    assert second.startswith("codes       100.000 ")
    assert term_curves([{"step": 1, "tokens": 3, "loss": 1.0}]) == {}
    assert term_lines({}) == []


def test_long_curves_are_drawn_from_means() -> None:
    drawn = smoothed(term_curves(metrics(1000)))["codes"]
    assert len(drawn) == 200
    assert drawn[0] == (50, 102.0)
    assert drawn[-1] == (10_000, 1097.0)


def test_the_plot_has_a_panel_per_term_and_none_is_written_without_terms(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot_terms({"kd": term_curves(metrics(30)), "labels": {}}, tmp_path / "terms.png")
    assert (tmp_path / "terms.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_terms({"labels": {}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
