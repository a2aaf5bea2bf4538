"""Every claim of a manifest about a shard is recomputed by `verify`: a forged one is named, an honest one never is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile
import msgspec
import numpy as np
import pyarrow as pa
import pytest
from cache_making import make_cache, make_identity, make_manifest, make_record
from fuzzing.bases import BASES, Base

from kdcache.format.manifest import FeatureInfo
from kdcache.store.chain import newest_manifest
from kdcache.store.verify import verify_cache
from kdcache.store.writing.writer import CacheWriter

FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "num_tokens": lambda s: s["num_tokens"] + 1,
    "num_positions": lambda s: s["num_positions"] - 1,
    "num_entries": lambda s: s["num_entries"] + 5,
    "num_targets": lambda s: s["num_targets"] + 1,
    "num_impossible_targets": lambda s: 1,
    "num_exact_entries": lambda s: 3,
    "target_logprob_sum": lambda s: s["target_logprob_sum"] * 1.1,
    "tail_mass_sum": lambda s: s["tail_mass_sum"] * 1.1,
    "entropy_floor_sum": lambda s: s["entropy_floor_sum"] * 0.9,
    "entropy_ceiling_sum": lambda s: s["entropy_ceiling_sum"] * 1.1,
    "num_finished": lambda s: {"stop": 1},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("claims")
    return {name: base.write(folder / name) for name, base in BASES.items()}


def copy_of(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "cache"))


def forge(cache: Path, change: Callable[[list[dict[str, Any]]], object]) -> list[str]:
    hostile.edit_manifest(cache, lambda fields: change(fields["shards"]) and None)
    return verify_cache(cache).problems


@pytest.mark.parametrize("name", BASES)
def test_honest_claims_are_borne_out_whatever_the_codec_and_selection(sound, name):
    assert verify_cache(sound[name]).problems == []


@pytest.mark.parametrize("codec", ["raw top_k", "packed top_k"])
@pytest.mark.parametrize("claim", FORGED)
def test_a_forged_claim_is_named(tmp_path, sound, codec, claim):
    problems = forge(copy_of(sound[codec], tmp_path), lambda shards: shards[0].update({claim: FORGED[claim](shards[0])}))
    words = {"target_logprob_sum": "logprobs do not belong to their text", "num_finished": "answers ended by"}
    words["num_impossible_targets"] = "have probability 0"
    assert words.get(claim, claim) in problems[0]


@pytest.mark.parametrize("name", ["packed threshold", "packed sampled", "quantized 4 top_k_sampled", "archive 6 threshold"])
def test_numbers_of_exact_entries_are_counted(tmp_path, sound, name):
    problems = forge(copy_of(sound[name], tmp_path), lambda shards: shards[0].update(num_exact_entries=1))
    assert any("num_exact_entries" in problem for problem in problems)


@pytest.mark.parametrize("claim", ["target_logprob_sum", "tail_mass_sum", "entropy_ceiling_sum"])
def test_errors_that_cancel_between_shards_are_found_in_both(tmp_path, sound, claim):
    def cancel(shards: list[dict[str, Any]]) -> None:
        shards[0][claim] += 5.0
        shards[1][claim] -= 5.0

    problems = forge(copy_of(sound["packed top_k"], tmp_path), cancel)
    assert len(problems) == 2


def test_the_bytes_of_each_column_are_counted(tmp_path, sound):
    cache = copy_of(sound["packed everything"], tmp_path)
    problems = forge(cache, lambda shards: shards[0]["column_bytes"].update(logprobs=7))
    assert "column 'logprobs' has" in problems[0]
    assert "the manifest says 7" in problems[0]


def test_bytes_of_a_column_that_is_not_there_are_found(tmp_path, sound):
    cache = copy_of(sound["packed everything"], tmp_path)
    problems = forge(cache, lambda shards: shards[0]["column_bytes"].update(made_up=7))
    assert "column 'made_up' has 0 bytes, the manifest says 7" in problems[0]


def test_a_key_that_is_not_of_its_tokens_is_found_in_step_with_the_index(tmp_path):
    record = make_record(1)
    forged = replace(record, sequence=replace(record.sequence, key=b"forged key 16 by"))
    problems = verify_cache(make_cache(tmp_path, units=[[forged]])).problems
    assert "sequence 0: key 666f72676564206b6579203136206279 is not that of the sequence's tokens" in problems[0]


def test_keys_with_the_template_that_the_identity_names_are_sound_and_others_are_not(tmp_path):
    writer = CacheWriter.open(str(tmp_path), make_manifest(1, _with_template("t" * 64)))
    writer.write_unit(0, [make_record(1)])
    writer.fold()
    assert "is not that of the sequence's tokens, mask and chat template" in verify_cache(tmp_path).problems[0]


def _with_template(fingerprint: str):
    identity = make_identity()
    tokenizer = msgspec.structs.replace(identity.tokenizer, chat_template_fingerprint=fingerprint)
    return msgspec.structs.replace(identity, tokenizer=tokenizer)


@pytest.mark.parametrize("base", [BASES["raw top_k"], BASES["packed top_k"]], ids=["raw", "packed"])
def test_masses_that_do_not_sum_to_1_are_found(tmp_path, base: Base):
    record = base.record(0)
    d = record.distributions
    halved = replace(record, distributions=replace(d, tail_mass_P=(d.tail_mass_P * 0.5 + 0.3).astype(np.float32)))
    writer = CacheWriter.open(str(tmp_path), base.first_manifest(1))
    writer.write_unit(0, [halved])
    writer.fold()
    assert "exact entries and tail_mass sum to" in verify_cache(tmp_path).problems[0]


@pytest.mark.parametrize(("dtype", "column"), [("float16", "feature:last"), ("int8", "feature:last:scale")])
def test_features_that_are_not_finite_are_found(tmp_path, dtype, column):
    feature = FeatureInfo(name="last", layer=1, size=2, dtype=dtype)
    writer = CacheWriter.open(str(tmp_path), make_manifest(1, msgspec.structs.replace(make_identity(), features=(feature,))))
    record = make_record(0)
    values = np.ones((record.distributions.num_positions, 2), np.float32)
    writer.write_unit(0, [replace(record, distributions=replace(record.distributions, features={"last": values}))])
    writer.fold()

    def spoil(columns: dict[str, Any]) -> None:
        stored = np.array(columns[column].values)
        stored[0] = np.nan
        columns[column] = pa.ListArray.from_arrays(columns[column].offsets, pa.array(stored), type=columns[column].type)

    hostile.edit_rows(tmp_path, spoil)
    assert "feature 'last' is not finite" in verify_cache(tmp_path).problems[0]


def test_an_entropy_above_that_of_the_even_distribution_is_found(tmp_path):
    base = BASES["raw top_k"]
    base = replace(base, selection=msgspec.structs.replace(base.selection, entropy=True))
    record = base.record(0)
    entropy_P = np.full(record.distributions.num_positions, 5.0, np.float32)
    writer = CacheWriter.open(str(tmp_path), base.first_manifest(1))
    writer.write_unit(0, [replace(record, distributions=replace(record.distributions, entropy_P=entropy_P))])
    writer.fold()
    assert "an entropy of 5.0000 nats is more than log(vocab_size)" in verify_cache(tmp_path).problems[0]


def test_a_target_below_float16_may_be_claimed_as_less_but_not_as_more(tmp_path):
    record = make_record(5, k=2)
    outside = record.distributions.outside_target_logprobs.copy()
    outside[0] = -1e5
    record = replace(record, distributions=replace(record.distributions, outside_target_logprobs=outside))
    cache = make_cache(tmp_path, "packed", units=[[record]])
    assert newest_manifest(cache).shards[0].num_impossible_targets == 0
    assert verify_cache(cache).problems == []
    problems = forge(cache, lambda shards: shards[0].update(target_logprob_sum=-30.0))
    assert "logprobs do not belong to their text" in problems[0]
