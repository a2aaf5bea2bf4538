"""Carry out a plan in this process: every unit, or those of one static rank."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

from kdcache.capture.executors.tally import CaptureSummary, Tally
from kdcache.capture.features import features_of
from kdcache.capture.job import Job, check_fits, first_manifest, recorded_moment
from kdcache.capture.unit import Reporter, TeacherSlot, UnitWorker
from kdcache.capture.watch.heartbeat import Heartbeat, interrupting
from kdcache.capture.watch.progress import CaptureProgress
from kdcache.capture.watch.signals import Interrupted, StopRequest
from kdcache.errors import CaptureError
from kdcache.store import chain
from kdcache.store.writing.writer import CacheWriter


def capture_here(job: Job, progress: CaptureProgress, stop: StopRequest) -> CaptureSummary:
    """Load the teacher and capture this process's units, one after another.

    Raises:
        As `run_capture`.
    """
    heart = Heartbeat(job.config.run, interrupting(stop, threading.get_ident()))
    model = job.config.teacher.model
    progress.loading(model)
    heart.load(f"loading the teacher {model!r}")
    with naming_interrupts(stop), heart.watching(), closing(TeacherSlot(job.config)) as slot:
        heart.beat("opening the cache")
        writer = open_writer(job, slot)
        worker = UnitWorker(job, slot, writer, Reporter(progress, stop, heart))
        tally = Tally(job, writer, progress, stop)
        with giving_up(tally, stop), stop.working():
            for unit in tally.units:
                if stop.is_requested:
                    break
                tally.add(worker.capture(unit))
            heart.beat("folding")
            return tally.finish()


def open_writer(job: Job, slot: TeacherSlot) -> CacheWriter:
    """A writer of the job's cache, which is started if it is not there; raises MismatchError where it is another capture's."""
    check_fits(job.config, slot.teacher)
    manifest = first_manifest(job, slot.teacher.identity, features_of(job.config, slot.teacher))
    writer = CacheWriter.open(job.path, manifest, record_batch_bytes=job.config.shards.record_batch_bytes)
    # Of processes that start at once one has begun the cache: its moment counts.
    begun = recorded_moment(chain.read_manifest(job.path, 0)) if job.tokenizer.reads_clock else None
    if begun is not None:
        job.tokenizer.set_clock(begun)
    return writer


@contextmanager
def naming_interrupts(stop: StopRequest) -> Iterator[None]:
    """Say what an interrupt means where there is no account of the run yet."""
    try:
        yield
    except KeyboardInterrupt as error:
        if stop.stalled is not None:
            raise CaptureError(f"{stop.stalled}; run the same command again, with a higher limit if it needs longer") from error
        if isinstance(error, Interrupted):
            raise
        raise stop.interrupted() from error


@contextmanager
def giving_up(tally: Tally, stop: StopRequest) -> Iterator[None]:
    """Fold what is published when the run fails, and say what an interrupt means."""
    try:
        yield
    except BaseException as error:
        tally.give_up()
        if isinstance(error, KeyboardInterrupt) and stop.stalled is not None:
            raise CaptureError(f"{stop.stalled}; {tally.how_to_go_on}") from error
        if isinstance(error, KeyboardInterrupt):
            raise stop.interrupted(tally.how_to_go_on) from error
        raise
