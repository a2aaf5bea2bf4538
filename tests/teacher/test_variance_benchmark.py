"""benchmarks/selection_variance.py runs and reports; its ratios are those of the points."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import selection_variance as benchmark


def point(scheme: str, ids: float, error: float) -> benchmark.Point:
    return benchmark.Point(scheme, {}, ids, 3 * ids, error, 0.0, 0.9)


def test_the_quick_benchmark_reports_every_scheme(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    benchmark.main(["--quick", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "selection_variance.json").read_text())
    assert {found["scheme"] for found in report["points"]} == set(benchmark.SIZES)
    assert all(found["error"] > 0 and found["ids"] > 0 for found in report["points"])
    assert (tmp_path / "selection_variance.md").read_text().strip() in capsys.readouterr().out


def test_ratios_are_those_at_equal_sizes_and_stand_beside_what_was_expected():
    drawn = [point("sampled", ids, 1 / ids) for ids in (4.0, 8.0, 16.0, 32.0)]
    ours = [point("threshold", ids, 1 / (4 * ids)) for ids in (4.0, 8.0, 16.0, 32.0)]
    of_ids, of_bytes = benchmark.against_sampled([*drawn, *ours])
    assert of_ids.endswith("4.0 at 8, 4.0 at 16, 4.0 at 24; expected 3.0: reached")
    assert of_bytes.endswith("4.0 at 12, 4.0 at 24, 4.0 at 36; expected 3.5: reached")
    worse = [point("threshold", ids, 1 / (2 * ids)) for ids in (4.0, 32.0)]
    assert next(benchmark.against_sampled([*drawn, *worse])).endswith("expected 3.0: not reached")
