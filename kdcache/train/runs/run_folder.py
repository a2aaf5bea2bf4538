"""The directory of a training run: what it was asked for, its metrics line by line, its checkpoints and its model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from kdcache.config.secrets import without_secrets
from kdcache.config.train import TrainConfig
from kdcache.errors import ConfigError, MismatchError, StateError
from kdcache.store.files.fs import sync_directory, sync_file
from kdcache.store.files.regular import read_regular, what_is_not_own, write_new
from kdcache.train.runs.checkpoint import newest_checkpoint
from kdcache.train.runs.digests import write_digests

RUN, METRICS, CHECKPOINTS, MODEL, STUDENT = "run.json", "metrics.jsonl", "checkpoints", "model", "student"
_MAY_CHANGE = {
    *("out", "cache", "num_threads", "device", "checkpoint_every_steps", "max_skipped_steps"),
    *("loader.num_threads", "loader.prefetch_batches", "loss.backend"),
}
"""Settings that do not change what is learned (rounding aside); the cache may move, its snapshot may not change. A run that
stopped at a number that is not finite may resume with leave to skip some steps."""


class RunFolder:
    """Claims a directory for one training run; closes its metrics file on exit."""

    def __init__(self, config: TrainConfig, snapshot: str) -> None:
        """Make the directory, or take up the run in it.

        Args:
            config: of this run.
            snapshot: digest of the cache's manifest.

        Raises:
            ConfigError: the path is not a directory or holds something other than a run.
            MismatchError: it holds a checkpoint of a run with other settings or another cache; each difference is shown.
        """
        self.root = Path(config.out)
        # Through JSON, so that a tuple compares equal to the list that the file gives back.
        ours = without_secrets(msgspec.json.decode(msgspec.json.encode({"config": config, "snapshot": snapshot})))
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: {config.out!r} cannot be made a directory: {error.strerror}") from error
        if _holds_something_else(self.root):
            raise ConfigError(f"out: {config.out!r} is not empty and holds no training run; name another directory")
        _refuse_folders_of_others(self.root)
        if newest_checkpoint(self.checkpoints) is not None:
            _refuse_other_run(self.root / RUN, ours)
        _write_atomically(self.root / RUN, json.dumps(ours, indent=1).encode())
        self._metrics = (self.root / METRICS).open("ab")

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints; made by the first."""
        return self.root / CHECKPOINTS

    @property
    def model(self) -> Path:
        """Directory of the finished model."""
        return self.root / MODEL

    def append_metrics(self, **values: Any) -> None:
        """Add a line to `metrics.jsonl`."""
        self._metrics.write(msgspec.json.encode(values) + b"\n")
        self._metrics.flush()

    def sync_metrics(self) -> int:
        """fsync `metrics.jsonl`; returns its length in bytes."""
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def cut_metrics(self, num_bytes: int) -> None:
        """Forget the lines that were written after a checkpoint, which the resumed run will write again."""
        self._metrics.truncate(num_bytes)
        self._metrics.seek(num_bytes)

    @property
    def student(self) -> Path:
        """Directory of what was cut from the teacher, where the student was."""
        return self.root / STUDENT

    def publish_model(self, save: Callable[[Path], object]) -> None:
        """Write `model/` whole or not at all: `save` fills a temporary directory."""
        publish_folder(self.model, save)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._metrics.close()


def publish_folder(folder: Path, save: Callable[[Path], object]) -> None:
    """Write a folder whole or not at all: `save` fills a temporary one, which gets digests and is then renamed."""
    temp = _unfinished(folder)
    shutil.rmtree(temp, ignore_errors=True)
    try:
        save(temp)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    write_digests(temp)
    for path in temp.iterdir():
        sync_file(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temp, folder)
    sync_directory(folder.parent)


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; empty where the file is missing. A torn last line is left out.

    Raises:
        StateError: another line is not a JSON object.
    """
    path = Path(run) / METRICS
    if not path.is_file():
        return []
    whole, _, _ = read_regular(path, path.parent).rpartition(b"\n")
    return [_metrics_of(line, f"{path}, line {at}") for at, line in enumerate(whole.splitlines(), 1)]


def cache_of_run(run: str | Path) -> str | None:
    """The cache that a run was trained from, as its `run.json` names it; None for a folder without one."""
    path = Path(run) / RUN
    if not path.is_file():
        return None
    try:
        named = json.loads(read_regular(path, path.parent))["config"]["cache"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return named if isinstance(named, str) else None


def _metrics_of(line: bytes, where: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StateError(f"{where}: not the metrics of a step ({error}); the file is damaged or was edited") from error


def _holds_something_else(root: Path) -> bool:
    names = {path.name for path in root.iterdir()} - {_unfinished(root / RUN).name}
    return bool(names) and RUN not in names


def _refuse_folders_of_others(root: Path) -> None:
    """Raise ConfigError where a run's file or folder is a link or the like: what is written there would be elsewhere."""
    kinds = {RUN: False, METRICS: False, CHECKPOINTS: True, MODEL: True, STUDENT: True}
    for name, is_folder in kinds.items():
        there = what_is_not_own(root / name, folder=is_folder)
        if there not in (None, "a plain file", "a folder"):
            expected = "folder" if is_folder else "plain file"
            raise ConfigError(f"out: {root / name} is {there}, expected a {expected} of the run's own; name another directory")


def _refuse_other_run(path: Path, ours: dict[str, Any]) -> None:
    try:
        theirs = json.loads(read_regular(path, path.parent))
        before, now = _leaves(theirs["config"]), _leaves(ours["config"])
        before["cache's snapshot"], now["cache's snapshot"] = theirs["snapshot"], ours["snapshot"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not the config of a training run ({error}); name another `out` directory") from error
    names = [name for name in before | now if before.get(name) != now.get(name) and not _may_change(name)]
    if names:
        shown = "; ".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in names)
        raise MismatchError(f"{path.parent} holds a run with other settings ({shown}); name another `out` directory")


def _may_change(name: str) -> bool:
    return name in _MAY_CHANGE or name.startswith("remote.")


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, child in value.items() for k, v in _leaves(child, f"{prefix}.{name}" if prefix else name).items()}


def _write_atomically(path: Path, data: bytes) -> None:
    temp = _unfinished(path)
    write_new(temp, data)
    sync_file(temp)
    os.replace(temp, path)
    sync_directory(path.parent)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}-unfinished")
