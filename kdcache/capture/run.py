"""Carry out a capture in this process: plan -> teacher -> cache, from wherever the cache on disk says it stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kdcache.capture.job import Job, first_manifest, prepare, selection_info
from kdcache.capture.plan import Unit
from kdcache.capture.progress import CaptureProgress
from kdcache.capture.sequences import CutCounts, make_sequences
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import config_to_builtins
from kdcache.errors import ConfigError, FormatError, KdcacheError, TeacherError
from kdcache.format.manifest import Manifest, TeacherIdentity
from kdcache.format.record import SequenceRecord, TokenSequence, check_distributions
from kdcache.store import chain
from kdcache.store.writer import CacheWriter, refuse_foreign_directory
from kdcache.teacher import load_teacher
from kdcache.teacher.base import Teacher, top_k_of
from kdcache.teacher.checkpoint import weights_digest

UNITS_PER_FOLD = 32
"""A fold makes what is published visible to readers, and costs rewriting the index."""


@dataclass
class CaptureSummary:
    """What a run has done, and what there is now.

    Attributes:
        path: of the cache.
        manifest: the newest snapshot.
        num_units, num_units_before: in the plan; published before this run.
        num_items, num_empty_items: of the plan; 0 empty ones for a stream, where `counts` alone knows.
        counts: what became of the items of the units that this run captured.
        num_tokens: tokens that the teacher read in this run.
        seconds: of this run, from the first unit to the last.
    """

    path: str
    manifest: Manifest
    num_units: int
    num_units_before: int
    num_items: int
    num_empty_items: int
    counts: CutCounts = field(default_factory=CutCounts)
    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def num_units_captured(self) -> int:
        """By this run."""
        return self.num_units - self.num_units_before


def run_capture(config: CaptureConfig, progress: CaptureProgress | None = None) -> CaptureSummary:
    """Capture what is not captured yet. Run again after any stop, it goes on with the first unit that is not published.

    When every unit is published and nothing that can be compared without the model differs (input, plan, tokenizer, selection,
    codec, the config's `teacher` section, the weights of a local model), the teacher is not loaded.

    Raises:
        ConfigError, InputError, TeacherError, MissingDependencyError: before or while it runs; what is published stays.
        MismatchError: output.path holds another capture, or something that is no cache.
        CaptureError: the disk refuses.
        KeyboardInterrupt: with a sentence that says how to go on.
    """
    progress = progress or CaptureProgress()
    refuse_foreign_directory(Path(config.output.path))
    with closing(prepare(config, progress)) as job, closing(progress):
        existing = _existing_writer(job)
        if existing is not None and _is_finished(job, existing):
            return _summary(job, existing.fold(), num_units_before=len(job.plan.units))
        progress.loading(config.teacher.model)
        with closing(load_teacher(config.teacher)) as teacher:
            check_fits(config, teacher.identity)
            writer = CacheWriter.open(
                job.path, first_manifest(job, teacher.identity), record_batch_bytes=config.output.record_batch_bytes
            )
            return _capture(job, teacher, writer, progress)


def check_fits(config: CaptureConfig, teacher: TeacherIdentity) -> None:
    """Raise ConfigError where a window may be longer than the teacher can read, or k is more than it has tokens."""
    top_k_of(selection_info(config), vocab_size=teacher.vocab_size, backend=teacher.engine)
    if config.input.window.size > teacher.context_length:
        raise ConfigError(
            f"input.window.size is {config.input.window.size}, but the teacher {teacher.model!r} reads at most "
            f"{teacher.context_length} tokens; set input.window.size to {teacher.context_length} or less"
        )


def _existing_writer(job: Job) -> CacheWriter | None:
    """A writer of the cache that is there; raises MismatchError where it differs in anything that needs no teacher to see."""
    if not chain.manifest_numbers(job.path):
        return None
    teacher = chain.read_manifest(job.path, 0).identity.teacher
    return CacheWriter.open(job.path, first_manifest(job, teacher))


def _is_finished(job: Job, existing: CacheWriter) -> bool:
    """Whether every unit is published, by a teacher of the same settings and, where its weights are local, the same weights."""
    if len(existing.published_units()) < len(job.plan.units):
        return False
    if existing.manifest.config.get("teacher") != config_to_builtins(job.config.teacher):
        return False
    # Without this a teacher that was trained further in the same folder would pass for the one that was captured.
    digest = existing.manifest.identity.teacher.weights_digest
    return digest is None or digest == weights_digest(job.config.teacher.model)


def _capture(job: Job, teacher: Teacher, writer: CacheWriter, progress: CaptureProgress) -> CaptureSummary:
    published = writer.published_units()
    units = [unit for unit in job.plan.units if unit.number not in published]
    summary = _summary(job, writer.manifest, num_units_before=len(published))
    progress.start(units)
    started = time.perf_counter()
    try:
        for done, unit in enumerate(units, 1):
            _capture_unit(job, unit, teacher, writer, progress, summary)
            if done % UNITS_PER_FOLD == 0:
                writer.fold()
        summary.manifest = writer.fold()
    except BaseException as error:
        with suppress(KdcacheError, OSError):
            writer.fold()
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(_how_to_go_on(job, writer)) from error
        raise
    summary.seconds = time.perf_counter() - started
    return summary


def _capture_unit(
    job: Job, unit: Unit, teacher: Teacher, writer: CacheWriter, progress: CaptureProgress, summary: CaptureSummary
) -> None:
    vocab_size = teacher.identity.vocab_size
    items = job.reader.read(unit)
    sequences, counts = make_sequences(items, tokenizer=job.tokenizer, config=job.config.input, vocab_size=vocab_size)
    num_tokens = sum(sequence.num_tokens for sequence in sequences)
    progress.start_unit(unit, num_tokens)
    writer.write_unit(unit.number, score_records(sequences, teacher, job.config, progress))
    summary.counts.add(counts)
    summary.num_tokens += num_tokens


def score_records(
    sequences: Sequence[TokenSequence], teacher: Teacher, config: CaptureConfig, progress: CaptureProgress
) -> Iterator[SequenceRecord]:
    """The teacher's answer to each sequence, checked, as it comes.

    Raises:
        TeacherError: an answer breaks the contract of `kdcache.teacher.base`, or answers are missing.
    """
    if not sequences:
        return
    answers = teacher.score(sequences, selection_info(config))
    for sequence in sequences:
        distributions = next(answers, None)
        if distributions is None:
            raise TeacherError(f"{sequence.source}: the teacher {teacher.identity.model!r} gave no answer")
        record = SequenceRecord(sequence, distributions)
        _check_answer(record, teacher.identity)
        yield record
        progress.advance(sequence.num_tokens)


def _check_answer(record: SequenceRecord, teacher: TeacherIdentity) -> None:
    sequence, distributions = record.sequence, record.distributions
    try:
        check_distributions(distributions, vocab_size=teacher.vocab_size)
    except FormatError as error:
        raise TeacherError(f"{sequence.source}: the teacher {teacher.model!r} gave a wrong answer: {error}") from error
    asked = int(sequence.supervised_N.sum())
    if distributions.num_positions != asked:
        raise TeacherError(
            f"{sequence.source}: the teacher {teacher.model!r} answered {distributions.num_positions} of {asked} positions"
        )


def _summary(job: Job, manifest: Manifest, *, num_units_before: int) -> CaptureSummary:
    plan = job.plan
    return CaptureSummary(str(job.path), manifest, len(plan.units), num_units_before, plan.num_items, plan.num_empty_items)


def _how_to_go_on(job: Job, writer: CacheWriter) -> str:
    num_units, num_done = len(job.plan.units), len(writer.published_units())
    return f"{num_done} of {num_units} units are published in {str(job.path)!r}; run the same command again to go on"
