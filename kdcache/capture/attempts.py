"""What happens when a unit fails: it is tried again with the teacher mended, and at last without what fails alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdcache.capture.job import Job
from kdcache.capture.plan import Unit
from kdcache.capture.poison import find_poison
from kdcache.capture.requests import Request
from kdcache.capture.sequences import CutCounts
from kdcache.capture.teacher_slot import TeacherLostError, TeacherSlot
from kdcache.capture.unit import UnitDone, UnitPath
from kdcache.capture.watch.attempt_progress import AttemptProgress
from kdcache.capture.watch.signals import StopRequest
from kdcache.errors import ConfigError, InputError, KdcacheError, MismatchError, MissingDependencyError, StorageError
from kdcache.format.manifest import SkippedSequence
from kdcache.inputs.content import Item
from kdcache.shown import get_logger, shown
from kdcache.store.writing.set_aside import FailedUnit
from kdcache.store.writing.writer import CacheWriter

log = get_logger(__name__)


@dataclass(frozen=True)
class UnitFailed:
    """A unit that is given up for this run; `error` is None where it failed in another process."""

    record: FailedUnit
    error: Exception | None


class UnitWorker:
    """Captures units of one job with one teacher into one cache, and decides what to do about one that fails."""

    def __init__(self, job: Job, slot: TeacherSlot, writer: CacheWriter, progress: AttemptProgress, stop: StopRequest) -> None:
        self._job, self._slot, self._progress, self._stop = job, slot, progress, stop
        self._path = UnitPath(job, slot, writer, progress)

    def capture(self, unit: Unit) -> UnitDone | UnitFailed:
        """Publish a unit, or say why it could not be published.

        Raises:
            KdcacheError: any error not specific to this unit: the disk, the config, a teacher that does not come back.
        """
        run = self._job.config.run
        attempts, outcome = 1, self._attempt(self._path.capture, unit, 1)
        while isinstance(outcome, Exception) and self._is_worth_another_try(outcome, attempts):
            attempts += 1
            outcome = self._attempt(self._path.capture, unit, attempts)
        if isinstance(outcome, Exception) and run.skip_failing and not self._stop.is_requested:
            attempts += 1
            outcome = self._attempt(self._capture_without_poison, unit, attempts)
        if isinstance(outcome, UnitDone):
            return outcome
        record = FailedUnit(unit=unit.index, error=type(outcome).__name__, reason=reason_of(outcome), attempts=attempts)
        return UnitFailed(record, outcome)

    def _attempt(self, capture: Callable[[Unit], UnitDone], unit: Unit, attempt: int) -> UnitDone | Exception:
        """Try once; an error of the unit's own is given back, with the teacher mended."""
        try:
            return capture(unit)
        except Exception as error:
            self._progress.take_back()
            if is_fatal(error):
                raise
            log.warning("unit %d failed, attempt %d: %s", unit.index, attempt, reason_of(error))
            if not self._stop.is_requested:
                self._mend()
            return error

    def _is_worth_another_try(self, error: Exception, attempts: int) -> bool:
        # The same text is as wrong the second time; a file that could not be read may come back.
        is_final = isinstance(error, InputError) and not isinstance(error.__cause__, OSError)
        return attempts <= self._job.config.run.retries and not is_final and not self._stop.is_requested

    def _capture_without_poison(self, unit: Unit) -> UnitDone:
        """Tokenize item by item, then ask the teacher half by half; what fails alone is left out and named."""
        account = self._path.start_meter()
        requests, counts, skipped = self._readable(self._path.items(unit))
        poison = find_poison(len(requests), lambda start, stop: self._fault_of(requests[start:stop]))
        skipped += [SkippedSequence(source=requests[i].source, reason=reason_of(poison[i])) for i in sorted(poison)]
        for sequence in skipped:
            log.warning("unit %d: %s is left out: %s", unit.index, sequence.source, sequence.reason)
        sound = [request for index, request in enumerate(requests) if index not in poison]
        counts.num_sequences -= len(poison)
        counts.num_skipped = len(skipped)
        shard = self._path.publish(unit, sound, lambda: account(skipped), f"capturing unit {unit.index} without its poison")
        return UnitDone(shard, counts, shard.num_tokens, tuple(skipped))

    def _readable(self, items: Sequence[Item]) -> tuple[list[Request], CutCounts, list[SkippedSequence]]:
        made: list[Request] = []
        counts, skipped = CutCounts(), []
        for item in items:
            try:
                requests, of_item = self._path.requests([item])
            except InputError as error:
                skipped.append(SkippedSequence(source=item.source, reason=reason_of(error)))
                continue
            made += requests
            counts.add(of_item)
        return made, counts, skipped

    def _fault_of(self, requests: Sequence[Request]) -> Exception | None:
        """What goes wrong when these are asked together; their answers are not kept."""
        try:
            self._path.check(requests, "looking for the sequences that make a unit fail")
        except Exception as error:
            if is_fatal(error):
                raise
            self._mend()
            return error
        finally:
            self._progress.take_back()
        return None

    def _mend(self) -> None:
        self._progress.heart.load("loading the teacher again after a failure")
        self._slot.mend()
        self._progress.heart.beat("resuming after a failure")


def is_fatal(error: Exception) -> bool:
    """Whether an error would also hit every other unit: the config, missing packages, the disk, a lost teacher."""
    return isinstance(error, (ConfigError, MissingDependencyError, MismatchError, StorageError, TeacherLostError))


def reason_of(error: BaseException) -> str:
    """One sentence for a record; it starts with the type's name unless the error is one of ours."""
    text = str(error) if isinstance(error, KdcacheError) else f"{type(error).__name__}: {error}"
    return shown(text)
