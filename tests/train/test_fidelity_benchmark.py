"""benchmarks/fidelity.py at toy size: every part works, it goes on where it stopped, and its measures are what they say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fidelity
import fidelity_grid
import fidelity_report
import fidelity_students


def test_the_calibration_error_is_the_weighted_gap_of_each_bin() -> None:
    generator = np.random.default_rng(0)
    confidence_P = np.concatenate([generator.random(500), [0.0, 1.0, 1 / 15]])
    correct_P = (confidence_P * 15).astype(int) % 2 == 0  # gaps of either sign: bins that are merged show
    expected = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside_P = (confidence_P > low) & (confidence_P <= high) | ((number == 0) & (confidence_P == 0))
        if inside_P.any():
            expected += inside_P.mean() * abs(correct_P[inside_P].mean() - confidence_P[inside_P].mean())
    assert fidelity_students.calibration_error(confidence_P, correct_P) == pytest.approx(expected, abs=1e-12)


def test_the_interval_of_three_seeds_is_students() -> None:
    # Of 1, 2, 3: mean 2, standard deviation 1; 4.303 / sqrt(3) to either side.
    share = fidelity_report.interval([1.0, 2.0, 3.0])
    assert share["value"] == 2.0
    assert share["high"] - 2.0 == pytest.approx(2.0 - share["low"]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(fidelity_report.interval([0.5])["low"])


@pytest.mark.parametrize(
    ("low", "value", "high", "said"),
    [
        (0.95, 0.98, 1.01, "bytes per position, by the lower bound: met; small"),
        (0.80, 1.00, 1.20, "NOT shown; small"),  # a wide interval is no evidence
        (0.60, 0.84, 1.28, "NOT met; small"),
        (math.nan, 1.00, math.nan, "not decided, since one seed has no interval"),
    ],
)
def test_the_verdict_asks_the_lower_bound(low: float, value: float, high: float, said: str) -> None:
    large = {"setting": "large", "seeds": [0, 1], "bytes": 24.1, "share_kl": {"value": 1.0, "low": 0.99, "high": 1.01}}
    small = {"setting": "small", "seeds": [0, 1], "bytes": 24.0, "share_kl": {"value": value, "low": low, "high": high}}
    assert said in fidelity_report.verdict([large, small], "kl")


def test_the_verdict_takes_the_record_with_the_highest_lower_bound_and_says_when_there_is_none() -> None:
    wide = {"setting": "wide", "seeds": [0, 1], "bytes": 20, "share_loss": {"value": 1.1, "low": 0.7, "high": 1.5}}
    sure = {"setting": "sure", "seeds": [0, 1], "bytes": 22, "share_loss": {"value": 0.97, "low": 0.96, "high": 0.98}}
    assert "met; sure, 22.0 bytes, 97.0% [96.0%, 98.0%], 2 seeds" in fidelity_report.verdict([wide, sure], "loss")
    assert "not measured yet" in fidelity_report.verdict([{"setting": "labels", "seeds": [0]}], "loss")


def _cell(teacher: str, low: float, num_bytes: float = 23.0) -> dict[str, Any]:
    row = {"setting": "threshold", "seeds": [0, 1], "bytes": num_bytes}
    row |= {f"share_{metric}": {"value": 1.0, "low": low, "high": 1.1} for metric in ("loss", "kl")}
    return {"teacher": teacher, "teacher_loss": 3.0, "steps": 300, "rows": [{"setting": "labels", "seeds": [0, 1]}, row]}


def test_the_grid_asks_the_lowest_of_all_lower_bounds() -> None:
    said = fidelity_grid.verdicts([_cell("a", 0.97), _cell("b", 0.96)])
    assert len(said) == 2
    assert "in each of 2 cells, by the lower bounds: met; the lowest is 96.0%" in said[0]
    assert "NOT shown; the lowest is 94.0%" in fidelity_grid.verdicts([_cell("a", 0.97), _cell("b", 0.94)])[1]
    assert "not decided" in fidelity_grid.verdicts([_cell("a", 0.97), _cell("b", math.nan)])[0]
    assert fidelity_grid.verdicts([_cell("a", 0.97, num_bytes=25.0)]) == []
    assert "| a | 3.000 | 300 | threshold | 23.0 | 2 | 100.0% [97.0%, 110.0%]" in fidelity_grid.table([_cell("a", 0.97)])


@pytest.mark.slow
def test_a_toy_run_compares_students_and_a_second_one_only_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert fidelity.main(command) == 0
    rows = {row["setting"]: row for row in json.loads((tmp_path / "out" / "fidelity-quick.json").read_text())["rows"]}
    assert set(rows) == set(fidelity_students.QUICK)
    assert all(row["seeds"] == [0, 1] for row in rows.values())
    assert (tmp_path / "out" / "fidelity-quick.png").stat().st_size > 0
    # A cache of every token's probability is the live teacher: both paths to the targets, and all around them, agree.
    whole, live = rows["whole distribution, raw"], rows["live"]
    assert whole["loss"]["mean"] == pytest.approx(live["loss"]["mean"], abs=2e-3)
    assert whole["kl"]["mean"] == pytest.approx(live["kl"]["mean"], abs=2e-3)
    assert live["kl"]["mean"] < rows["labels"]["kl"]["mean"] - 0.05
    assert rows["threshold 24 B archive, tail-aware"]["bytes"] == pytest.approx(24, rel=0.15)

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "students").iterdir()}
    assert fidelity.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "students").iterdir()} == written
    assert "14 of 14 students" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"begun with lr = 0\.003, not 0\.002; name another --work"):
        fidelity.main([*command, "--lr", "0.002"])
