"""The state of a run as a JSON file next to the cache, for schedulers, dashboards and scripts.

Written whole or not at all (a private name, then a rename), at most every few seconds. A reader that sees `updated_at` stand
still while `state` is `capturing` knows that the process is stuck or gone.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kdcache.capture.plan import Unit
from kdcache.capture.watch import _nvml
from kdcache.capture.watch.progress import CaptureProgress, TokensToCome
from kdcache.config.capture import CaptureConfig
from kdcache.shown import get_logger
from kdcache.store.files.location import locate
from kdcache.store.files.regular import write_new

if TYPE_CHECKING:
    from kdcache.format.manifest import ShardInfo
    from kdcache.store.writing.set_aside import FailedUnit

log = get_logger(__name__)

SECONDS_BETWEEN_WRITES = 2.0
SPEED_WINDOW_SECONDS = 60.0


def progress_path(config: CaptureConfig) -> Path:
    """Locate the file: `run.progress_path`, or next to the cache; for an object store, the working directory."""
    run = config.run
    if run.progress_path is not None:
        return Path(run.progress_path)
    rank = f".rank-{run.rank}" if run.world_size > 1 else ""
    cache = locate(config.out)
    if not isinstance(cache, Path):
        return Path(f"{cache.name}{rank}.progress.json")
    return cache.with_name(f"{cache.name}{rank}.progress.json")


class ProgressFile(CaptureProgress):
    """Keeps the file up to date. A file that cannot be written is reported once and then ignored."""

    def __init__(self, path: Path, config: CaptureConfig) -> None:
        self._path, self._config = path, config
        self._workers: dict[str, dict[str, Any]] = {}
        self._set_aside: list[dict[str, Any]] = []
        self._state, self._started, self._written = "starting", time.time(), 0.0
        self._units: dict[str, int] = {}
        self._unit: int | None = None
        self._num_tokens = self._num_bytes = self._num_skipped = 0
        self._to_come = TokensToCome(())
        self._recent: deque[tuple[float, int]] = deque()
        self._works = True

    def start(self, units: Sequence[Unit]) -> None:
        self._state, self._started = "capturing", time.time()
        self._units = {"to_do": len(units), "published": 0, "set_aside": 0}
        self._to_come = TokensToCome(units)
        self._write()

    def start_unit(self, unit: Unit, num_tokens: int) -> None:
        self._unit = unit.index
        self._to_come.read(unit, num_tokens)
        self._write_if_due()

    def advance(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        self._write_if_due()

    def published(self, shard: ShardInfo) -> None:
        self._units["published"] += 1
        self._num_bytes += shard.num_bytes
        self._num_skipped += len(shard.account.skipped) if shard.account else 0
        self._unit = None
        self._write_if_due()

    def set_aside(self, failed: FailedUnit) -> None:
        self._units["set_aside"] += 1
        self._set_aside.append(msgspec.to_builtins(failed))
        self._write()

    def worker(self, name: str, pid: int | None, unit: int | None, gpus: Sequence[_nvml.GpuState] = ()) -> None:
        self._workers.pop(name, None)
        if pid is not None:
            self._workers[name] = {"pid": pid, "unit": unit, "gpus": [asdict(gpu) for gpu in gpus]}
        self._write()

    def ended(self, state: str) -> None:
        self._unit, self._workers = None, {}
        if self._state != "starting":
            self._state = state
            self._write()

    def _write_if_due(self) -> None:
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        if not self._works:
            return
        self._written = time.monotonic()
        temp = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_new(temp, msgspec.json.format(msgspec.json.encode(self._fields()), indent=1) + b"\n")
            os.replace(temp, self._path)
        except OSError as error:
            self._works = False
            log.warning("%s: cannot be written (%s); the capture continues without it", self._path, error)

    def _fields(self) -> dict[str, Any]:
        now, run, total = time.time(), self._config.run, self._to_come.total
        speed = self._speed(now)
        left = None if total is None else max(0, total - self._num_tokens)
        return {
            "state": self._state,
            "cache": self._config.out,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "rank": run.rank,
            "world_size": run.world_size,
            "started_at": round(self._started, 3),
            "updated_at": round(now, 3),
            "units": self._units,
            "unit_in_work": self._unit,
            "workers": self._workers,
            "num_tokens": self._num_tokens,
            "tokens_per_second": None if speed is None else round(speed, 1),
            "num_tokens_left": left,
            "eta_seconds": None if speed is None or left is None else round(left / speed, 1),
            "num_bytes": self._num_bytes,
            "num_skipped_sequences": self._num_skipped,
            "set_aside": self._set_aside,
            # On a cluster nothing is computed here: each worker has its own.
            "gpus": [asdict(gpu) for gpu in _nvml.gpu_states()] if run.executor == "local" else [],
        }

    def _speed(self, now: float) -> float | None:
        """Tokens per second over the last minute, or since the start."""
        self._recent.append((now, self._num_tokens))
        while len(self._recent) > 2 and now - self._recent[0][0] > SPEED_WINDOW_SECONDS:
            self._recent.popleft()
        then, before = self._recent[0]
        seconds, tokens = (now - then, self._num_tokens - before) if len(self._recent) > 1 else (now - self._started, 0)
        return tokens / seconds if seconds > 0 and tokens > 0 else None
