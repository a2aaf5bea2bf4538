"""A sound cache becomes one of ours that verifies and says the same; an unsound one is refused, or mended where asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_cases import Item, K, Truth, changed, few_rows, items, log_softmax, with_extra_target, write_columns, write_rows

import kdcache
from kdcache.errors import InputError, MismatchError
from kdcache.foreign.base import ReadConfig
from kdcache.foreign.convert import Conversion, ConvertConfig, convert
from kdcache.foreign.judge.doctor import ExamineConfig
from kdcache.format.manifest import TokenizerIdentity
from kdcache.format.record import NO_TARGET
from kdcache.store.verify import verify_cache

TOKENIZER = TokenizerIdentity(name="tiny", fingerprint="f" * 64, vocab_size=512)
OPTIONS = ConvertConfig(tokenizer=TOKENIZER, codec="raw", examine=ExamineConfig(vocab_size=520, tokenizer_size=512))
FORMATS = Path(__file__).parent / "data"


def converted(source: Path, target: Path, options: ConvertConfig = OPTIONS, **changes: Any) -> Conversion:
    made = convert(source, target, replace(options, **changes))
    report = verify_cache(target)
    assert report.problems == []
    assert report.manifest.is_complete
    return made


def refused(source: Path, target: Path, options: ConvertConfig = OPTIONS, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        convert(source, target, replace(options, **changes))
    assert not target.exists()
    return str(caught.value)


def assert_is_truth(cache: Path, truth: Truth, *, atol: float = 1e-6, k: int = K) -> None:
    """Every record holds the teacher's top k at every position that it claims."""
    with kdcache.open(cache) as reader:
        assert len(reader) == len(truth.ids_SN)
        for s, record in enumerate(reader[i] for i in range(len(reader))):
            assert record.sequence.input_ids_N.tolist() == truth.ids_SN[s].tolist()
            ids_PK, logprobs_PK = record.distributions.padded()
            logprobs_PV = truth.logprobs_SNV[s][record.sequence.positions_P]
            top_PK = np.argsort(-logprobs_PV, axis=1, kind="stable")[:, : ids_PK.shape[1]]
            kept_PK = ids_PK >= 0
            assert set(kept_PK.sum(axis=1).tolist()) <= {k - 1, k}
            assert (ids_PK == top_PK)[kept_PK].all()
            true_PK = np.take_along_axis(logprobs_PV, top_PK, axis=1)
            np.testing.assert_allclose(logprobs_PK[kept_PK], true_PK[kept_PK], atol=atol)
            tail_P = 1 - np.where(kept_PK, np.exp(true_PK), 0).sum(axis=1)
            np.testing.assert_allclose(record.distributions.tail_mass_P, tail_P, atol=1e-5 + 10 * atol)


@pytest.mark.parametrize("ending", ["parquet", "arrow", "jsonl"])
def test_a_sound_cache_says_the_same_afterwards(truth: Truth, tmp_path: Path, ending: str):
    made = converted(write_columns(tmp_path / f"a.{ending}", items(truth)), tmp_path / "cache")
    assert_is_truth(tmp_path / "cache", truth)
    assert (made.account.num_records, made.account.num_positions) == (8, 8 * 63)
    assert +made.account.left_out == {}
    identity = made.manifest.identity
    assert (identity.selection.params, identity.teacher.engine, identity.teacher.vocab_size) == ({"k": K}, "columns", 520)


def test_the_default_codec_keeps_it_within_its_bound(truth: Truth, tmp_path: Path):
    converted(write_columns(tmp_path / "a.parquet", items(truth)), tmp_path / "cache", codec="packed")
    assert_is_truth(tmp_path / "cache", truth, atol=4e-3)


def test_a_converted_cache_is_found_sound_and_feeds_a_loader(truth: Truth, tmp_path: Path):
    from kdcache.config.loader import LoaderConfig
    from kdcache.foreign.judge.own import examine_own

    converted(write_columns(tmp_path / "a.parquet", items(truth)), tmp_path / "cache")
    found = examine_own(tmp_path / "cache", ExamineConfig())
    assert found.is_sound
    assert found.alignment is not None
    assert found.alignment.verdict == "aligned"
    with kdcache.open(tmp_path / "cache") as reader:
        batch = next(iter(kdcache.Loader(reader, LoaderConfig(batch_rows=2, seq_len=64))))
    assert batch is not None


@pytest.mark.parametrize("shift", [-1, 1])
def test_shifted_positions_are_moved_when_asked_for_by_as_much_as_they_are_off(truth: Truth, tmp_path: Path, shift: int):
    def move(item: Item) -> None:
        item.ids, item.values = (np.roll(rows, -shift, axis=0).tolist() for rows in (item.ids, item.values))

    path = write_columns(tmp_path / "a.parquet", changed(items(truth), move))
    told = refused(path, tmp_path / "no")
    assert "shifted_positions" in told
    assert f"(repaired by --shift {shift:+d})" in told
    refused(path, tmp_path / "no", shift=-shift)
    made = converted(path, tmp_path / "cache", shift=shift)
    assert made.account.left_out["positions outside their text"] == (8 if shift == -1 else 0)
    # What np.roll brought round from the other end is not a row of this text: it is at one end, and is passed over here.
    with kdcache.open(tmp_path / "cache") as reader:
        record = reader[0]
        ids_PK, _ = record.distributions.padded()
        inner = [p for p, t in enumerate(record.sequence.positions_P) if 1 <= t <= 61]
        for p in inner:
            t = record.sequence.positions_P[p]
            assert ids_PK[p].tolist() == np.argsort(-truth.logprobs_SNV[0, t], kind="stable")[:K].tolist()


def test_rows_that_are_aligned_are_not_moved(truth: Truth, tmp_path: Path):
    path = write_columns(tmp_path / "a.parquet", items(truth))
    assert "--shift -1 would move them off" in refused(path, tmp_path / "no", shift=-1)


def test_an_engine_s_rows_are_converted_with_a_shift(truth: Truth, tmp_path: Path):
    def as_the_engine_gives_it(item: Item) -> None:
        item.ids, item.values = [[], *item.ids], [[], *item.values]

    path = write_columns(tmp_path / "a.jsonl", changed(items(truth), as_the_engine_gives_it))
    made = converted(path, tmp_path / "cache", shift=-1)
    assert made.account.left_out["empty positions"] == 8
    assert_is_truth(tmp_path / "cache", truth)


def test_the_extra_target_of_k_plus_1_entries_becomes_the_target_s_logprob(truth: Truth, tmp_path: Path):
    path = write_columns(tmp_path / "a.parquet", with_extra_target(truth))
    assert "k_plus_1_entries" in refused(path, tmp_path / "no")
    made = converted(path, tmp_path / "cache", repairs=frozenset({"k+1"}))
    assert made.account.num_unknown_targets == 0
    assert made.manifest.identity.selection.params == {"k": K}
    assert_is_truth(tmp_path / "cache", truth)
    report = verify_cache(tmp_path / "cache")
    targets = np.take_along_axis(truth.logprobs_SNV[:, :-1], truth.ids_SN[:, 1:, None], axis=2)
    assert report.cached_nll == pytest.approx(-targets.mean(), abs=1e-5)


def test_the_extra_target_in_the_place_of_the_kth_is_taken_out(truth: Truth, tmp_path: Path):
    def displace(item: Item) -> None:
        for t, row in enumerate(item.ids):
            if len(row) > K:
                item.ids[t], item.values[t] = [row[-1], *row[:-2]], [item.values[t][-1], *item.values[t][:-2]]

    path = write_columns(tmp_path / "a.parquet", changed(with_extra_target(truth), displace))
    made = converted(path, tmp_path / "cache", repairs=frozenset({"k+1"}))
    assert made.account.repaired["k+1"] > 50
    assert_is_truth(tmp_path / "cache", truth)


def test_targets_outside_the_support_are_unknown_and_in_no_nll(truth: Truth, tmp_path: Path):
    made = converted(write_columns(tmp_path / "a.parquet", items(truth)), tmp_path / "cache")
    outside = 0
    with kdcache.open(tmp_path / "cache") as reader:
        for record in (reader[i] for i in range(len(reader))):
            targets_P = record.sequence.target_ids_P
            logprobs_P = record.distributions.target_logprobs(targets_P)
            outside += int(np.isneginf(logprobs_P).sum())
            assert not np.isnan(logprobs_P[targets_P != NO_TARGET]).any()
    assert outside == made.account.num_unknown_targets == made.manifest.total("num_impossible_targets") > 100


def test_probabilities_and_called_logits_are_converted_when_said_what_they_are(truth: Truth, tmp_path: Path):
    def exponentiate(item: Item) -> None:
        item.values = np.exp(item.values).tolist()

    path = write_columns(tmp_path / "a.parquet", changed(items(truth), exponentiate))
    assert "(repaired by --values probs)" in refused(path, tmp_path / "no")
    said = replace(OPTIONS, examine=replace(OPTIONS.examine, read=ReadConfig(values="probs")))
    converted(path, tmp_path / "cache", said)
    assert_is_truth(tmp_path / "cache", truth)


def test_logits_with_their_normaliser_become_logprobs(truth: Truth, tmp_path: Path):
    rows = []
    for item, logits_NV in zip(items(truth), truth.logits_SNV, strict=True):
        logits = np.take_along_axis(logits_NV[:-1], np.array(item.ids), axis=1)
        log_z = np.log(np.exp(logits_NV[:-1]).sum(axis=1))
        rows.append({"input_ids": item.input_ids, "ids": item.ids, "logits": logits.tolist(), "lse": log_z.tolist()})
    converted(write_rows(tmp_path / "a.parquet", rows), tmp_path / "cache")
    assert_is_truth(tmp_path / "cache", truth)


def test_duplicates_are_kept_once_when_asked(truth: Truth, tmp_path: Path):
    def repeat(item: Item) -> None:
        item.ids[5][-1], item.values[5][-1] = item.ids[5][-2], item.values[5][-2]

    path = write_columns(tmp_path / "a.parquet", changed(items(truth), repeat))
    refused(path, tmp_path / "no")
    made = converted(path, tmp_path / "cache", repairs=frozenset({"duplicates"}))
    assert made.account.repaired["duplicates"] == 8
    assert_is_truth(tmp_path / "cache", truth)


def test_a_mask_decides_which_positions_are_supervised(truth: Truth, tmp_path: Path):
    rows = [
        {"input_ids": i.input_ids, "topk_ids": i.ids, "topk_logprobs": i.values, "labels": [-100] * 10 + i.input_ids[10:]}
        for i in items(truth)
    ]
    made = converted(write_rows(tmp_path / "a.parquet", rows), tmp_path / "cache")
    assert made.account.left_out["positions that the file's mask leaves out"] == 8 * 9
    with kdcache.open(tmp_path / "cache") as reader:
        # Token 10 is the first that is learnt: position 9 predicts it.
        assert reader[0].sequence.positions_P.tolist() == list(range(9, 63))


def test_what_cannot_be_mended_is_refused_with_every_reason(truth: Truth, tmp_path: Path):
    def spoil(item: Item) -> None:
        item.values = log_softmax(np.array(item.values)).tolist()
        item.ids[4][-1], item.values[4][-1] = item.ids[4][-2], item.values[4][-2]

    told = refused(write_columns(tmp_path / "a.parquet", changed(items(truth), spoil)), tmp_path / "no")
    assert "renormalised" in told
    assert "duplicate_ids" in told


def test_an_unclear_place_is_taken_on_trust_by_name_only(truth: Truth, tmp_path: Path):
    path = write_columns(tmp_path / "a.parquet", few_rows(truth))
    assert "(--accept alignment_unclear takes it on trust)" in refused(path, tmp_path / "no")
    converted(path, tmp_path / "cache", accept=frozenset({"alignment_unclear"}))


def test_ids_outside_the_vocabulary_and_an_unknown_width_are_refused(truth: Truth, tmp_path: Path):
    path = write_columns(tmp_path / "a.parquet", items(truth))
    narrow = replace(OPTIONS, examine=ExamineConfig(vocab_size=512, tokenizer_size=512))
    assert "ids_outside_vocabulary" in refused(path, tmp_path / "no", narrow)
    unknown = replace(OPTIONS, examine=ExamineConfig(tokenizer_size=512))
    assert "(repaired by --vocab-size V)" in refused(path, tmp_path / "no", unknown)


@pytest.mark.parametrize("name", ["budget", "published", "residuals", "exact", "legacy"])
def test_distillkit_caches_are_converted(tmp_path: Path, name: str):
    made = converted(FORMATS / "distillkit" / name, tmp_path / "cache", ConvertConfig(tokenizer=TOKENIZER, codec="raw"))
    assert (made.account.num_records, made.account.num_positions) == (3, 48)


def test_of_broken_tails_the_exact_entries_are_kept_when_asked(tmp_path: Path):
    options = ConvertConfig(tokenizer=TOKENIZER, codec="raw")
    assert "(repaired by --repair tails)" in refused(FORMATS / "distillkit" / "recommended", tmp_path / "no", options)
    made = converted(FORMATS / "distillkit" / "recommended", tmp_path / "cache", options, repairs=frozenset({"tails"}))
    assert made.manifest.identity.selection.params == {"k": 16}
    zipf = -1.4 * np.log(np.arange(1, 513.0))
    zipf -= np.log(np.exp(zipf).sum())
    with kdcache.open(tmp_path / "cache") as reader:
        np.testing.assert_allclose(reader[1].distributions.logprobs_E[16:32], zipf[:16], atol=0.02)  # bfloat16
        assert reader[1].distributions.tail_mass_P[1] == pytest.approx(1 - np.exp(zipf[:16]).sum(), abs=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nemo_aligner_caches_are_converted(tmp_path: Path, dtype: str):
    made = converted(
        FORMATS / "nemo_aligner" / f"{dtype}.jsonl", tmp_path / "cache", ConvertConfig(tokenizer=TOKENIZER, codec="raw")
    )
    assert made.account.num_positions == 3 * 13


def test_axolotl_columns_are_converted_with_the_shift_that_its_trainer_lacks(tmp_path: Path):
    options = ConvertConfig(tokenizer=TOKENIZER, codec="raw")
    assert "--shift -1" in refused(FORMATS / "axolotl" / "v2.jsonl", tmp_path / "no", options)
    made = converted(FORMATS / "axolotl" / "v2.jsonl", tmp_path / "cache", options, shift=-1)
    assert made.account.num_positions == 48
    assert "renormalised" in refused(FORMATS / "axolotl" / "prepared.parquet", tmp_path / "no", options, shift=-1)


def test_megatron_tars_and_our_own_caches_are_refused(truth: Truth, tmp_path: Path):
    assert "no_tokens" in refused(FORMATS / "megatron" / "top_k", tmp_path / "no")
    converted(write_columns(tmp_path / "a.parquet", items(truth)), tmp_path / "cache")
    assert "a cache of kdcache already" in refused(tmp_path / "cache", tmp_path / "no")


def test_the_same_call_again_finds_it_done_and_another_source_is_refused(truth: Truth, tmp_path: Path):
    path = write_columns(tmp_path / "a.parquet", items(truth))
    first = converted(path, tmp_path / "cache")
    again = converted(path, tmp_path / "cache")
    assert again.manifest.digest == first.manifest.digest
    other = write_columns(tmp_path / "b.parquet", items(truth)[:4])
    with pytest.raises(MismatchError, match="holds another capture"):
        convert(other, tmp_path / "cache", OPTIONS)


def test_rows_of_minus_infinity_are_left_out_and_not_learnt_as_a_tail(truth: Truth, tmp_path: Path):
    def lose(item: Item) -> None:
        for number in (3, 4, 40):
            item.values[number] = [-np.inf] * K

    made = converted(write_columns(tmp_path / "a.parquet", changed(items(truth), lose)), tmp_path / "cache")
    assert +made.account.left_out == {"empty positions": 24}
    assert made.account.num_positions == 8 * 60
    assert_is_truth(tmp_path / "cache", truth)
    with kdcache.open(tmp_path / "cache") as reader:
        positions = reader[0].sequence.positions_P.tolist()
        assert not {3, 4, 40} & set(positions)
        assert float(reader[0].distributions.tail_mass_P.max()) < 0.99


def test_how_the_alignment_was_proven_is_recorded(truth: Truth, tmp_path: Path):
    by_text = converted(write_columns(tmp_path / "a.parquet", items(truth)), tmp_path / "cache").manifest.config["notes"]
    assert by_text["alignment"]["proven_by"] == "text"
    assert by_text["alignment"]["hits_found"] == pytest.approx(by_text["alignment"]["hits_claimed"], abs=0.05)
    assert by_text["alignment"]["other_shift"] < -6 < -3 < by_text["alignment"]["worst_sequence"]
    few = write_columns(tmp_path / "b.parquet", few_rows(truth))
    on_trust = converted(few, tmp_path / "few", accept=frozenset({"alignment_unclear"})).manifest.config["notes"]
    assert on_trust["alignment"]["proven_by"] is None
    assert "too few positions" in on_trust["alignment"]["reason"]


def test_sequences_without_rows_are_left_out_and_said(truth: Truth, tmp_path: Path):
    rows = [{"input_ids": i.input_ids, "topk_ids": i.ids, "topk_logprobs": i.values} for i in items(truth)]
    rows[1] |= {"topk_ids": None, "topk_logprobs": None}
    made = converted(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "cache")
    assert (made.account.num_records, made.account.left_out["sequences without a position"]) == (7, 1)
