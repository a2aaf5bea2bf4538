"""What a unit takes: wall and CPU time, and of GPUs, where they can be read, time and energy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from kdcache.capture.watch import _nvml
from kdcache.capture.watch.progress import CaptureProgress
from kdcache.config.capture import TeacherConfig
from kdcache.format.manifest import SkippedSequence, UnitAccount

SECONDS_BETWEEN_READINGS = 2.0

_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size", "data_parallel_size")
"""Settings of vLLM whose product is the number of its GPUs (`ParallelConfig.world_size_across_dp`, 0.24 to 0.32); its
other kinds of parallelism share these."""


def engine_gpus(teacher: TeacherConfig) -> int:
    """GPUs that one teacher computes on where there are enough. One for transformers, which with a `device_map` takes what it
    is given."""
    if teacher.backend in ("fake", "served"):
        return 0
    if teacher.backend == "transformers":
        return 1
    # As in the engine itself, engine_options have the last word. What is no number is for the engine to refuse.
    options: dict[str, Any] = {"tensor_parallel_size": teacher.tensor_parallel_size} | teacher.engine_options
    sizes = [options.get(name) for name in _PARALLEL]
    return prod(size for size in sizes if isinstance(size, int) and size > 0)


def gpus_held(teacher: TeacherConfig) -> int:
    """GPUs that the teacher's engine holds here; 0 where none can be read."""
    is_spread = teacher.backend in ("auto", "transformers") and "device_map" in teacher.engine_options
    return _nvml.num_gpus() if is_spread else min(engine_gpus(teacher), _nvml.num_gpus())


def start_meter(num_gpus: int) -> Callable[[Sequence[SkippedSequence]], UnitAccount]:
    """Start counting; the function that it gives says what has been used since, with the sequences that were left out.

    CPU time is that of this process: of an engine with processes of its own it counts our side.
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
    """Keeps the GPUs' state as it was when the teacher answered last: when a unit is over they are idle, which says nothing."""

    def __init__(self) -> None:
        self.last: tuple[_nvml.GpuState, ...] = ()
        self._read = float("-inf")

    def advance(self, num_tokens: int) -> None:
        if num_tokens > 0 and time.monotonic() - self._read >= SECONDS_BETWEEN_READINGS:
            self._read = time.monotonic()
            self.last = tuple(_nvml.gpu_states())
