"""A cache of ours asked by its own teacher: sound as captured, and found out when it is not what the teacher says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from foreign_cases import Truth

import kdcache
from kdcache.config.capture import TeacherConfig
from kdcache.errors import InputError, MismatchError
from kdcache.foreign.judge.deep import DeepConfig, DeepReport, verify_deep
from kdcache.foreign.judge.doctor import ExamineConfig
from kdcache.foreign.judge.own import examine_own
from kdcache.format.manifest import CodecInfo, Identity, Manifest, PlanInfo, SelectionInfo, TokenizerIdentity
from kdcache.format.record import Distributions, SequenceRecord, TokenSequence, distributions_from_dense, sequence_key
from kdcache.store.verify import verify_cache
from kdcache.store.writing.writer import CacheWriter
from kdcache.teacher import load_teacher
from kdcache.teacher.base import Teacher

Change = Callable[[SequenceRecord], SequenceRecord]


@pytest.fixture(scope="module")
def teacher(truth: Truth) -> Iterator[Teacher]:
    loaded = load_teacher(TeacherConfig(model=str(truth.model), backend="transformers", dtype="float32"))
    yield loaded
    loaded.close()


def capture(path: Path, truth: Truth, teacher: Teacher, *, codec: str = "raw", change: Change = lambda record: record) -> Path:
    """A cache of the truth's text, each record changed before it is written: a mistake at capture, with every digest right."""
    sequences = [made_sequence(ids_N) for ids_N in truth.ids_SN]
    selection = SelectionInfo(kind="top_k", params={"k": 16})
    answers = teacher.score(sequences, selection)
    records = [change(SequenceRecord(s, a)) for s, a in zip(sequences, answers, strict=True)]
    write(path, teacher, selection, records, codec)
    assert verify_cache(path).is_sound
    return path


def made_sequence(ids_N: np.ndarray) -> TokenSequence:
    ids_N, supervised_N = ids_N.astype(np.int32), np.ones(len(ids_N), np.bool_)
    supervised_N[::7] = False
    return TokenSequence(
        input_ids_N=ids_N,
        supervised_N=supervised_N,
        roles_N=np.zeros(len(ids_N), np.uint8),
        turn_starts=np.zeros(1, np.int32),
        source="made",
        key=sequence_key(ids_N, supervised_N, ""),
    )


def write(
    path: Path, teacher: Teacher, selection: SelectionInfo, records: Sequence[SequenceRecord], codec: str = "raw"
) -> None:
    identity = Identity(
        teacher=teacher.identity,
        tokenizer=TokenizerIdentity(name="made", fingerprint="f" * 64, vocab_size=512),
        selection=selection,
        codec=CodecInfo(codec_id=codec, params={"vocab_size": 520}),
        input_fingerprint="0" * 64,
    )
    manifest = Manifest(number=0, parent=None, identity=identity, plan=PlanInfo(fingerprint="p" * 64, num_units=1))
    writer = CacheWriter.open(path, manifest)
    writer.write_unit(0, records)
    writer.fold()


def ask(path: Path, teacher: Teacher, **options: object) -> DeepReport:
    with kdcache.open(path) as reader:
        return verify_deep(reader, teacher, DeepConfig(**options))  # pyright: ignore[reportArgumentType]


def with_logprobs(record: SequenceRecord, change: Callable[[np.ndarray], np.ndarray]) -> SequenceRecord:
    """Another opinion on the same supports."""
    ids_PK, logprobs_PK = record.distributions.padded()
    targets_P = record.sequence.target_ids_P
    changed_PK = change(logprobs_PK.astype(np.float64))
    target_logprobs_P = np.nan_to_num(record.distributions.target_logprobs(targets_P), nan=-1.0)
    return SequenceRecord(record.sequence, distributions_from_dense(ids_PK, changed_PK, targets_P, target_logprobs_P))


@pytest.mark.parametrize("codec", ["raw", "packed"])
def test_a_cache_as_captured_is_what_its_teacher_says(truth: Truth, tmp_path: Path, teacher: Teacher, codec: str):
    report = ask(capture(tmp_path / "c", truth, teacher, codec=codec), teacher, num_sequences=5)
    assert report.problems == ()
    assert len(report.sequences) == 5
    assert report.num_positions == 5 * (64 - 10)
    assert report.kl_mean < 1e-6
    assert report.kl_mean <= report.allowed
    assert min(report.shift_kl[0], report.shift_kl[2]) > 0.5
    assert report.slope == pytest.approx(1, abs=1e-3)
    assert report.cached_nll == pytest.approx(report.live_nll, abs=1e-3)
    assert report.kept_mass + report.dropped_mass == pytest.approx(1)
    assert report.renormalisation_cost >= -np.log(report.kept_mass)
    assert msgspec.json.decode(msgspec.json.encode(report.to_builtins()))["sound"] is True


def test_the_sample_is_a_function_of_the_seed(truth: Truth, tmp_path: Path, teacher: Teacher):
    cache = capture(tmp_path / "c", truth, teacher)
    first = ask(cache, teacher, num_sequences=3, seed=1)
    assert first == ask(cache, teacher, num_sequences=3, seed=1)
    assert first.sequences != ask(cache, teacher, num_sequences=3, seed=2).sequences
    assert ask(cache, teacher, num_sequences=100).sequences == tuple(range(8))


@pytest.mark.parametrize("shift", [-1, 1])
def test_rows_that_were_shifted_at_capture_are_found_out(truth: Truth, tmp_path: Path, teacher: Teacher, shift: int):
    def move(record: SequenceRecord) -> SequenceRecord:
        d = record.distributions
        rows = [np.roll(part, -shift, axis=0) for part in d.padded()]
        targets_P = record.sequence.target_ids_P
        return SequenceRecord(record.sequence, distributions_from_dense(*rows, targets_P, np.full(len(targets_P), -9.0)))

    everywhere = replace(truth, ids_SN=truth.ids_SN[:4])
    report = ask(capture(tmp_path / "c", everywhere, teacher, change=move), teacher)
    assert any(f"moved by {shift:+d}" in problem for problem in report.problems)


def test_a_temperature_at_capture_is_found_out(truth: Truth, tmp_path: Path, teacher: Teacher):
    def soften(record: SequenceRecord) -> SequenceRecord:
        return with_logprobs(record, lambda logprobs: logprobs / 1.1 - 0.3)

    report = ask(capture(tmp_path / "c", truth, teacher, change=soften), teacher)
    assert "is not what this teacher says" in report.problems[0]
    assert report.slope == pytest.approx(1 / 1.1, abs=1e-3)


def test_renormalised_rows_are_found_out(truth: Truth, tmp_path: Path, teacher: Teacher):
    def renormalise(record: SequenceRecord) -> SequenceRecord:
        return with_logprobs(record, lambda lp: lp - np.log(np.exp(lp).sum(axis=1, keepdims=True)))

    assert not ask(capture(tmp_path / "c", truth, teacher, change=renormalise), teacher).is_sound


def test_a_little_noise_is_found_out_unless_it_is_allowed(truth: Truth, tmp_path: Path, teacher: Teacher):
    rng = np.random.default_rng(0)

    def noisy(logprobs: np.ndarray) -> np.ndarray:
        """Of the same mass: more than 1 would be seen without a teacher."""
        blurred = logprobs + rng.normal(0, 0.1, logprobs.shape)
        mass = np.exp(logprobs).sum(axis=1, keepdims=True) / np.exp(blurred).sum(axis=1, keepdims=True)
        return np.minimum(blurred + np.log(mass), 0)

    def blur(record: SequenceRecord) -> SequenceRecord:
        return with_logprobs(record, noisy)

    cache = capture(tmp_path / "c", truth, teacher, change=blur)
    report = ask(cache, teacher)
    assert not report.is_sound
    assert 1e-3 < report.kl_mean < 0.05
    assert ask(cache, teacher, tolerance_nats=0.1).is_sound


def test_wrong_target_logprobs_are_found_out(truth: Truth, tmp_path: Path, teacher: Teacher):
    def lie(record: SequenceRecord) -> SequenceRecord:
        d = record.distributions
        outside = (d.outside_target_logprobs - 3.0).astype(np.float32)
        return SequenceRecord(record.sequence, replace(d, outside_target_logprobs=outside))

    report = ask(capture(tmp_path / "c", truth, teacher, change=lie), teacher)
    assert (
        [problem for problem in report.problems if problem.startswith("the NLL of the text is")] == list(report.problems) != []
    )
    assert report.nll_difference == pytest.approx(3.0, abs=1e-3)


def test_random_selections_are_compared_in_what_is_exact(truth: Truth, tmp_path: Path, teacher: Teacher):
    sequences = [made_sequence(ids_N) for ids_N in truth.ids_SN]
    for selection in (
        SelectionInfo(kind="threshold", params={"tau": 0.02, "seed": 1}),
        SelectionInfo(kind="sampled", params={"num_draws": 8, "seed": 1}),
    ):
        path = tmp_path / selection.kind
        answers: list[Distributions] = list(teacher.score(sequences, selection))
        write(path, teacher, selection, [SequenceRecord(s, a) for s, a in zip(sequences, answers, strict=True)])
        report = ask(path, teacher)
        assert report.problems == ()
        assert (report.num_positions > 0) == (selection.kind == "threshold")
        assert report.nll_difference < 1e-4


def test_another_teacher_is_not_asked(truth: Truth, tmp_path: Path, teacher: Teacher):
    from tiny_model import build_tiny_model

    other = load_teacher(
        TeacherConfig(model=str(build_tiny_model(tmp_path / "other", seed=1)), backend="transformers", dtype="float32")
    )
    with pytest.raises(MismatchError, match=r"'other' is not the one that was captured, 'tiny-llama': weights_digest"):
        ask(capture(tmp_path / "c", truth, teacher), other)
    other.close()


def test_filtered_distributions_and_empty_caches_are_refused_in_words(truth: Truth, tmp_path: Path, teacher: Teacher):
    selection = SelectionInfo(kind="top_k", params={"k": 16}, filters={"top_p": 0.9})
    sequence = made_sequence(truth.ids_SN[0])
    (answer,) = teacher.score([sequence], SelectionInfo(kind="top_k", params={"k": 16}))
    write(tmp_path / "f", teacher, selection, [SequenceRecord(sequence, answer)])
    with pytest.raises(InputError, match="after the sampler's filters"):
        ask(tmp_path / "f", teacher)
    write(tmp_path / "e", teacher, SelectionInfo(kind="top_k", params={"k": 16}), [])
    with pytest.raises(InputError, match="no sequence with a recorded position"):
        ask(tmp_path / "e", teacher)


def test_what_a_sampler_s_filters_left_is_a_note_to_the_doctor(truth: Truth, tmp_path: Path, teacher: Teacher):
    sequences = [made_sequence(ids_N) for ids_N in truth.ids_SN]
    answers = teacher.score(sequences, SelectionInfo(kind="top_k", params={"k": 16}))
    records = [SequenceRecord(s, a) for s, a in zip(sequences, answers, strict=True)]
    filtered = [with_logprobs(r, lambda lp: lp - np.log(np.exp(lp).sum(axis=1, keepdims=True))) for r in records]
    for filters, is_sound in (({"top_k": 16.0}, True), ({}, False)):
        path = tmp_path / str(is_sound)
        write(path, teacher, SelectionInfo(kind="top_k", params={"k": 16}, filters=filters), filtered)
        found = examine_own(path, ExamineConfig())
        assert "renormalised" in {finding.name for finding in found.findings}
        assert found.is_sound == is_sound


def test_the_doctor_of_our_own_cache_verifies_probes_and_asks(truth: Truth, tmp_path: Path, teacher: Teacher):
    cache = capture(tmp_path / "c", truth, teacher)
    found = examine_own(cache, ExamineConfig(), teacher=teacher)
    assert found.is_sound
    assert {"teacher_agrees"} <= {finding.name for finding in found.findings}
    (shard,) = (cache / "data").iterdir()
    shard.chmod(0o644)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    damaged = examine_own(cache, ExamineConfig())
    assert not damaged.is_sound
    assert any("damaged" in finding.sentence for finding in damaged.findings)


class WithNeighbours:
    """A teacher whose answer for a text is another one beside longer texts, as if factors were chosen by the longest."""

    def __init__(self, teacher: Teacher, exponent: float) -> None:
        self._teacher, self._exponent = teacher, exponent
        self.identity = teacher.identity

    def score(self, sequences: Sequence[TokenSequence], selection: SelectionInfo) -> Iterator[Distributions]:
        longest = max(sequence.num_tokens for sequence in sequences)
        for sequence, answer in zip(sequences, self._teacher.score(sequences, selection), strict=True):
            changed = with_logprobs(SequenceRecord(sequence, answer), lambda logprobs: logprobs * self._exponent)
            yield changed.distributions if sequence.num_tokens < longest else answer

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("exponent", "finds"), [(1.2, True), (1.0, False)])
def test_a_teacher_that_moves_with_its_neighbours_is_a_finding_and_not_a_tolerance(
    truth: Truth, tmp_path: Path, teacher: Teacher, exponent: float, finds: bool
):
    unequal = replace(truth, ids_SN=[ids_N[: 20 + 12 * (i % 4)] for i, ids_N in enumerate(truth.ids_SN)])
    moving: Any = WithNeighbours(teacher, exponent)
    cache = capture(tmp_path / "c", unequal, moving)
    report = ask(cache, moving, num_sequences=8)
    assert [("depends on the others in its batch" in p, "is not what this teacher says" in p) for p in report.problems[:2]] == (
        [(True, False), (False, True)] if finds else []
    )
    assert report.allowed < 2e-3
    assert report.is_sound != finds
    # Captured with neighbours, compared with the text alone: the sound teacher finds what the other one hides.
    assert ask(cache, teacher, num_sequences=8).is_sound != finds
    found = {finding.name: finding for finding in examine_own(cache, ExamineConfig(), teacher=moving).findings}
    assert any("depends on the others in its batch" in finding.sentence for finding in found.values()) == finds


def test_one_text_among_many_that_is_a_little_off_is_found(truth: Truth, tmp_path: Path, teacher: Teacher):
    seen: list[SequenceRecord] = []

    def move_the_first(record: SequenceRecord) -> SequenceRecord:
        seen.append(record)
        return with_logprobs(record, lambda logprobs: logprobs * 1.01) if len(seen) == 1 else record

    report = ask(capture(tmp_path / "c", truth, teacher, change=move_the_first), teacher, num_sequences=8)
    assert report.kl_mean < 1e-4
    assert not report.is_sound
