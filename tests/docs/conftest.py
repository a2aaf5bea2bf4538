"""What the tutorials' pages take for granted: commands on the path, a corpus, a cache."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_model import stdlib_texts

from kdcache.cli.main import main

ROOT = Path(__file__).parents[2]

SHIMS = {
    "kdcache": f'exec "{sys.executable}" -m kdcache "$@"\n',
    "python": f'exec "{sys.executable}" "$@"\n',
    # Slurm's two commands, as far as a job array of single tasks on one node goes: every task at once.
    "sbatch": (
        'tasks=${1#--array=0-}; shift; pids=()\nfor i in $(seq 0 "$tasks"); do\n'
        '  SLURM_ARRAY_TASK_ID=$i SLURM_ARRAY_TASK_COUNT=$((tasks + 1)) bash "$@" & pids+=($!)\ndone\n'
        'status=0; for pid in "${pids[@]}"; do wait "$pid" || status=1; done; exit $status\n'
    ),
    "srun": 'exec "$@"\n',
}


@pytest.fixture
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory with `configs/`, a corpus of a few texts, and the commands that a page runs on the path."""
    shims = tmp_path / "shims"
    shims.mkdir()
    for name, text in SHIMS.items():
        (shims / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (shims / name).chmod(0o755)
    folder = tmp_path / "work"
    (folder / "corpus").mkdir(parents=True)
    for number, text in enumerate(stdlib_texts()[:3]):
        (folder / "corpus" / f"{number}.txt").write_text(text[:3000])
    (folder / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("PATH", f"{shims}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{folder}")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    yield folder
    for name in [name for name, module in sys.modules.items() if str(folder) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def captured(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cache`: the tiny model's distributions over a few texts."""
    folder = tmp_path_factory.mktemp("tutorials")
    (folder / "corpus").mkdir()
    for number, text in enumerate(stdlib_texts()[:3]):
        (folder / "corpus" / f"{number}.txt").write_text(text[:3000])
    config = {
        "input": {"format": "txt", "paths": [str(folder / "corpus")], "window": {"size": 64}},
        "teacher": {"model": str(tiny_model_dir), "backend": "transformers"},
        "selection": {"kind": "threshold", "tau": 0.04},
        "codec": {"id": "archive"},
        "shards": {"unit_chars": 3000},
        "out": "cache",
    }
    (folder / "capture.yaml").write_text(json.dumps(config))  # which is YAML
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["capture", "capture.yaml"]) == 0
    return folder


@pytest.fixture
def with_cache(work_folder: Path, captured: Path) -> Path:
    """The working directory with a copy of `cache`."""
    shutil.copytree(captured / "cache", work_folder / "cache")
    return work_folder
