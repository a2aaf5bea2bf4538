"""What runs in an actor of a cluster: one teacher that captures a unit at a time. `_ray.py` drives it; no Ray in here."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kdcache.capture.attempts import UnitFailed, UnitWorker
from kdcache.capture.inputs import InputReader
from kdcache.capture.job import Job, load_job_tokenizer, template_moment
from kdcache.capture.once import open_cache_writer
from kdcache.capture.plan import Plan, Unit
from kdcache.capture.teacher_slot import TeacherSlot
from kdcache.capture.unit import UnitDone
from kdcache.capture.watch._nvml import GpuState
from kdcache.capture.watch.attempt_progress import AttemptProgress
from kdcache.capture.watch.heartbeat import Heartbeat, end_process
from kdcache.capture.watch.meter import GpuReadings
from kdcache.capture.watch.signals import StopRequest
from kdcache.config.capture import CaptureConfig
from kdcache.store.writing.set_aside import FailedUnit


@dataclass(frozen=True)
class UnitAnswer:
    """What became of a unit, and the state of the actor's GPUs during it."""

    outcome: UnitDone | FailedUnit
    gpus: tuple[GpuState, ...]


class CaptureWorker:
    """One teacher and one writer. Calls come one after another, and `ready` comes first."""

    def __init__(self, config: CaptureConfig, plan: Plan, directory: str) -> None:
        """Load nothing: an error here would reach the driver as a dead actor, not as what it is."""
        self._config, self._plan, self._directory = config, plan, directory
        # The watch never ends: an actor that does anything for too long is useless to the capture.
        self._heart = Heartbeat(config.run, end_process)
        self._readings = GpuReadings()
        self._slot: TeacherSlot | None = None
        self._worker: UnitWorker | None = None

    def placed(self) -> None:
        """Answer: this shows that the cluster has placed this actor."""

    def ready(self) -> int:
        """Load the teacher, open the cache and return the process id; raises as `run_capture` does before it starts."""
        os.chdir(self._directory)  # so that relative paths mean what they mean to the driver
        self._heart.load(f"loading the teacher {self._config.teacher.model!r}")
        with self._heart.watching():
            tokenizer = load_job_tokenizer(self._config)
            variables = tokenizer.template_variables if self._config.input.content == "messages" else frozenset()
            reader = InputReader(self._config.input, variables)
            job = Job(self._config, reader, tokenizer, self._plan, template_moment(self._config))
            self._slot = TeacherSlot(self._config)
            self._heart.beat("opening the cache")
            writer = open_cache_writer(job, self._slot.teacher, lambda: self._heart.beat("making what is made once"))
            progress = AttemptProgress(self._readings, self._heart)
            self._worker = UnitWorker(job, self._slot, writer, progress, StopRequest())
        return os.getpid()

    def capture(self, unit: Unit) -> UnitAnswer:
        """Publish a unit, or say why it could not be published."""
        assert self._worker is not None
        self._heart.beat(f"capturing unit {unit.index}")
        with self._heart.watching():
            outcome = self._worker.capture(unit)
        return UnitAnswer(outcome.record if isinstance(outcome, UnitFailed) else outcome, self._readings.last)

    def close(self) -> None:
        """Close the engine, which may have processes of its own."""
        if self._slot is not None:
            self._slot.close()
