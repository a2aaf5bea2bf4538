"""A run's folder from a stranger: what in it is a link or a pipe is not written through, and holds nobody up."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache.config.train import TrainConfig
from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.train.runs.checkpoint import newest_checkpoint
from kdcache.train.runs.digests import DIGESTS, find_damage, write_digests
from kdcache.train.runs.run_folder import RunFolder, read_metrics


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    """Opening a pipe without a writer would wait for ever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "checkpoints", "model"])
def test_a_link_in_a_run_s_folder_is_refused(tmp_path: Path, name: str):
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    out.mkdir()
    if "." in name:
        theirs.write_text("theirs")
    else:
        (theirs / "step-00000001").mkdir(parents=True)
    (out / "run.json").write_text("{}")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(theirs)
    with pytest.raises(ConfigError, match=f"{name} is a link, expected"):
        RunFolder(TrainConfig(cache="c", student="s", steps=1, out=str(out)), "snapshot")
    assert theirs.exists()
    assert theirs.is_dir() or theirs.read_text() == "theirs"
    assert newest_checkpoint(out / "checkpoints") is None


def test_an_unfinished_file_is_not_written_through(tmp_path: Path):
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json-unfinished").symlink_to(theirs)
    with RunFolder(TrainConfig(cache="c", student="s", steps=1, out=str(tmp_path / "out")), "snapshot"):
        pass
    assert theirs.read_text() == "theirs"


def test_pipes_in_a_run_hold_nobody_up(tmp_path: Path):
    (tmp_path / "weights").write_text("x")
    write_digests(tmp_path)
    (tmp_path / "weights").unlink()
    os.mkfifo(tmp_path / "weights")
    assert find_damage(tmp_path) is not None
    (tmp_path / DIGESTS).unlink()
    os.mkfifo(tmp_path / DIGESTS)
    assert "named pipe" in str(find_damage(tmp_path))
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/etc/hostname")
    with pytest.raises(CorruptCacheError, match="leads out of its folder"):
        read_metrics(tmp_path)
