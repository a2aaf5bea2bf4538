"""Carry out a plan in this process: every unit, or those of one static rank."""

from __future__ import annotations

import threading
from contextlib import closing

from kdcache.capture.attempts import UnitWorker
from kdcache.capture.executors.endings import folded_on_failure, translated_interrupts
from kdcache.capture.executors.tally import CaptureSummary, Tally
from kdcache.capture.job import Job
from kdcache.capture.once import open_cache_writer
from kdcache.capture.teacher_slot import TeacherSlot
from kdcache.capture.watch.attempt_progress import AttemptProgress
from kdcache.capture.watch.heartbeat import Heartbeat, interrupting
from kdcache.capture.watch.progress import CaptureProgress
from kdcache.capture.watch.signals import StopRequest


def capture_here(job: Job, progress: CaptureProgress, stop: StopRequest) -> CaptureSummary:
    """Load the teacher and capture this process's units, one after another.

    Raises:
        As `run_capture`.
    """
    heart = Heartbeat(job.config.run, interrupting(stop, threading.get_ident()))
    model = job.config.teacher.model
    progress.loading(model)
    heart.load(f"loading the teacher {model!r}")
    with translated_interrupts(stop), heart.watching(), closing(TeacherSlot(job.config)) as slot:
        heart.beat("opening the cache")
        writer = open_cache_writer(job, slot.teacher, lambda: heart.beat("making what is made once"))
        worker = UnitWorker(job, slot, writer, AttemptProgress(progress, heart), stop)
        tally = Tally(job, writer, progress, stop)
        with folded_on_failure(tally, stop), stop.working():
            for unit in tally.units:
                if stop.is_requested:
                    break
                tally.add(worker.capture(unit))
            heart.beat("folding")
            return tally.finish()
