"""A capture goes on with the teacher that it was begun with, and with no other: each difference is shown."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import kdcache
from kdcache.capture.executors.run import run_capture
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.errors import MismatchError

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

FIRST, SECOND = "a" * 40, "b" * 40


def sections(tmp_path, **teacher):
    return {
        "input": {"format": "txt", "paths": [str(tmp_path / "a.txt")], "window": {"size": 32}},
        "teacher": {"model": str(tmp_path / "model"), "backend": "transformers", "num_threads": 1} | teacher,
        "selection": {"k": 8},
        "out": str(tmp_path / "cache"),
    }


@pytest.fixture(scope="module")
def captured(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("identity")
    shutil.copytree(tiny_model_dir, folder / "model")
    (folder / "a.txt").write_text("".join(f"def line_{n}(x):\n    return x + {n}\n\n" for n in range(10)))
    run_capture(convert_config(sections(folder), CaptureConfig))
    return folder


def go_on(folder, **teacher):
    return run_capture(convert_config(sections(folder, **teacher), CaptureConfig))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"dtype": "bfloat16"}, r"teacher\.dtype: 'float32' != 'bfloat16'"),
        (
            {"engine_options": {"attn_implementation": "eager"}},
            r"teacher\.engine_options\.attn_implementation: 'sdpa' != 'eager'",
        ),
    ],
)
def test_another_dtype_or_another_flag_of_the_engine_is_refused(captured, change, difference):
    with pytest.raises(MismatchError, match=rf"holds another capture \(there != asked for\): .*{difference}"):
        go_on(captured, **change)


def test_all_differences_are_shown_at_once(captured):
    with pytest.raises(MismatchError, match=r"teacher\.dtype: .*teacher\.engine_options\.attn_implementation: "):
        go_on(captured, dtype="bfloat16", engine_options={"attn_implementation": "eager"})


def test_another_file_of_weights_or_their_meaning_is_refused(captured):
    before = (captured / "model/config.json").read_bytes()
    (captured / "model/config.json").write_text(json.dumps(json.loads(before) | {"rms_norm_eps": 1e-3}))
    try:
        with pytest.raises(MismatchError, match=r"teacher\.weights_digest: '\w+' != '\w+'"):
            go_on(captured)
    finally:
        (captured / "model/config.json").write_bytes(before)


def test_how_much_at_once_and_by_how_many_threads_is_no_other_teacher(captured):
    changes = {"tokens_per_forward": 64, "chunk_positions": 5, "num_threads": 2, "engine_options": {"low_cpu_mem_usage": True}}
    assert go_on(captured, **changes).num_units_captured == 0


MOVED = """
import contextlib, io, json, sys
from pathlib import Path
from kdcache.cli.main import main
config, branch, *commits = sys.argv[1:]
results = []
for commit in commits:
    Path(branch).write_text(commit)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(["capture", config])
    results.append([status, said.getvalue()])
print(json.dumps(results))
"""


def captures_of_a_branch(folder, branch):
    """Status and words of a capture at FIRST and one at SECOND, with a hub cache of their own: the hub's client reads where
    that is when it is imported."""
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", MOVED, str(folder / "c.yaml"), str(branch), FIRST, SECOND]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_branch_of_the_hub_that_has_moved_is_another_teacher(tmp_path, captured):
    hub = tmp_path / "home/hub/models--org--tiny"
    for commit in (FIRST, SECOND):
        shutil.copytree(captured / "model", hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    shutil.copy(captured / "a.txt", tmp_path / "a.txt")
    (tmp_path / "c.yaml").write_text(json.dumps(sections(tmp_path, model="org/tiny")))
    (begun, said), (refused, why) = captures_of_a_branch(tmp_path, hub / "refs/main")
    assert begun == 0, said
    with kdcache.open(tmp_path / "cache") as reader:
        teacher = reader.manifest.identity.teacher
    assert (teacher.model, teacher.revision, teacher.weights_digest) == ("org/tiny", FIRST, None)
    assert refused == 2
    assert f"teacher.revision: '{FIRST}' != '{SECOND}'" in why
