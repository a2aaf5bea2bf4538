"""The worker route on vLLM's V2 runner, which needs Triton: here in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_interpreter import skip_where_it_is_broken

pytest.importorskip("vllm")
pytest.importorskip("triton")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

HERE = Path(__file__).parent


def test_on_the_v2_runner_the_routes_agree(tiny_model_dir: Path):
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "v2_runner.py"), str(tiny_model_dir)]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    lines = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("RUNNER ")]
    if len(lines) != 1:
        skip_where_it_is_broken()
    assert len(lines) == 1, result.stderr[-3000:]
    kind, between, dense, hidden = lines[0]
    assert kind == "V2"
    assert float(between) < 2e-5
    assert float(dense) < 5e-5
    assert float(hidden) < 1e-4
