"""One unit, as long as nothing fails: items -> requests -> answers -> a shard. `attempts.py` deals with failures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from kdcache.capture.features import features_of
from kdcache.capture.generate import write_sequences
from kdcache.capture.job import Job, selection_info
from kdcache.capture.plan import Unit
from kdcache.capture.requests import Request, make_requests, most_tokens
from kdcache.capture.sequences import CutCounts
from kdcache.capture.teacher_slot import TeacherSlot
from kdcache.capture.watch.attempt_progress import AttemptProgress
from kdcache.capture.watch.meter import gpus_held, start_meter
from kdcache.codec.features.projection import project_features
from kdcache.config.capture import CaptureConfig
from kdcache.errors import CorruptCacheError, FormatError, TeacherError
from kdcache.format.manifest import FeatureInfo, ShardInfo, SkippedSequence, TeacherIdentity, UnitAccount
from kdcache.format.record import SequenceRecord, TokenSequence
from kdcache.inputs.content import Item
from kdcache.store.writing.writer import CacheWriter
from kdcache.teacher.base import Teacher
from kdcache.teacher.generation import Prompt

Account = Callable[[Sequence[SkippedSequence]], UnitAccount]
"""Says what a unit took so far, and names the sequences that were left out of it."""


@dataclass(frozen=True)
class UnitDone:
    """A published unit.

    Attributes:
        shard: the manifest's entry for it.
        counts: what became of its items.
        num_tokens: tokens that the teacher read for the shard.
        skipped: sequences left out because they make the unit fail.
    """

    shard: ShardInfo
    counts: CutCounts
    num_tokens: int
    skipped: tuple[SkippedSequence, ...] = ()


class UnitPath:
    """The steps that take a unit of a job from its items to a published shard, with one teacher and one writer."""

    def __init__(self, job: Job, slot: TeacherSlot, writer: CacheWriter, progress: AttemptProgress) -> None:
        self._job, self._slot, self._writer, self._progress = job, slot, writer, progress
        self._num_gpus = gpus_held(job.config.teacher)

    def capture(self, unit: Unit) -> UnitDone:
        """Take all the steps."""
        account = self.start_meter()
        requests, counts = self.requests(self.items(unit))
        self._progress.expect(unit, most_tokens(requests, self._job.config))
        shard = self.publish(unit, requests, lambda: account(()), f"capturing unit {unit.index}")
        self._progress.expect(unit, shard.num_tokens)
        return UnitDone(shard, counts, shard.num_tokens)

    def start_meter(self) -> Account:
        """Start counting the time and the energy that a unit takes."""
        return start_meter(self._num_gpus)

    def items(self, unit: Unit) -> list[Item]:
        """Read the unit's items; raises as `InputReader.read`."""
        return self._job.reader.read(unit)

    def requests(self, items: Sequence[Item]) -> tuple[list[Request], CutCounts]:
        """What the teacher is asked for these items; raises as `make_requests`."""
        return make_requests(items, self._job.tokenizer, self._job.config, self._slot.teacher.identity.vocab_size)

    def records(self, requests: Sequence[Request], doing: str) -> Iterator[SequenceRecord]:
        """Yield the teacher's answers; each one beats the heart and moves the bar.

        Args:
            requests: texts to read, or prompts to answer.
            doing: what this is for, for the watch's message.
        """
        self._progress.begin(doing)
        sequences = self._sequences(requests)
        records = score_records(sequences, self._slot.teacher, self._job.config, self._writer.features)
        yield from self._progress.counted(_projected(records, self._writer))

    def publish(self, unit: Unit, requests: Sequence[Request], account: Callable[[], UnitAccount], doing: str) -> ShardInfo:
        """Have the requests answered and publish the answers as the unit's shard.

        Raises:
            TeacherError: an answer breaks the contract of a record; names its source.
        """
        with blaming_teacher(self._slot.teacher.identity):
            return self._writer.write_unit(unit.index, self.records(requests, doing), account=account, sums_to_one=True)

    def check(self, requests: Sequence[Request], doing: str) -> None:
        """Have the requests answered and check the answers as `publish` does, without keeping them; raises as it does."""
        with blaming_teacher(self._slot.teacher.identity):
            for record in self.records(requests, doing):
                self._writer.check(record, sums_to_one=True)

    def _sequences(self, requests: Sequence[Request]) -> list[TokenSequence]:
        """What is to be scored: the texts themselves, or the prompts with the answers that the teacher now writes."""
        prompts = [asked for asked in requests if isinstance(asked, Prompt)]
        if not prompts:
            return [asked for asked in requests if isinstance(asked, TokenSequence)]
        self._progress.begin_writing()
        job, teacher = self._job, self._slot.teacher
        sequences = list(write_sequences(prompts, teacher, job.config, job.tokenizer, self._progress.advance))
        self._progress.end_writing(sequences)
        return sequences


def _projected(records: Iterable[SequenceRecord], writer: CacheWriter) -> Iterator[SequenceRecord]:
    """The records with their features as the cache keeps them: made smaller where they have a projection."""
    if not any(feature.projection is not None for feature in writer.features):
        yield from records
        return
    for record in records:
        features = project_features(writer.features, writer.constants, record.distributions.features)
        yield SequenceRecord(record.sequence, replace(record.distributions, features=features))


def score_records(
    sequences: Sequence[TokenSequence],
    teacher: Teacher,
    config: CaptureConfig,
    features: Sequence[FeatureInfo] | None = None,
) -> Iterator[SequenceRecord]:
    """Yield the teacher's answer to each sequence as it comes; who stores it checks it.

    Args:
        sequences: texts to read.
        teacher: of the capture.
        config: of the capture.
        features: those of the cache; None for what the config asks of the teacher, before there is a cache.

    Raises:
        TeacherError: answers are missing.
    """
    if not sequences:
        return
    asked = features_of(config, teacher) if features is None else features
    answers = teacher.score(sequences, selection_info(config), asked)
    for sequence in sequences:
        distributions = next(answers, None)
        if distributions is None:
            raise TeacherError(f"{sequence.source}: the teacher {teacher.identity.model!r} gave no answer")
        yield SequenceRecord(sequence, distributions)


@contextmanager
def blaming_teacher(teacher: TeacherIdentity) -> Iterator[None]:
    """Turn the FormatError of a record that breaks its contract into a TeacherError: its text was checked before."""
    try:
        yield
    except CorruptCacheError:
        raise
    except FormatError as error:
        raise TeacherError(f"the teacher {teacher.model!r} gave a wrong answer: {error}") from error
