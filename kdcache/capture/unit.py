"""One unit: items -> sequences -> the teacher's answers -> shard; again where that fails; without its poison where asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kdcache.capture.features import features_of
from kdcache.capture.generate import make_prompts, write_sequences, writer_of
from kdcache.capture.job import Job, ask, selection_info
from kdcache.capture.plan import Unit
from kdcache.capture.poison import find_poison
from kdcache.capture.sequences import CutCounts, make_sequences
from kdcache.capture.watch.heartbeat import Heartbeat
from kdcache.capture.watch.meter import gpus_held, start_meter
from kdcache.capture.watch.progress import CaptureProgress
from kdcache.capture.watch.signals import StopRequest
from kdcache.codec.features import check_features
from kdcache.config.capture import CaptureConfig
from kdcache.errors import (
    CaptureError,
    ConfigError,
    FormatError,
    InputError,
    KdcacheError,
    MismatchError,
    MissingDependencyError,
    TeacherError,
)
from kdcache.format.manifest import FeatureInfo, ShardInfo, SkippedSequence, TeacherIdentity
from kdcache.format.record import SequenceRecord, TokenSequence, check_distributions, check_mass
from kdcache.format.selection import fixed_entries
from kdcache.inputs.content import Item
from kdcache.shown import get_logger, shown
from kdcache.store.writing.admission import check_record
from kdcache.store.writing.set_aside import FailedUnit
from kdcache.store.writing.writer import CacheWriter
from kdcache.teacher import load_teacher
from kdcache.teacher.base import Teacher
from kdcache.teacher.generation import Prompt
from kdcache.teacher.tokenizer import Tokenizer

log = get_logger(__name__)

Work = TokenSequence | Prompt
"""What the teacher is given: a text to read, or a prompt to answer."""


class TeacherLostError(CaptureError):
    """The teacher did not survive a failure, and there is none to go on with."""


@dataclass(frozen=True)
class UnitDone:
    """A unit that is published.

    Attributes:
        counts: what became of its items.
        num_tokens: that the teacher read for the shard.
    """

    shard: ShardInfo
    counts: CutCounts
    num_tokens: int
    skipped: tuple[SkippedSequence, ...] = ()


@dataclass(frozen=True)
class UnitFailed:
    """A unit that is given up for this run; `error` is None where it happened in another process."""

    record: FailedUnit
    error: Exception | None


@dataclass(frozen=True)
class Reporter:
    """Whom a worker tells and asks while it is at work."""

    progress: CaptureProgress
    stop: StopRequest
    heart: Heartbeat


class TeacherSlot:
    """The teacher, and its replacement when an engine does not survive a failure. Close it."""

    def __init__(self, config: CaptureConfig) -> None:
        """Load the teacher; raises as `load_teacher`."""
        self._config = config
        self.teacher: Teacher = load_teacher(config.teacher)
        if config.generate is not None:
            try:
                writer_of(self.teacher)
            except ConfigError:
                self.teacher.close()
                raise

    def mend(self) -> None:
        """After a failure: load the teacher again, unless it still takes requests.

        Raises:
            TeacherLostError: it does not load again, or is another one now.
        """
        try:
            list(ask(self.teacher, [], self._config))
            return
        except KdcacheError as error:
            log.warning("the teacher does not take requests any more (%s); loading it again", error)
        identity = self.teacher.identity
        self.teacher.close()
        try:
            self.teacher = load_teacher(self._config.teacher)
        except KdcacheError as error:
            raise TeacherLostError(
                f"the teacher failed and could not be loaded again: {error}; what is published stays, "
                "and the same command goes on from there"
            ) from error
        if self.teacher.identity != identity:
            raise TeacherLostError(f"the teacher {identity.model!r} was loaded again after a failure and is another one now")

    def close(self) -> None:
        """Give the model's memory back."""
        self.teacher.close()


class UnitWorker:
    """Captures units of one job with one teacher into one cache."""

    def __init__(self, job: Job, slot: TeacherSlot, writer: CacheWriter, reporter: Reporter) -> None:
        self._job, self._slot, self._writer = job, slot, writer
        self._progress, self._stop, self._heart = reporter.progress, reporter.stop, reporter.heart
        self._num_gpus = gpus_held(job.config.teacher)
        self._answered = 0

    def capture(self, unit: Unit) -> UnitDone | UnitFailed:
        """Publish a unit, or say why it could not be.

        Raises:
            KdcacheError: what is no matter of this unit: the disk, the config, a teacher that does not come back.
        """
        run = self._job.config.run
        attempts, error = 0, None
        while error is None or self._is_worth_another_try(error, attempts):
            attempts += 1
            try:
                return self._capture(unit)
            except Exception as caught:
                error = caught
                self._after_failure(unit, attempts, error)
        if run.skip_poison and not self._stop.is_requested:
            attempts += 1
            try:
                return self._capture_without_poison(unit)
            except Exception as caught:
                error = caught
                self._after_failure(unit, attempts, error)
        record = FailedUnit(unit=unit.index, error=type(error).__name__, reason=reason_of(error), attempts=attempts)
        return UnitFailed(record, error)

    def _is_worth_another_try(self, error: Exception, attempts: int) -> bool:
        # The same text is as wrong the second time; a file that could not be read may come back.
        is_final = isinstance(error, InputError) and not isinstance(error.__cause__, OSError)
        return attempts <= self._job.config.run.retries and not is_final and not self._stop.is_requested

    def _capture(self, unit: Unit) -> UnitDone:
        account = start_meter(self._num_gpus)
        work, counts = self._work(self._job.reader.read(unit))
        self._progress.start_unit(unit, most_tokens(work, self._job.config))
        records = self._records(work, f"capturing unit {unit.index}")
        shard = self._writer.write_unit(unit.index, records, account=lambda: account(()))
        self._progress.start_unit(unit, shard.num_tokens)
        return UnitDone(shard, counts, shard.num_tokens)

    def _capture_without_poison(self, unit: Unit) -> UnitDone:
        """Item by item into tokens, then half by half to the teacher; what fails alone is left out and named."""
        account = start_meter(self._num_gpus)
        work, counts, skipped = self._readable(self._job.reader.read(unit))
        poison = find_poison(len(work), lambda start, stop: self._attempt(work[start:stop]))
        skipped += [SkippedSequence(source=work[i].source, reason=reason_of(poison[i])) for i in sorted(poison)]
        for sequence in skipped:
            log.warning("unit %d: %s is left out: %s", unit.index, sequence.source, sequence.reason)
        sound = [asked for index, asked in enumerate(work) if index not in poison]
        counts.num_sequences -= len(poison)
        counts.num_skipped = len(skipped)
        records = self._records(sound, f"capturing unit {unit.index} without its poison")
        shard = self._writer.write_unit(unit.index, records, account=lambda: account(skipped))
        return UnitDone(shard, counts, shard.num_tokens, tuple(skipped))

    def _work(self, items: Sequence[Item]) -> tuple[list[Work], CutCounts]:
        return make_work(items, self._job.tokenizer, self._job.config, self._slot.teacher.identity.vocab_size)

    def _readable(self, items: Sequence[Item]) -> tuple[list[Work], CutCounts, list[SkippedSequence]]:
        made: list[Work] = []
        counts, skipped = CutCounts(), []
        for item in items:
            try:
                work, of_item = self._work([item])
            except InputError as error:
                skipped.append(SkippedSequence(source=item.source, reason=reason_of(error)))
                continue
            made += work
            counts.add(of_item)
        return made, counts, skipped

    def _attempt(self, work: Sequence[Work]) -> Exception | None:
        """What goes wrong when these are asked together; their answers are not kept."""
        identity, fixed = self._slot.teacher.identity, fixed_entries(selection_info(self._job.config))
        try:
            for record in self._records(work, "looking for the sequences that make a unit fail"):
                check_record(record, vocab_size=identity.vocab_size, fixed_entries=fixed)
        except Exception as error:
            if is_fatal(error):
                raise
            self._mend()
            return error
        finally:
            self._take_back()
        return None

    def _records(self, work: Sequence[Work], doing: str) -> Iterator[SequenceRecord]:
        """The teacher's answers; each one beats the heart and moves the bar."""
        self._answered = 0
        self._heart.beat(doing)
        sequences, written = self._sequences(work, doing), self._answered
        for record in score_records(sequences, self._slot.teacher, self._job.config):
            self._heart.beat()
            yield record
            # Of what the teacher wrote itself only the prompt is new.
            self._advance(record.sequence.num_tokens - (record.distributions.num_positions if written else 0))
        self._heart.beat(f"{doing}: writing")

    def _sequences(self, work: Sequence[Work], doing: str) -> list[TokenSequence]:
        """What is to be scored: the work itself, or the prompts with the answers that the teacher now writes."""
        prompts = [asked for asked in work if isinstance(asked, Prompt)]
        if not prompts:
            return [asked for asked in work if isinstance(asked, TokenSequence)]
        self._heart.beat(f"{doing}: writing answers")
        job = self._job
        sequences = list(write_sequences(prompts, self._slot.teacher, job.config, job.tokenizer, self._advance))
        # An answer that was cut at a stop string has lost tokens that were counted.
        self._advance(sum(int(sequence.supervised_N.sum()) for sequence in sequences) - self._answered)
        self._heart.beat(doing)
        return sequences

    def _advance(self, num_tokens: int) -> None:
        self._heart.beat()
        self._answered += num_tokens
        self._progress.advance(num_tokens)

    def _after_failure(self, unit: Unit, attempt: int, error: Exception) -> None:
        self._take_back()
        if is_fatal(error):
            raise error
        log.warning("unit %d failed, attempt %d: %s", unit.index, attempt, reason_of(error))
        if not self._stop.is_requested:
            self._mend()

    def _mend(self) -> None:
        self._heart.load("loading the teacher again after a failure")
        self._slot.mend()
        self._heart.beat("going on after a failure")

    def _take_back(self) -> None:
        if self._answered:
            self._progress.advance(-self._answered)
        self._answered = 0


def score_records(sequences: Sequence[TokenSequence], teacher: Teacher, config: CaptureConfig) -> Iterator[SequenceRecord]:
    """The teacher's answer to each sequence, checked, as it comes.

    Raises:
        TeacherError: an answer breaks the contract of `kdcache.teacher.base`, or answers are missing.
    """
    if not sequences:
        return
    answers, features = ask(teacher, sequences, config), features_of(config, teacher)
    for sequence in sequences:
        distributions = next(answers, None)
        if distributions is None:
            raise TeacherError(f"{sequence.source}: the teacher {teacher.identity.model!r} gave no answer")
        record = SequenceRecord(sequence, distributions)
        _check_answer(record, teacher.identity, features)
        yield record


def is_fatal(error: Exception) -> bool:
    """Whether an error would meet every other unit too: what is asked for, what is installed, what the disk says."""
    if isinstance(error, CaptureError) and isinstance(error.__cause__, OSError):
        return True
    return isinstance(error, (ConfigError, MissingDependencyError, MismatchError, TeacherLostError))


def reason_of(error: BaseException) -> str:
    """One sentence for a record; with the type's name where the error is not one of ours."""
    text = str(error) if isinstance(error, KdcacheError) else f"{type(error).__name__}: {error}"
    return shown(text)


def make_work(
    items: Sequence[Item], tokenizer: Tokenizer, config: CaptureConfig, vocab_size: int
) -> tuple[list[Work], CutCounts]:
    """What the teacher is given for some items; raises as `make_sequences` and `make_prompts`."""
    if config.generate is not None:
        prompts, counts = make_prompts(items, tokenizer=tokenizer, config=config, vocab_size=vocab_size)
        return list(prompts), counts
    sequences, counts = make_sequences(items, tokenizer=tokenizer, config=config.input, vocab_size=vocab_size)
    return list(sequences), counts


def most_tokens(work: Sequence[Work], config: CaptureConfig) -> int:
    """Tokens of some work; of prompts, with the longest answers that they may have."""
    answer = 0 if config.generate is None else config.generate.max_tokens
    return sum((asked.sequence if isinstance(asked, Prompt) else asked).num_tokens + answer for asked in work)


def _check_answer(record: SequenceRecord, teacher: TeacherIdentity, features: Sequence[FeatureInfo]) -> None:
    sequence, distributions = record.sequence, record.distributions
    try:
        check_distributions(distributions, vocab_size=teacher.vocab_size)
        check_mass(distributions)
        check_features(distributions.features, features, distributions.num_positions)
    except FormatError as error:
        raise TeacherError(f"{sequence.source}: the teacher {teacher.model!r} gave a wrong answer: {error}") from error
    asked = int(sequence.supervised_N.sum())
    if distributions.num_positions != asked:
        raise TeacherError(
            f"{sequence.source}: the teacher {teacher.model!r} answered {distributions.num_positions} of {asked} positions"
        )
