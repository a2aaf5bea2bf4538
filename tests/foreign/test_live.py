"""A real teacher beside foreign rows: what the text could only hint at becomes exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from foreign_cases import (
    Item,
    Truth,
    changed,
    defects,
    items,
    log_softmax,
    notes,
    write_columns,
    write_distillkit,
    write_rows,
)

from kdcache.config.capture import TeacherConfig
from kdcache.errors import InputError
from kdcache.foreign.base import ForeignSequence
from kdcache.foreign.judge.doctor import Examination, ExamineConfig, examine
from kdcache.foreign.judge.live import reservoir
from kdcache.teacher import load_teacher
from kdcache.teacher.base import Teacher


@pytest.fixture(scope="module")
def teacher(truth: Truth) -> Iterator[Teacher]:
    loaded = load_teacher(TeacherConfig(model=str(truth.model), backend="transformers", dtype="float32"))
    yield loaded
    loaded.close()


def look(path: Path, teacher: Teacher, sample: int = 4) -> Examination:
    return examine(path, ExamineConfig(num_sequences=sample), teacher=teacher)


def test_the_teacher_agrees_with_its_own_rows(truth: Truth, tmp_path: Path, teacher: Teacher):
    found = look(write_columns(tmp_path / "a.parquet", items(truth)), teacher)
    assert (defects(found), notes(found)) == ({}, {"teacher_agrees"})
    assert found.comparison is not None
    assert found.comparison.num_sequences == 4
    assert max(found.comparison.kl[0], found.comparison.kl[2]) > 0.5
    assert found.comparison.kl[1] < 1e-9
    kept = np.sort(np.exp(truth.logprobs_SNV[:, :-1]), axis=-1)[..., -16:].sum(axis=-1)
    assert found.comparison.kept_mass == pytest.approx(kept.mean(), abs=0.05)


@pytest.mark.parametrize("shift", [-1, 1])
def test_shifted_positions_are_found_in_text_that_the_teacher_did_not_write(
    truth: Truth, tmp_path: Path, teacher: Teacher, shift: int
):
    # The text says nothing when it is not likely; the teacher does not need it to be.
    rng = np.random.default_rng(1)
    made = items(truth)
    for item in made:
        item.input_ids = rng.integers(0, 512, len(item.input_ids)).tolist()
    from_teacher(made, teacher)
    for item in made:
        item.ids, item.values = (np.roll(rows, -shift, axis=0).tolist() for rows in (item.ids, item.values))
        wrapped = 0 if shift < 0 else -1
        item.ids[wrapped], item.values[wrapped] = [], []
    path = write_columns(tmp_path / "a.parquet", made)
    assert defects(examine(path, ExamineConfig())) == {"foreign_positions": None}
    assert defects(look(path, teacher)) == {"shifted_positions": f"--shift {shift:+d}"}


def from_teacher(made: list[Item], teacher: Teacher) -> None:
    """Supports of the teacher for whatever text the items have."""
    from kdcache.foreign.judge.live import live_selection, token_sequence

    asked = [
        ForeignSequence(
            "", np.array(i.input_ids), np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), np.zeros(0)
        )
        for i in made
    ]  # fmt: skip
    answers = teacher.score([token_sequence(s) for s in asked], live_selection(8, teacher.identity.vocab_size))
    for item, answer in zip(made, answers, strict=True):
        ids_PK, logprobs_PK = answer.padded()
        item.ids, item.values = ids_PK[:-1, :16].tolist(), logprobs_PK[:-1, :16].astype(float).tolist()


def with_values(truth: Truth, change: Callable[[np.ndarray], np.ndarray]) -> list[Item]:
    made = items(truth)
    for item, logits_NV in zip(made, truth.logits_SNV, strict=True):
        item.values = np.take_along_axis(change(logits_NV[:-1]), np.array(item.ids), axis=1).tolist()
    return made


@pytest.mark.parametrize("temperature", [0.8, 1.25, 2.0])
def test_a_temperature_is_measured(truth: Truth, tmp_path: Path, teacher: Teacher, temperature: float):
    made = with_values(truth, lambda logits: log_softmax(logits / temperature))
    found = look(write_columns(tmp_path / "a.parquet", made), teacher)
    assert "temperature_applied" in defects(found)
    assert found.comparison is not None
    assert found.comparison.line.slope == pytest.approx(1 / temperature, rel=1e-4)
    (finding,) = [finding for finding in found.findings if finding.name == "temperature_applied"]
    assert f"a temperature of {temperature:.3g} was applied" in finding.sentence


def test_renormalised_rows_lie_above_the_teacher_by_what_their_tail_held(truth: Truth, tmp_path: Path, teacher: Teacher):
    def renormalise(item: Item) -> None:
        item.values = log_softmax(np.array(item.values)).tolist()

    found = look(write_columns(tmp_path / "a.parquet", changed(items(truth), renormalise)), teacher)
    assert set(defects(found)) == {"renormalised"}
    assert found.comparison is not None
    assert found.comparison.line.offset_mean == pytest.approx(found.comparison.renormalisation_cost, rel=1e-3)


def test_another_teacher_s_values_are_not_this_one_s(truth: Truth, tmp_path: Path, teacher: Teacher):
    rng = np.random.default_rng(0)
    made = with_values(truth, lambda logits: log_softmax(logits + rng.normal(0, 0.5, logits.shape)))
    assert "teacher_disagrees" in defects(look(write_columns(tmp_path / "a.parquet", made), teacher))


def test_text_that_the_teacher_cannot_read_is_said(truth: Truth, tmp_path: Path, teacher: Teacher):
    made = items(truth)
    for item in made:
        item.input_ids[0] = 9999
    with pytest.raises(InputError, match=r"none of the 4 sampled sequences can be read by the teacher"):
        look(write_columns(tmp_path / "a.parquet", made), teacher)


def test_the_sample_is_a_function_of_the_seed_and_fair():
    def sample(seed: int) -> list[str]:
        empty = (np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), np.zeros(0))
        kept: list[ForeignSequence] = []
        for _, kept in reservoir((ForeignSequence(str(n), None, *empty) for n in range(20)), 5, seed):  # noqa: B007
            pass
        return [sequence.source for sequence in kept]

    assert sample(3) == sample(3)
    counts = {str(n): 0 for n in range(20)}
    for seed in range(400):
        for name in sample(seed):
            counts[name] += 1
    # Each is kept by 100 of 400 draws in the mean; the standard deviation is 8.7.
    assert all(60 < count < 140 for count in counts.values())


def told(found: Examination) -> dict[str, str]:
    return {finding.name: finding.sentence for finding in found.findings}


def test_rows_that_differ_by_more_than_rounding_are_counted_and_named(truth: Truth, tmp_path: Path, teacher: Teacher):
    made = items(truth, dtype=np.float16)
    made[2].values[7][3] -= 4.0
    made[2].ids[9][5] = next(i for i in range(500) if i not in made[2].ids[9])
    made[5].values[30][0] += 0.6
    found = look(write_columns(tmp_path / "a.parquet", made), teacher, sample=8)
    assert set(defects(found)) == {"outlier_positions"}
    assert told(found)["outlier_positions"].startswith("3 of 504 positions differ from the teacher's by far more than rounding")
    assert "a.parquet#2 position 7 (4)" in told(found)["outlier_positions"]
    assert found.comparison is not None
    assert {(source[-2:], position) for source, position, _ in found.comparison.outliers} == {("#2", 7), ("#2", 9), ("#5", 30)}


def test_the_teacher_is_asked_about_the_sequence_that_the_text_speaks_against(truth: Truth, tmp_path: Path, teacher: Teacher):
    made = items(truth)
    made[6].ids, made[6].values = (np.roll(rows, 1, axis=0).tolist() for rows in (made[6].ids, made[6].values))
    found = look(write_columns(tmp_path / "a.parquet", made), teacher, sample=1)
    assert set(defects(found)) == {"foreign_sequences"}
    assert "1 of 2 sequences" in told(found)["foreign_sequences"]
    assert "a.parquet#6 (" in told(found)["foreign_sequences"]


SETTINGS = {"d": 520, "k": 32, "exact_k": 16, "polynomial_terms": [0, 1, 2], "delta_encoding": True}


def test_one_exact_entry_is_no_other_teacher(truth: Truth, tmp_path: Path, teacher: Teacher):
    """No slope can be had from one entry per row; README's budget config of DistillKit keeps one."""
    made = items(truth, 32)
    for item in made:
        for row in item.values:
            row[1:] = [value - 1.0 if rank < 6 else value + 0.3 for rank, value in enumerate(row[1:])]
    one = SETTINGS | {"exact_k": 1, "polynomial_terms": [0, 1, 2, 3], "delta_encoding": False}
    found = look(write_distillkit(tmp_path / "a", made, one), teacher)
    assert defects(found) == {"broken_tails": "--repair tails"}
    assert found.comparison is not None
    assert np.isnan(found.comparison.exact_line.slope)


def test_a_fit_that_wavers_by_little_is_sound(truth: Truth, tmp_path: Path, teacher: Teacher):
    made = items(truth, 32)
    for item in made:
        for row in item.values[::8]:
            row[16:] = [value + 0.25 for value in row[16:]]
    path = write_distillkit(tmp_path / "a", made, SETTINGS | {"delta_encoding": False})
    found = examine(path, ExamineConfig())
    assert found.counts.num_rising_tail_positions > 0.02 * found.counts.num_positions
    assert defects(found) == {}
    assert (defects(asked := look(path, teacher)), "teacher_agrees" in notes(asked)) == ({}, True)


def test_a_curve_of_another_config_is_found_with_and_without_the_teacher(truth: Truth, tmp_path: Path, teacher: Teacher):
    path = write_distillkit(tmp_path / "a", items(truth, 32), SETTINGS, normalize_t=True)
    alone, asked = examine(path, ExamineConfig()), look(path, teacher)
    assert defects(alone) == defects(asked) == {"broken_tails": "--repair tails"}
    assert "with normalize_t: false" in told(alone)["broken_tails"]
    right = write_distillkit(tmp_path / "b", items(truth, 32), SETTINGS)
    assert (defects(examine(right, ExamineConfig())), defects(look(right, teacher))) == ({}, {})


def test_short_answers_of_nemo_aligner_agree_with_their_teacher(truth: Truth, tmp_path: Path, teacher: Teacher):
    """The file's row at the text's last token is that of padding, and was compared as if it were the text's."""
    rows = []
    for ids_N, logits_NV in zip(truth.ids_SN, truth.logits_SNV, strict=True):
        ids, logits = ids_N[:13], logits_NV[:13]
        top = np.argsort(-logits, axis=1)[:, :16]
        values = np.take_along_axis(logits, top, axis=1)
        log_z = np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))
        mask = [*[0] * 3, *[1] * 9, 0, 0]
        rows.append(
            {"tokens": [*ids.tolist(), 0], "labels": [*ids[1:].tolist(), 0, 0], "loss_mask": mask,
             "topk_logits": [*(values - values.max(axis=1, keepdims=True)).tolist(), values[0].tolist()],
             "topk_token_ids": [*np.roll(top, 0, axis=0)[:12].tolist(), top[3].tolist(), top[3].tolist()],
             "log_sum_exp_logits": [*log_z.tolist(), 1.0]}
        )  # fmt: skip
    found = look(write_rows(tmp_path / "a.jsonl", rows), teacher, sample=8)
    assert "teacher_agrees" in notes(found)
    assert found.comparison is not None
    assert found.comparison.line.max_difference < 1e-3
