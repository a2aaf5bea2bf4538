"""benchmarks/train_step.py runs, merges and reports; its numbers are its readers' affair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


@pytest.mark.slow
def test_the_benchmark_of_a_step_runs_and_says_whether_the_target_is_met(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, str(SCRIPT), "--quick", "--rounds", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "A step with distillation within 1.10 of one with plain cross-entropy" in done.stdout
    (result,) = json.loads((tmp_path / "train_step.json").read_text())
    assert {"cross-entropy, whole logits", "ours, cached entries (alpha 1)"} < set(result["variants"])
    assert all(len(variant["ratios"]) == 1 for variant in result["variants"].values())
