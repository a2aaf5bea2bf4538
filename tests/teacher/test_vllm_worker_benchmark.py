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
    assert all(sample["cpu_seconds"] > 0 and sample["peak_bytes"] > 0 for sample in result["samples"])
    table = (tmp_path / "capture.md").read_text()
    assert all(f"| {name} |" in table for name in names)
    assert table.strip() in output
