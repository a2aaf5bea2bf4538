"""The tally of one run: which units there are, what became of each, when to fold, when to give up."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field

from kdcache.capture.attempts import UnitFailed
from kdcache.capture.job import Job
from kdcache.capture.plan import Plan, Unit
from kdcache.capture.sequences import CutCounts
from kdcache.capture.unit import UnitDone
from kdcache.capture.watch.progress import CaptureProgress
from kdcache.capture.watch.signals import StopRequest
from kdcache.config.capture import RunConfig
from kdcache.errors import CaptureError, KdcacheError
from kdcache.format import paths
from kdcache.format.manifest import Manifest, SkippedSequence
from kdcache.inputs.left_out import LeftOut
from kdcache.shown import get_logger
from kdcache.store.writing.set_aside import FailedUnit, record_failure
from kdcache.store.writing.writer import CacheWriter

log = get_logger(__name__)

MIN_UNITS_PER_FOLD = 32
FOLD_GROWTH = 1 / 4
"""A fold makes what is published visible to readers, and rewrites index and manifest, which costs more as the cache grows.
Folding when it has grown by a quarter keeps the cost of all folds at five times the last one, for any number of units."""


@dataclass
class CaptureSummary:
    """What a run has done, and what the cache holds now.

    Attributes:
        path: of the cache.
        manifest: the newest snapshot.
        num_units, num_units_before: units in the plan, and those of them published before this run.
        num_items, num_empty_items: items of the plan; 0 empty ones for a stream, where only `counts` knows.
        num_units_captured: by this run.
        num_units_left: unpublished units of this run (of its rank, if there are several).
        counts: what became of the items of the units that this run captured.
        num_tokens: tokens that the teacher read in this run.
        seconds: from this run's first unit to its last.
        set_aside: units that failed.
        skipped: sequences left out of published units because they make the unit fail.
        is_stopped: whether it was asked to stop before it had finished.
        num_workers_lost: workers of a cluster that died; others captured their units.
        left_out: files, folders and links of the input that were not read.
    """

    path: str
    manifest: Manifest
    num_units: int
    num_units_before: int
    num_items: int
    num_empty_items: int
    num_units_captured: int = 0
    num_units_left: int = 0
    counts: CutCounts = field(default_factory=CutCounts)
    num_tokens: int = 0
    seconds: float = 0.0
    set_aside: list[FailedUnit] = field(default_factory=list)
    skipped: list[SkippedSequence] = field(default_factory=list)
    is_stopped: bool = False
    num_workers_lost: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)


def own_units(plan: Plan, run: RunConfig) -> tuple[Unit, ...]:
    """List the units of this process: unit u belongs to rank u % world_size."""
    return plan.units[run.rank :: run.world_size]


class Tally:
    """Counts what became of each unit, folds now and then, and gives up after too many failures."""

    def __init__(self, job: Job, writer: CacheWriter, progress: CaptureProgress, stop: StopRequest) -> None:
        self._job, self._writer, self._progress, self._stop = job, writer, progress, stop
        published = writer.published_units()
        self.units = [unit for unit in own_units(job.plan, job.config.run) if unit.index not in published]
        self.summary = new_summary(job, writer.manifest, num_units_before=len(published))
        self._num_unfolded, self._num_folded = 0, len(published)
        self._started = time.perf_counter()
        progress.start(self.units)

    def add(self, outcome: UnitDone | UnitFailed) -> None:
        """Count a finished unit.

        Raises:
            The unit's own error if no unit may fail. CaptureError: more have failed than may.
        """
        if isinstance(outcome, UnitFailed):
            self._add_failure(outcome)
            return
        self.summary.counts.add(outcome.counts)
        self.summary.num_tokens += outcome.num_tokens
        self.summary.skipped += outcome.skipped
        self.summary.num_units_captured += 1
        self._num_unfolded += self._job.config.run.world_size  # the others are about as fast
        self._progress.published(outcome.shard)
        # Of many ranks one folds on the way: the others would only race it.
        if self._job.config.run.rank == 0 and self._num_unfolded >= units_before_fold(self._num_folded):
            self._num_unfolded, self._num_folded = 0, len(self._writer.fold().shards)

    def finish(self) -> CaptureSummary:
        """Fold for the last time, and return the summary."""
        summary = self.summary
        summary.num_units_left = len(self.units) - summary.num_units_captured
        summary.is_stopped = self._stop.is_requested and summary.num_units_left > len(summary.set_aside)
        summary.manifest = fold_if_due(self._job, self._writer)
        summary.seconds = time.perf_counter() - self._started
        self._progress.ended("stopped" if summary.is_stopped else "finished")
        return summary

    def give_up(self) -> None:
        """Make what is published visible, as the run has failed."""
        self._progress.ended("failed")
        with suppress(KdcacheError, OSError):
            fold_if_due(self._job, self._writer)

    @property
    def how_to_go_on(self) -> str:
        """How much there is, and how to resume."""
        return how_to_go_on(self._job, self._writer)

    def _add_failure(self, outcome: UnitFailed) -> None:
        failed, most = outcome.record, self._job.config.run.max_failed
        if self._stop.is_requested and failed.attempts <= self._job.config.run.retries:
            log.warning(
                "unit %d failed while the capture was stopping; it is left for the next run: %s", failed.unit, failed.reason
            )
            return
        if most == 0 and outcome.error is not None:
            raise outcome.error
        self.summary.set_aside.append(failed)
        if most:
            record_failure(self._writer.root, failed)
            self._progress.set_aside(failed)
        if len(self.summary.set_aside) > most:
            raise CaptureError(
                f"unit {failed.unit} failed, {failed.attempts} attempts, the last one with: {failed.reason}; "
                + (f"that is one more than run.max_failed, {most}; " if most else "")
                + "what is published is kept"
            ) from outcome.error


def units_before_fold(num_folded: int) -> int:
    """Say how many new units make a fold worthwhile."""
    return max(MIN_UNITS_PER_FOLD, int(num_folded * FOLD_GROWTH))


def new_summary(job: Job, manifest: Manifest, *, num_units_before: int) -> CaptureSummary:
    """Make the summary of a run that has not done anything yet."""
    plan = job.plan
    return CaptureSummary(
        str(job.path),
        manifest,
        len(plan.units),
        num_units_before,
        plan.num_items,
        plan.num_empty_items,
        left_out=job.reader.left_out,
    )


def fold_if_due(job: Job, writer: CacheWriter) -> Manifest:
    """Fold if that is up to this process: rank 0 always; another rank only if it finishes last.

    Each rank journals its last unit before it looks, so the last one to look sees all of them, and a thousand ranks that end at
    about the same time do not all rewrite the manifest.
    """
    if job.config.run.rank == 0 or _is_every_unit_journalled(job, writer):
        return writer.fold()
    return writer.manifest


def how_to_go_on(job: Job, writer: CacheWriter) -> str:
    """Say how much there is, and how to resume."""
    num_units, num_done = len(job.plan.units), len(writer.published_units())
    return f"{num_done:,} of {num_units:,} units are published in {str(job.path)!r}; run the same command again to resume"


def _is_every_unit_journalled(job: Job, writer: CacheWriter) -> bool:
    # By name alone: a record that turns out damaged is a matter of the fold.
    return len({paths.parse_journal_name(name) for name in writer.journal_names()} - {None}) >= len(job.plan.units)
