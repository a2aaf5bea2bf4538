"""benchmarks/capture.py runs and reports; its numbers are its readers' affair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "capture.py"


def test_the_quick_benchmark_reports_every_variant(tmp_path: Path):
    command = [sys.executable, str(PROGRAM), "--quick", "--out", str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (result,) = json.loads((tmp_path / "capture.json").read_text())["results"]
    names = ["prefill", "limit", "worker 16", "flat 16", "dict 16", "transformers 16"]
    assert [sample["variant"] for sample in result["samples"]] == names
    assert all(sample["cpu_seconds"] > 0 for sample in result["samples"])
    assert list(result["peaks"]) == ["prefill", "limit", "worker 16", "flat 16", "dict 16"]
    assert all(found["peak"] > found["before"] > 0 for found in result["peaks"].values())
    table = (tmp_path / "capture.md").read_text()
    assert all(f"| {name} |" in table for name in names)
    assert table.strip() in output


def test_peaks_alone_need_a_report_to_be_put_into(tmp_path: Path):
    command = [sys.executable, str(PROGRAM), "--peaks", "--quick", "--out", str(tmp_path)]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    assert answer.returncode == 1
    assert "capture.json" in answer.stderr
