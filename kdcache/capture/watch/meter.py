"""What a unit costs: wall and CPU time, and GPU time and energy where GPUs can be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kdcache.capture.watch import _nvml
from kdcache.capture.watch.progress import CaptureProgress
from kdcache.config.capture import TeacherConfig
from kdcache.format.manifest import SkippedSequence, UnitAccount
from kdcache.teacher import find_backend

SECONDS_BETWEEN_READINGS = 2.0


def gpus_held(teacher: TeacherConfig) -> int:
    """GPUs that the teacher's engine holds here; 0 where none can be read."""
    backend = find_backend(teacher.backend)
    return _nvml.num_gpus() if backend.spreads(teacher) else min(backend.num_gpus(teacher), _nvml.num_gpus())


def start_meter(num_gpus: int) -> Callable[[Sequence[SkippedSequence]], UnitAccount]:
    """Start counting; return a function that tells what has been used since, and names the sequences left out.

    CPU time is that of this process; for an engine with processes of its own it covers only our side.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    energy = _nvml.energy_joules(num_gpus) if num_gpus else None

    def account(skipped: Sequence[SkippedSequence]) -> UnitAccount:
        seconds = time.perf_counter() - wall
        energy_now = _nvml.energy_joules(num_gpus) if energy is not None else None
        return UnitAccount(
            wall_seconds=round(seconds, 3),
            cpu_seconds=round(time.process_time() - cpu, 3),
            gpu_seconds=round(seconds * num_gpus, 3) if num_gpus else None,
            energy_joules=None if energy is None or energy_now is None else round(energy_now - energy, 3),
            skipped=tuple(skipped),
        )

    return account


class GpuReadings(CaptureProgress):
    """Keeps the state of the GPUs at the teacher's last answer; after a unit they are idle, which says nothing."""

    def __init__(self) -> None:
        self.last: tuple[_nvml.GpuState, ...] = ()
        self._read = float("-inf")

    def advance(self, num_tokens: int) -> None:
        if num_tokens > 0 and time.monotonic() - self._read >= SECONDS_BETWEEN_READINGS:
            self._read = time.monotonic()
            self.last = tuple(_nvml.gpu_states())
