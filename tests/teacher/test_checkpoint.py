"""What identifies the weights of a model: its folder's content, or the commit of a hub id in the local cache."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from kdcache.errors import TeacherError
from kdcache.teacher.checkpoint import (
    cache_root,
    cached_commit,
    check_model_name,
    config_fields,
    resolved_revision,
    short_name,
    snapshot_folder,
    weights_digest,
    why_not_loaded,
)

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).write_text(f"content of {name}")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model-00002-of-00002.safetensors",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "model.gguf",
        "adapter_model.safetensors",
        "adapter_config.json",
        "hf_quant_config.json",
        "modeling_mine.py",
    ],
)
def test_any_file_that_decides_what_the_model_computes_changes_the_digest(folder: Path, name: str):
    before = weights_digest(str(folder))
    with (folder / name).open("a") as file:
        file.write("{}")
    assert weights_digest(str(folder)) != before


@pytest.mark.parametrize(
    "name", ["README.md", "tokenizer.json", "generation_config.json", "training_args.bin", "optimizer.pt", "rng_state_0.pth"]
)
def test_files_that_do_not_are_left_out(folder: Path, name: str):
    before = weights_digest(str(folder))
    (folder / name).write_text("something")
    assert weights_digest(str(folder)) == before


def test_the_digest_is_the_contents_and_not_the_folders(folder: Path, tmp_path: Path):
    other = shutil.copytree(folder, tmp_path / "elsewhere")
    assert weights_digest(str(other)) == weights_digest(str(folder))
    (other / "model-00001-of-00002.safetensors").rename(other / "model-00003-of-00002.safetensors")
    assert weights_digest(str(other)) != weights_digest(str(folder))


def test_an_adapters_digest_covers_the_model_that_it_is_based_upon(folder: Path, tmp_path: Path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder), "r": 8}))
    (adapter / "adapter_model.safetensors").write_text("low rank")
    before = weights_digest(str(adapter))
    (folder / "model-00001-of-00002.safetensors").write_text("trained further")
    assert weights_digest(str(adapter)) != before


def test_a_hub_id_has_no_digest():
    assert weights_digest("org/name") is None
    assert short_name("org/name") == "org/name"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with org/name: main is at FIRST, the tag v2 at SECOND; both have files."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    model = tmp_path / "home/hub/models--org--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(FIRST)
    (model / "refs/v2").write_text(f"{SECOND}\n")
    for commit in (FIRST, SECOND):
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text(json.dumps({"commit": commit}))
    return model


def test_a_revision_of_a_hub_id_is_resolved_to_its_commit(cache: Path):
    assert cached_commit("org/name") == FIRST
    assert cached_commit("org/name", "v2") == SECOND
    assert cached_commit("org/name", SECOND) == SECOND
    assert cached_commit("org/name", "v3") is None
    assert cached_commit("org/other") is None
    assert snapshot_folder("org/name", "v2") == cache / "snapshots" / SECOND
    assert config_fields("org/name", "v2") == {"commit": SECOND}
    assert config_fields("org/other") == {}


def test_what_the_loading_library_says_comes_first_and_what_the_user_asked_for_last(cache: Path, folder: Path):
    assert resolved_revision("org/name", "v2", "c" * 40) == "c" * 40
    assert resolved_revision("org/name", "v2") == SECOND
    assert resolved_revision("org/name", None) == FIRST
    assert resolved_revision("org/other", "v2") == "v2"
    assert resolved_revision("org/other", None) is None
    assert resolved_revision(str(folder), "v2") is None


def test_the_cache_is_where_the_hub_client_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_root() == Path.home() / ".cache/huggingface/hub"
    assert cache_root().name == Path(constants.HF_HUB_CACHE).name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "huggingface/hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home/hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "here"))
    assert cache_root() == tmp_path / "here"


def test_a_pipe_in_a_model_s_folder_is_refused_before_anybody_waits_for_it(folder: Path):
    os.mkfifo(folder / "generation_config.json")
    with pytest.raises(TeacherError, match=r"generation_config\.json: is a pipe"):
        check_model_name(str(folder))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_position_embeddings": 10**30}, "max_position_embeddings 10+; expected at most 2,147,483,647"),
        ({"text_config": {"num_hidden_layers": 10**7}}, "num_hidden_layers 10000000; expected at most 10,000"),
        ({"vocab_size": 10**400}, "vocab_size .*; expected at most 2,147,483,648"),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(tmp_path: Path, fields: dict[str, object], sentence: str):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    with pytest.raises(TeacherError, match=sentence):
        check_model_name(str(tmp_path))


def test_a_mistyped_folder_is_said_with_the_one_that_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    said = why_not_loaded("runs/techer", "We couldn't connect to 'https://huggingface.co'")
    assert said.startswith(
        "such a folder does not exist (there is runs/teacher), and as a hub id it was not found (We couldn't"
    )
    assert why_not_loaded("runs/other-thing", "no").startswith("such a folder does not exist, and")
    assert why_not_loaded("runs/teacher", "damaged") == "damaged", "it is there, so the reason is enough"
    with pytest.raises(TeacherError, match=r"runs/techer/: no such folder"):
        check_model_name("runs/techer/")
    with pytest.raises(TeacherError, match=r"no such folder \(there is runs\); expected a hub id"):
        check_model_name("ru ns")
