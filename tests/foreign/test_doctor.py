"""Each defect, put into a sound cache, is named; the sound cache is not accused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from foreign_cases import (
    Item,
    Truth,
    changed,
    defects,
    few_rows,
    items,
    log_softmax,
    notes,
    with_extra_target,
    write_columns,
    write_rows,
)

from kdcache.errors import InputError
from kdcache.foreign.base import ReadConfig
from kdcache.foreign.judge.doctor import Examination, ExamineConfig, examine


def look(path: Path, read: ReadConfig | None = None, **options: int) -> Examination:
    return examine(path, ExamineConfig(read=read or ReadConfig(), **options))


@pytest.mark.parametrize("ending", ["parquet", "arrow", "jsonl"])
def test_a_sound_cache_is_not_accused(truth: Truth, tmp_path: Path, ending: str):
    found = look(write_columns(tmp_path / f"a.{ending}", items(truth)))
    assert found.is_sound
    assert defects(found) == {}
    assert found.alignment is not None
    assert found.alignment.verdict == "aligned"
    assert found.counts.num_positions == 8 * 63


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("k", [2, 16, 64])
def test_neither_a_narrow_nor_a_rounded_one(truth: Truth, tmp_path: Path, k: int, dtype: type):
    assert defects(look(write_columns(tmp_path / "a.parquet", items(truth, k, dtype=dtype)))) == {}


@pytest.mark.parametrize("shift", [-1, 1])
def test_shifted_positions(truth: Truth, tmp_path: Path, shift: int):
    def move(item: Item) -> None:
        # A row that stands one place later than it belongs has to be moved by -1.
        item.ids, item.values = (np.roll(rows, -shift, axis=0).tolist() for rows in (item.ids, item.values))

    found = look(write_columns(tmp_path / "a.parquet", changed(items(truth), move)))
    assert defects(found) == {"shifted_positions": f"--shift {shift:+d}"}


def test_an_engine_s_empty_first_row_is_a_shift(truth: Truth, tmp_path: Path):
    def as_the_engine_gives_it(item: Item) -> None:
        item.ids, item.values = [[], *item.ids], [[], *item.values]

    found = look(write_columns(tmp_path / "a.jsonl", changed(items(truth), as_the_engine_gives_it)))
    assert defects(found) == {"shifted_positions": "--shift -1"}
    assert notes(found) == {"missing_positions"}


def test_renormalised_values(truth: Truth, tmp_path: Path):
    def renormalise(item: Item) -> None:
        item.values = log_softmax(np.array(item.values)).tolist()

    assert "renormalised" in defects(look(write_columns(tmp_path / "a.parquet", changed(items(truth), renormalise))))


def test_renormalised_values_in_half_precision(truth: Truth, tmp_path: Path):
    def renormalise(item: Item) -> None:
        item.values = log_softmax(np.array(item.values)).astype(np.float16).astype(float).tolist()

    assert "renormalised" in defects(look(write_columns(tmp_path / "a.parquet", changed(items(truth), renormalise))))


def test_the_whole_vocabulary_is_not_renormalised(truth: Truth, tmp_path: Path):
    found = look(write_columns(tmp_path / "a.parquet", items(truth, 520)), vocab_size=520)
    assert defects(found) == {}


def test_logits_in_place_of_logprobs(truth: Truth, tmp_path: Path):
    made = items(truth)
    for item, logits_NV in zip(made, truth.logits_SNV, strict=True):
        item.values = np.take_along_axis(logits_NV[:-1], np.array(item.ids), axis=1).tolist()
    assert defects(look(write_columns(tmp_path / "a.parquet", made))) == {"logits": None}


def test_logits_with_their_maximum_taken_off(truth: Truth, tmp_path: Path):
    def take_off(item: Item) -> None:
        item.values = [[value - row[0] for value in row] for row in item.values]

    found = look(write_columns(tmp_path / "a.parquet", changed(items(truth), take_off)))
    assert defects(found) == {"logits": None}
    assert "maximum taken off" in found.findings[0].sentence


def test_probabilities_in_place_of_logprobs(truth: Truth, tmp_path: Path):
    def exponentiate(item: Item) -> None:
        item.values = np.exp(item.values).tolist()

    path = write_columns(tmp_path / "a.parquet", changed(items(truth), exponentiate))
    assert defects(look(path)) == {"probabilities": "--values probs"}
    assert defects(look(path, ReadConfig(values="probs"))) == {}


def test_unnormalised_values(truth: Truth, tmp_path: Path):
    def lift(item: Item) -> None:
        item.values = [[min(value + 0.5, -0.01) for value in row] for row in item.values]

    assert defects(look(write_columns(tmp_path / "a.parquet", changed(items(truth), lift)))) == {"unnormalised": None}


def test_logits_without_and_with_their_normaliser(truth: Truth, tmp_path: Path):
    made = items(truth)
    rows = []
    for item, logits_NV in zip(made, truth.logits_SNV, strict=True):
        log_z = np.log(np.exp(logits_NV[:-1]).sum(axis=1))
        logits = np.take_along_axis(logits_NV[:-1], np.array(item.ids), axis=1)
        rows.append({"input_ids": item.input_ids, "ids": item.ids, "logits": logits.tolist(), "lse": log_z.tolist()})
    assert defects(look(write_rows(tmp_path / "with.parquet", rows))) == {}
    without = [{name: value for name, value in row.items() if name != "lse"} for row in rows]
    assert defects(look(write_rows(tmp_path / "without.parquet", without))) == {"missing_normaliser": None}
    wrong = [row | {"lse": [value - 1 for value in row["lse"]]} for row in rows]
    assert defects(look(write_rows(tmp_path / "wrong.parquet", wrong))) == {"wrong_normaliser": None}


def test_logprobs_that_are_called_logits(truth: Truth, tmp_path: Path):
    path = write_columns(tmp_path / "a.parquet", items(truth), values="top_logits")
    assert defects(look(path)) == {"named_logits": "--values logprobs"}
    assert defects(look(path, ReadConfig(values="logprobs"))) == {}


def test_k_plus_1_entries(truth: Truth, tmp_path: Path):
    found = look(write_columns(tmp_path / "a.parquet", with_extra_target(truth)))
    assert defects(found) == {"k_plus_1_entries": "--repair k+1"}


def test_the_extra_target_in_the_place_of_the_kth(truth: Truth, tmp_path: Path):
    def displace(item: Item) -> None:
        for t, row in enumerate(item.ids):
            if len(row) > 16:  # the engine names the text's token first, and the first k are taken
                item.ids[t] = [row[-1], *row[:-2]]
                item.values[t] = [item.values[t][-1], *item.values[t][:-2]]

    found = look(write_columns(tmp_path / "a.parquet", changed(with_extra_target(truth), displace)))
    assert defects(found) == {"displaced_entries": "--repair k+1"}


def test_duplicate_ids(truth: Truth, tmp_path: Path):
    def repeat(item: Item) -> None:
        item.ids[5][-1] = item.ids[5][-2]
        item.values[5][-1] = item.values[5][-2]

    assert defects(look(write_columns(tmp_path / "a.parquet", changed(items(truth), repeat)))) == {
        "duplicate_ids": "--repair duplicates"
    }


def test_unsorted_rows_are_a_note(truth: Truth, tmp_path: Path):
    def turn(item: Item) -> None:
        item.ids, item.values = ([row[::-1] for row in rows] for rows in (item.ids, item.values))

    found = look(write_columns(tmp_path / "a.parquet", changed(items(truth), turn)))
    assert (defects(found), notes(found)) == ({}, {"unsorted"})


def test_ids_of_a_padded_vocabulary(truth: Truth, tmp_path: Path):
    path = write_columns(tmp_path / "a.parquet", items(truth))
    assert defects(look(path, tokenizer_size=512)) == {"padded_vocabulary_ids": "--vocab-size V"}
    assert notes(look(path, tokenizer_size=512, vocab_size=520)) == {"padded_vocabulary_ids"}
    assert defects(look(path, vocab_size=512)) == {"ids_outside_vocabulary": None}


@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_an_applied_temperature_is_a_hint_from_the_text(truth: Truth, tmp_path: Path, temperature: float):
    made = items(truth)
    for item, logits_NV in zip(made, truth.logits_SNV, strict=True):
        item.values = np.take_along_axis(log_softmax(logits_NV[:-1] / temperature), np.array(item.ids), axis=1).tolist()
    assert defects(look(write_columns(tmp_path / "a.parquet", made))) == {"temperature_applied": None}


def test_values_that_are_no_numbers(truth: Truth, tmp_path: Path):
    def spoil(item: Item) -> None:
        item.values[3] = [float("nan")] * len(item.values[3])

    assert "not_numbers" in defects(look(write_columns(tmp_path / "a.parquet", changed(items(truth), spoil))))


def test_missing_ranks_are_a_note(truth: Truth, tmp_path: Path):
    def lose(item: Item) -> None:
        item.values[3][-1] = -np.inf

    assert notes(look(write_columns(tmp_path / "a.parquet", changed(items(truth), lose)))) == {"missing_entries"}


def test_few_rows_leave_the_place_of_rows_open(truth: Truth, tmp_path: Path):
    found = look(write_columns(tmp_path / "a.parquet", few_rows(truth)))
    assert defects(found) == {"alignment_unclear": None}
    assert not found.is_sound


def test_a_cache_without_text(truth: Truth, tmp_path: Path):
    rows = [{"topk_ids": item.ids, "topk_logprobs": item.values} for item in items(truth)]
    assert defects(look(write_rows(tmp_path / "a.parquet", rows))) == {"no_tokens": None}


def test_columns_of_other_names_are_named(truth: Truth, tmp_path: Path):
    path = write_columns(tmp_path / "a.parquet", items(truth), tokens="text_ids", ids="cand", values="lp")
    with pytest.raises(InputError, match=r"'text_ids', 'cand', 'lp' is known .* --column ids=NAME"):
        look(path)
    assert defects(look(path, ReadConfig(columns={"tokens": "text_ids", "ids": "cand", "values": "lp"}))) == {}
    with pytest.raises(InputError, match="--column ids=nope: expected one of tokens, ids"):
        look(path, ReadConfig(columns={"ids": "nope"}))


def test_an_empty_cache(tmp_path: Path):
    found = look(write_rows(tmp_path / "a.jsonl", [{"input_ids": [1, 2], "ids": [], "logprobs": []}]))
    assert defects(found) == {"no_positions": None}


def test_sequences_without_rows_and_counts_that_do_not_fit_are_counted(truth: Truth, tmp_path: Path):
    made = items(truth)
    rows = [{"input_ids": i.input_ids, "topk_ids": i.ids, "topk_logprobs": i.values} for i in made]
    rows[1] |= {"topk_ids": None, "topk_logprobs": None}
    rows[2] |= {"topk_ids": [], "topk_logprobs": []}
    rows[3] |= {"topk_ids": made[3].ids[:30], "topk_logprobs": made[3].values[:30]}
    rows[4] |= {"topk_ids": made[4].ids + made[4].ids[:4], "topk_logprobs": made[4].values + made[4].values[:4]}
    found = look(write_rows(tmp_path / "a.parquet", rows))
    assert (defects(found), notes(found)) == (
        {},
        {"sequences_without_positions", "positions_for_a_part", "positions_outside_text"},
    )
    counts = found.counts
    assert (counts.num_sequences, counts.num_sequences_without_positions) == (8, 2)
    assert (counts.num_shorter_sequences, counts.num_uncovered) == (1, 33)
    assert (counts.num_longer_sequences, counts.num_positions_outside) == (1, 3)
    told = {finding.name: finding.sentence for finding in found.findings}
    assert told["sequences_without_positions"].startswith("2 of 8 sequences have no position")


def test_rows_that_are_wholly_minus_infinity_are_missing(truth: Truth, tmp_path: Path):
    def lose(item: Item) -> None:
        for number in (3, 4, 40):
            item.values[number] = [-np.inf] * len(item.values[number])

    found = look(write_columns(tmp_path / "a.parquet", changed(items(truth), lose)))
    assert (defects(found), notes(found)) == ({}, {"missing_positions", "missing_entries"})
    assert found.counts.num_missing_positions == 24


def test_ids_that_no_engine_gave_are_not_looked_at(truth: Truth, tmp_path: Path):
    def spoil(item: Item) -> None:
        item.ids[3][-1], item.values[3][-1] = 2**30, -np.inf  # uninitialised memory beside a rank that was not given

    path = write_columns(tmp_path / "a.parquet", changed(items(truth), spoil))
    assert defects(look(path, vocab_size=520)) == {}


def test_negated_logprobs_and_counts_of_draws_are_named(truth: Truth, tmp_path: Path):
    def negate(item: Item) -> None:
        item.values = (-np.array(item.values)).tolist()

    path = write_columns(tmp_path / "a.parquet", changed(items(truth), negate))
    assert defects(look(path)) == {"negated_logprobs": "--values nll"}
    assert defects(look(path, ReadConfig(values="nll"))) == {}

    rng = np.random.default_rng(0)
    made = items(truth)
    for item, logprobs_NV in zip(made, truth.logprobs_SNV, strict=True):
        draws = [rng.choice(520, 50, p=np.exp(row) / np.exp(row).sum()) for row in logprobs_NV[:-1]]
        found = [np.unique(drawn, return_counts=True) for drawn in draws]
        item.ids = [ids[np.argsort(-counts, kind="stable")].tolist() for ids, counts in found]
        item.values = [np.log(np.sort(counts)[::-1] / 50).tolist() for _, counts in found]
    spoken = look(write_columns(tmp_path / "b.parquet", made))
    assert set(defects(spoken)) == {"sampled_counts"}
    assert "counts of 50 random draws" in spoken.findings[0].sentence


def test_ids_with_much_probability_are_no_padding(truth: Truth, tmp_path: Path):
    def move(item: Item) -> None:
        item.ids = (np.array(item.ids) + 600).tolist()

    assert "ids_outside_vocabulary" in defects(
        look(write_columns(tmp_path / "a.parquet", changed(items(truth), move)), tokenizer_size=512)
    )
