"""What needs a package that is not installed says so in one sentence with the line that installs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kdcache
from kdcache.extras import EXTRAS
from kdcache.train import adapters

HIDDEN = Path(__file__).with_name("hidden_packages.py")

CORE = """
import contextlib, io, json, sys
import kdcache
from kdcache.cli.main import COMMANDS, main
from kdcache.train import adapters

folder = sys.argv[3]

def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(list(arguments))
        except SystemExit as stop:
            status = stop.code
    return [status, out.getvalue(), err.getvalue()]

def capture(*settings):
    both = [f"out={folder}/cache", *settings]
    return run("capture", f"{folder}/fake.yaml", *[part for setting in both for part in ("--set", setting)])

def name_of(module, name):
    try:
        getattr(module, name)
    except kdcache.KdcacheError as error:
        return str(error)

found = {"names": {}, "runs": {}}
for module, names in ((kdcache, kdcache.__all__), (adapters, adapters.__all__)):
    found["names"] |= {f"{module.__name__}.{name}": name_of(module, name) for name in names}
runs = found["runs"]
runs["help"] = [run(command, "--help") for command in COMMANDS]
runs["capture"] = capture()
runs["verify"] = run("verify", f"{folder}/cache")
runs["info"] = run("info", f"{folder}/cache")
runs["doctor"] = run("doctor", f"{folder}/cache")
runs["train"] = run("train", f"{folder}/train.json")
runs["evaluate"] = run("evaluate", "--teacher", "t", "--data", "d", "--student", "a=b", "--out", f"{folder}/out")
for backend in ("transformers", "vllm", "served", "auto"):
    server = ["teacher.server.url=http://localhost:1"] if backend == "served" else []
    server += ["teacher.tokenizer=fake"] if backend in ("vllm", "served") else []
    runs[backend] = capture(f"teacher.backend={backend}", "teacher.model=gpt2", f"out={folder}/{backend}", *server)
runs["dataset"] = capture("input.format=dataset", "input.paths=[]", "input.dataset=d", f"out={folder}/dataset")
runs["ray"] = capture("run.executor=ray", f"out={folder}/ray")
for scheme in ("s3", "gs", "hf", "memory"):
    runs[scheme] = run("verify", f"{scheme}://bucket/cache")
runs["tokenizer"] = run("verify", f"{folder}/cache", "--deep", "--teacher", "gpt2", "--backend", "transformers")
print("FOUND", json.dumps(found))
"""


def python(extras: str, code: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(HIDDEN.parents[1]), "MPLBACKEND": "Agg"}
    command = [sys.executable, str(HIDDEN), extras, code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an environment with the core alone says."""
    folder = tmp_path_factory.mktemp("core")
    (folder / "text.txt").write_text("some words to read\n" * 20)
    fields: dict[str, Any] = {"input": {"format": "txt", "paths": [str(folder / "text.txt")], "window": {"size": 64}}}
    fields |= {"teacher": {"model": "fake", "backend": "fake"}, "selection": {"k": 4}, "out": "unused"}
    (folder / "fake.yaml").write_text(json.dumps(fields))
    train = {"cache": str(folder / "cache"), "out": str(folder / "run"), "student": {"model": "x"}, "steps": 1}
    (folder / "train.json").write_text(json.dumps(train))
    return json.loads(python("", CORE, str(folder)).rpartition("FOUND")[2])


TORCH_ROOMS = ("kdcache.loader.torch_batches", "kdcache.loss.", "kdcache.train.")
NEED_MORE = {name for name, where in kdcache._EXPORTS.items() if where.startswith(TORCH_ROOMS)}


def test_every_public_name_works_with_the_core_or_says_what_it_needs(core: dict[str, Any]) -> None:
    names = core["names"]
    assert set(names) == {f"kdcache.{name}" for name in kdcache.__all__} | {
        f"kdcache.train.adapters.{name}" for name in adapters.__all__
    }
    assert {name for name in kdcache.__all__ if names[f"kdcache.{name}"] is not None} == NEED_MORE
    assert all(names[f"kdcache.train.adapters.{name}"] is not None for name in adapters.__all__)
    for name, error in names.items():
        if error is not None:
            assert error.startswith(f"{name} needs the package "), error
            assert "pip install 'kdcache[" in error
    assert "kdcache[transformers]" in names["kdcache.sparse_kd_loss"]
    assert "kdcache[datasets]" in names["kdcache.train.adapters.iterable_dataset"]


def test_commands_that_need_the_core_alone_work_with_it(core: dict[str, Any]) -> None:
    runs = core["runs"]
    assert [status for status, _, _ in runs["help"]] == [0] * len(runs["help"])
    for name in ("capture", "verify", "info", "doctor"):
        assert runs[name][0] == 0, (name, runs[name])


@pytest.mark.parametrize(
    ("run", "package", "extra"),
    [
        ("train", "torch", "train"), ("evaluate", "torch", "train"), ("transformers", "torch", "transformers"),
        ("auto", "torch", "transformers"), ("vllm", "vllm", "vllm"), ("served", "httpx2", "served"),
        ("dataset", "datasets", "datasets"), ("ray", "ray", "ray"), ("s3", "s3fs", "s3"), ("gs", "gcsfs", "gs"),
        ("hf", "huggingface_hub", "hf"), ("memory", "fsspec", "remote"), ("tokenizer", "torch", "transformers"),
    ],
)  # fmt: skip
def test_a_command_says_what_to_install_and_ends_with_status_2(
    core: dict[str, Any], run: str, package: str, extra: str
) -> None:
    status, out, err = core["runs"][run]
    last = err.strip().splitlines()[-1]
    assert (status, out) == (2, ""), err
    assert f"needs the package {package!r}, which is not installed: pip install 'kdcache[{extra}]'" in last
    assert "Traceback" not in err


WITH = {
    "report": "from kdcache.report import _matplotlib",
    "served": "from kdcache.teacher.served import teacher",
    "s3": "from kdcache.store.files import _fsspec; import s3fs",
    "datasets": "from kdcache.train.adapters import iterable_dataset; from kdcache.inputs.formats._datasets import _open",
    "train": "from kdcache import sparse_kd_loss; from kdcache.train.trainer import train;"
    "from kdcache.report import _matplotlib; from kdcache.train.evaluation.evaluate import evaluate;"
    "from kdcache.teacher.hf import teacher; from kdcache.teacher.chat import hf_tokenizer",
}
"""The heavier trainers' extras are tried by hand: each takes ten seconds to import."""


@pytest.mark.parametrize("extra", WITH)
def test_an_extra_brings_all_that_its_part_needs(extra: str, tmp_path: Path) -> None:
    python(extra, f"import os; os.chdir({str(tmp_path)!r}); {WITH[extra]}")


def test_the_table_names_extras_that_are_there() -> None:
    import tomllib

    extras = tomllib.loads((HIDDEN.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(extras)
    assert set(WITH) <= set(extras)
