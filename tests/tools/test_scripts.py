from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SCRIPTS = ("setup", "test", "check", "demo", "train_teacher")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_parses_and_may_be_run(name: str) -> None:
    subprocess.run(["bash", "-n", str(TOOLS / name)], check=True)
    assert os.access(TOOLS / name, os.X_OK)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def bare_checkout(root: Path) -> Path:
    """A folder with what tools/setup reads, and no environment."""
    (root / "tools").mkdir()
    for path in ("pyproject.toml", "tools/setup", "tools/setup-excludes.txt"):
        shutil.copy(TOOLS.parent / path, root / path)
    return root


def run_setup(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(["bash", "tools/setup"], root, {**os.environ, **environment})


def test_setup_refuses_an_interpreter_that_is_not_one(tmp_path: Path) -> None:
    done = run_setup(bare_checkout(tmp_path), PYTHON="/nowhere/python3")
    assert done.returncode == 1
    assert "PYTHON is /nowhere/python3, but Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv" / "bin").exists()


def test_setup_does_not_take_an_unfinished_environment_for_a_finished_one(tmp_path: Path) -> None:
    root = bare_checkout(tmp_path)
    (root / ".venv").mkdir()
    (root / ".venv" / "kdcache-setup.unfinished").touch()
    done = run_setup(root, PYTHON="/nowhere/python3")
    assert done.returncode == 1
    assert "PYTHON is /nowhere/python3" in done.stderr


FAILING_PYTHON = """#!/usr/bin/env bash
# A Python that makes an environment, in which pip says much and then fails.
case "$*" in
    *--version*) echo "Python 3.11.0" ;;
    -c*) exit 0 ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip install"*) for i in $(seq 300); do echo "noise $i"; done; echo "no torch to be had"; exit 1 ;;
    *) exit 1 ;;
esac
"""


def test_setup_says_a_line_per_step_and_shows_the_end_of_what_failed(tmp_path: Path) -> None:
    root = bare_checkout(tmp_path)
    (root / "python").write_text(FAILING_PYTHON)
    (root / "python").chmod(0o755)
    done = run_setup(root, PYTHON=str(root / "python"), KDCACHE_NO_VLLM="1")
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    steps = [line for line in lines if line.startswith("setup: ")]
    assert [line.split()[1] for line in steps] == ["making", "installing", "failed:"]
    assert "no torch to be had" in lines[-2]
    assert len(lines) == 3 + 25
    assert "noise 1\n" in (root / ".venv" / "kdcache-setup.log").read_text()


def test_train_teacher_says_how_to_get_its_environment(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    shutil.copy(TOOLS / "train_teacher", tmp_path / "tools")
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = run(["bash", "tools/train_teacher"], tmp_path, environment)
    assert done.returncode == 2
    assert "run: bash tools/setup" in done.stderr


def test_the_switch_for_processors_is_known_or_refused(tmp_path: Path) -> None:
    command = ["bash", "-c", "cd ..; source tools/processor/restrict; echo $ATEN_CPU_CAPABILITY $NUMBA_CPU_NAME"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KDCACHE_", "ATEN_", "NUMBA_"))}
    assert run(command, TOOLS, environment).stdout.strip() == ""
    assert run(command, TOOLS, environment | {"KDCACHE_CPU": "avx2"}).stdout.strip() == "avx2 haswell"
    refused = run(command, TOOLS, environment | {"KDCACHE_CPU": "sse"})
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "KDCACHE_CPU is sse, but must be avx2" in refused.stderr


def test_under_the_switch_torch_hides_what_newer_processors_have() -> None:
    pytest.importorskip("torch")
    code = (
        "import torch; from kdcache.codec import numba_unpack; from llvmlite import binding as b; "
        "capabilities = torch.cpu.get_capabilities(); print(torch.cpu._is_avx512_supported(), "
        "any(value for name, value in capabilities.items() if name.startswith('avx512')), "
        "numba_unpack.HAS_SHUFFLES or 'avx2' not in b.get_host_cpu_features())"
    )
    command = ["bash", "-c", f'cd ..; source tools/processor/restrict; exec "$0" -c "{code}"', sys.executable]
    done = run(command, TOOLS, os.environ | {"KDCACHE_CPU": "avx2"})
    assert done.stdout.split() == ["False", "False", "True"], done.stderr
