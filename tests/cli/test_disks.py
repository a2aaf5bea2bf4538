"""A disk that refuses ends every command that writes a cache in one sentence, exit status 2; the same command then resumes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_making import make_cache

import kdcache
from kdcache.cli.main import main
from kdcache.errors import StorageError
from kdcache.store.files import fs
from kdcache.store.verify import verify_cache

FOREIGN = "rows.jsonl"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Three commands that write the cache `out`, each in several units or, of another project's cache, in one."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("".join(f"line {n}\n" for n in range(12)))
    Path("c.yaml").write_text(
        "input: {format: lines, paths: [a.txt], window: {size: 64}}\n"
        "teacher: {model: fake, backend: fake, fake: {vocab_size: 300}}\nselection: {k: 4}\nout: out\nshards: {unit_items: 4}\n"
    )
    make_cache(tmp_path / "source")
    row = {"input_ids": [1, 2, 3, 4], "topk_ids": [[2, 9], [3, 9], [4, 9]], "topk_logprobs": [[-0.1, -3.0]] * 3}
    Path(FOREIGN).write_text(f"{json.dumps(row)}\n" * 3)
    return {
        "capture": ["capture", "c.yaml"],
        "derive": ["derive", "source", "--out", "out", "--unit-sequences", "3"],
        "convert": [
            "convert",
            FOREIGN,
            "--out",
            "out",
            "--tokenizer",
            "fake",
            "--vocab-size",
            "300",
            "--accept",
            "alignment_unclear",
        ],
    }


def full_after(num_files: int) -> Callable[..., None]:
    publish, left = fs.publish_file, [None] * num_files

    def until_full(root: Path, temp: Path, name: str) -> None:
        if not left:
            raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28]")
        left.pop()
        publish(root, temp, name)

    return until_full


@pytest.mark.parametrize("command", ["capture", "derive", "convert"])
@pytest.mark.parametrize("num_files", [0, 2])
def test_a_full_disk_is_told_in_one_sentence_and_the_same_command_resumes(
    commands: dict[str, list[str]],
    command: str,
    num_files: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    with monkeypatch.context() as patched:
        patched.setattr(fs, "publish_file", full_after(num_files))  # a unit takes two: its shard and its journal record
        assert main(commands[command]) == 2
    sentence = error_of(capsys)
    assert ": No space left on device; nothing published is lost, and the same command resumes" in sentence
    assert "Detail" not in sentence
    before = sorted(os.listdir("out/data")) if Path("out/data").exists() else []
    assert len(before) == num_files // 2
    assert main(commands[command]) == 0
    assert verify_cache("out").problems == []
    assert set(before) <= set(os.listdir("out/data"))


@pytest.mark.parametrize("command", ["capture", "derive", "convert"])
def test_a_folder_that_cannot_be_written_is_told_in_one_sentence(
    commands: dict[str, list[str]], command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def read_only(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert main(commands[command]) == 2
    assert error_of(capsys) == "kdcache: error: the cache's folders cannot be made under 'out': Read-only file system"


def test_a_cache_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_cache(tmp_path / "a")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere")

    monkeypatch.setattr("kdcache.store.files.regular.os.open", refuse)
    with pytest.raises(StorageError, match=r"manifests/.*: cannot be read: Permission denied; nothing is known to be wrong"):
        kdcache.open(tmp_path / "a")


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kdcache: error: ")]
    return sentence
