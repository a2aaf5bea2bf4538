"""benchmarks/retention.py: its measures are what they say, its verdict can fail, and every part works at toy size."""

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

import retention
import retention_report
import retention_students


def _row(nats: tuple[float, float, float], *, num_bytes: float = 23.0, share: float = 0.58, seeds: int = 3) -> dict[str, Any]:
    low, value, high = nats
    return {
        "setting": "KL, layers copied",
        "init": retention_students.COPIED,
        "seeds": list(range(seeds)),
        "bytes": num_bytes,
        "vectors": 0.0,
        "size": {"student": {"non_embedding": round(1000 * share)}, "teacher": {"non_embedding": 1000}},
        "kept_nats": {"value": value, "low": low, "high": high},
        "kept_accuracy": {"value": 0.99, "low": 0.98, "high": 1.0},
    }


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (_row((0.951, 0.96, 0.97)), "per position: met; KL, layers copied, 58% of the parameters, 23.0 bytes"),
        (_row((0.90, 0.96, 1.02)), "NOT shown; KL"),
        (_row((0.90, 0.94, 0.98)), "NOT met; KL"),
        (_row((math.nan, 0.99, math.nan)), "not decided, since one seed has no interval"),
        (_row((0.97, 0.98, 0.99), num_bytes=24.1), "not decided, since no student within these limits is done"),
        (_row((0.97, 0.98, 0.99), share=0.61), "not decided, since no student within these limits is done"),
    ],
)
def test_the_verdict_asks_the_lower_bound_within_both_limits(row: dict[str, Any], said: str) -> None:
    assert said in retention_report.verdict([row])


def test_what_is_kept_is_of_sums_and_its_interval_the_wider_of_two() -> None:
    def run(extra: float) -> dict[str, Any]:
        sums = {"tokens": [10.0, 30.0], "unigram": [60.0, 180.0], "teacher nll": [30.0, 90.0], "teacher correct": [4.0, 12.0]}
        return {"sums": sums | {"student nll": [33.0 + extra, 99.0 + 3 * extra], "student correct": [3.0, 12.0]}}

    runs = {0: run(0.0), 1: run(0.3)}
    totals = {seed: {name: sum(values) for name, values in of["sums"].items()} for seed, of in runs.items()}
    nats = retention_report.wider(runs, totals, retention_report.nats_kept)
    # 0.9 and 0.89 of the seeds: mean 0.895; both texts keep the same, so only the seeds spread: 12.71 * sd / sqrt(2).
    assert nats["value"] == pytest.approx(0.895)
    assert nats["texts"] == pytest.approx([0.895, 0.895])
    assert nats["low"] == pytest.approx(0.895 - 12.71 * 0.005)
    accuracy = retention_report.wider(runs, totals, retention_report.accuracy_kept)
    # Both seeds 15 / 16; of the texts one keeps 3 / 4, one all.
    assert accuracy["seeds"] == pytest.approx([15 / 16, 15 / 16])
    assert [accuracy["low"], accuracy["high"]] == pytest.approx([0.75, 1.0])


def test_every_run_has_the_same_draws_of_texts() -> None:
    values = list(np.random.default_rng(0).random(20))
    runs = [{"tokens": values, "student correct": values, "teacher correct": values}] * 2
    assert retention_report.over_texts(runs, retention_report.accuracy_kept) == pytest.approx(1.0)


@pytest.mark.slow
def test_a_toy_run_compares_students_and_a_second_one_only_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    command += [
        part for name in ("KL, layers copied", "labels, layers copied", "KL, random weights") for part in ("--only", name)
    ]
    assert retention.main(command) == 0
    results = json.loads((tmp_path / "out" / "retention-quick.json").read_text())
    rows = {row["setting"]: row for row in results["rows"] if row["seeds"]}
    assert all(row["seeds"] == [0, 1] for row in rows.values())
    assert len(results["plan"]["layers"]) == 3
    assert rows["KL, layers copied"]["bytes"] < 24
    assert rows["KL, layers copied"]["kept_nats"]["value"] > rows["KL, random weights"]["kept_nats"]["value"] + 0.5
    assert rows["KL, layers copied"]["kl"]["mean"] < rows["labels, layers copied"]["kl"]["mean"]
    assert (tmp_path / "out" / "retention-quick.png").stat().st_size > 0

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "students").glob("*.json")}
    assert retention.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert "6 of" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"begun with lr = 0\.001, not 0\.002; name another --work"):
        retention.main([*command, "--lr", "0.002"])
