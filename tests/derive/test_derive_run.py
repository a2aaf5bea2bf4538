"""Whole derivations: what is written, that it is sound, that a kill does no harm, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_making import assert_same_record, content_of, make_cache, make_record, make_unit
from derive_cases import SELECTIONS, selected_cache

import kdcache
from kdcache.config.loader import LoaderConfig
from kdcache.derive.choose import Select
from kdcache.derive.config import DeriveConfig
from kdcache.derive.reduction.reduce import Reduction
from kdcache.derive.run import derive
from kdcache.errors import CacheNotFoundError, ConfigError, CorruptCacheError, InputError, MismatchError, StorageError
from kdcache.format import paths
from kdcache.format.manifest import LineageInfo, manifest_from_json, manifest_to_json
from kdcache.format.record import SequenceRecord
from kdcache.store.files import fs
from kdcache.store.files.location import children, locate
from kdcache.store.reader import open_reader
from kdcache.store.verify import verify_cache


def records_of(path: Path) -> list[SequenceRecord]:
    """All records of a cache that is complete and sound."""
    report = verify_cache(path)
    assert report.problems == []
    assert report.manifest.is_complete
    with open_reader(path) as reader:
        return [reader[number] for number in range(len(reader))]


def test_sources_follow_one_another_in_other_units_record_batches_and_codecs(tmp_path):
    a, b = make_cache(tmp_path / "a"), make_cache(tmp_path / "b", units=[make_unit(u) for u in (7, 8)])
    derived = derive([a, b], tmp_path / "ab", DeriveConfig(unit_sequences=4, codec="packed", record_batch_bytes=10**6))
    expected = records_of(a) + records_of(b)
    found = records_of(tmp_path / "ab")
    assert derived.num_read == len(found) == len(expected) == 15
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_record(ours, theirs, is_exact=False)
    assert [shard.num_sequences for shard in derived.manifest.shards] == [4, 4, 4, 3]
    with open_reader(tmp_path / "ab") as reader:
        assert reader.num_record_batches(0) == 1
    # Written back as raw, the numbers keep what float16 made of them.
    derive([tmp_path / "ab"], tmp_path / "again", DeriveConfig(codec="raw"))
    for ours, theirs in zip(records_of(tmp_path / "again"), found, strict=True):
        assert_same_record(ours, theirs)


@pytest.mark.parametrize("codec_id", ["raw", "packed", "quantized", "archive"])
@pytest.mark.parametrize("kind", SELECTIONS)
def test_every_selection_is_reduced_and_filtered_in_every_codec(tmp_path, kind, codec_id):
    reductions = {"threshold": Reduction(tau=0.1), "sampled": Reduction(draws=9), "top_k_sampled": Reduction(top_k=1, draws=9)}
    options = DeriveConfig(
        where="mean(target_logprob) > -6 and source ~ 'wiki/*'", where_position="target_logprob > -7",
        reduce=reductions.get(kind, Reduction(top_k=2)),
    )  # fmt: skip
    source = selected_cache(tmp_path / "a", kind, codec_id=codec_id)
    derived = derive([source], tmp_path / "out", options)
    found = records_of(tmp_path / "out")
    assert 0 < len(found) < derived.num_read
    assert all(record.sequence.source.startswith("wiki/") for record in found)
    assert all((record.distributions.target_logprobs(record.sequence.target_ids_P) > -7).all() for record in found)
    before, after = (sum(r.distributions.num_entries for r in records_of(path)) for path in (source, tmp_path / "out"))
    assert after < before


@pytest.mark.parametrize("codec_id", ["raw", "packed", "quantized", "archive"])
@pytest.mark.parametrize("kinds", [("top_k", "top_p_k"), ("threshold", "sampled")])
def test_two_teachers_are_mixed_in_every_codec_and_reduced_in_the_same_pass(tmp_path, kinds, codec_id):
    sources = [selected_cache(tmp_path / str(i), kind, seed=100 * i) for i, kind in enumerate(kinds)]
    mix = DeriveConfig(mix=(0.25, 0.75), codec=codec_id)
    derive(sources, tmp_path / "mixed", mix)
    reduction = Reduction(top_k=2) if kinds[0] == "top_k" else Reduction(draws=50)
    derive(sources, tmp_path / "less", dataclasses.replace(mix, reduce=reduction))
    whole, less = records_of(tmp_path / "mixed"), records_of(tmp_path / "less")
    assert len(whole) == 8
    assert sum(r.distributions.num_entries for r in less) < sum(r.distributions.num_entries for r in whole)


def test_a_mixture_leaves_out_what_not_all_have_only_where_it_is_told_to(tmp_path):
    a, b = selected_cache(tmp_path / "a", "top_k"), selected_cache(tmp_path / "b", "top_k", num_units=1)
    with pytest.raises(InputError, match="4 sequences are in all of the caches, which hold 'a' 8, 'b' 4"):
        derive([a, b], tmp_path / "mixed", DeriveConfig(mix=(0.5, 0.5)))
    derived = derive([a, b], tmp_path / "mixed", DeriveConfig(mix=(0.5, 0.5), missing="skip"))
    assert (derived.num_missing, len(records_of(tmp_path / "mixed"))) == (4, 4)


def test_a_sample_and_a_choice_are_of_whole_records(tmp_path):
    source = make_cache(tmp_path / "a", num_units=4)
    derive([source], tmp_path / "half", DeriveConfig(select=Select(ranges=((0, 8),)), fraction=0.5, seed=3))
    all_of_it, half = records_of(source), records_of(tmp_path / "half")
    assert len(half) == 4
    by_key = {record.sequence.key: record for record in all_of_it[:8]}
    for record in half:
        assert_same_record(record, by_key[record.sequence.key])


def test_a_derived_cache_names_its_sources_and_theirs(tmp_path):
    a = selected_cache(tmp_path / "a", "threshold")
    first = derive([a], tmp_path / "b", DeriveConfig(reduce=Reduction(tau=0.1), seed=4)).manifest
    second = derive([tmp_path / "b"], tmp_path / "c", DeriveConfig(fraction=0.5)).manifest
    lineage = second.lineage
    assert isinstance(lineage, LineageInfo)
    assert [(op.name, op.params) for op in lineage.operations] == [("sample", {"fraction": 0.5, "seed": 0})]
    (parent,) = lineage.parents
    assert (parent.name, parent.snapshot, parent.teacher) == ("b", first.digest, first.identity.teacher)
    assert isinstance(parent.lineage, LineageInfo)
    assert parent.lineage.operations[0].params == {"tau": 0.1, "seed": 4}
    assert parent.lineage.parents[0].selection == SELECTIONS["threshold"]
    assert manifest_from_json(manifest_to_json(second), where="here") == second
    assert "lineage" not in json.loads(manifest_to_json(open_reader(a).manifest))


def test_equal_derivations_give_equal_bytes_and_a_new_input_fingerprint_where_something_is_left_out(tmp_path):
    a = selected_cache(tmp_path / "a", "threshold")
    options = DeriveConfig(reduce=Reduction(tau=0.1), unit_sequences=3)
    for name in ("one", "two"):
        derive([a], tmp_path / name, options)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    prints = [open_reader(a).manifest.identity.input_fingerprint]
    for name, more in {"one": {}, "three": {"fraction": 0.5}, "four": {"where": "num_tokens > 3"}}.items():
        prints.append(derive([a], tmp_path / name, dataclasses.replace(options, **more)).manifest.identity.input_fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_loader_reads_what_was_derived(tmp_path):
    a = make_cache(tmp_path / "a", units=[[make_record(i) for i in range(6)]])
    derive([a], tmp_path / "b", DeriveConfig(where_position="position > 4", reduce=Reduction(top_k=2)))
    loader = kdcache.Loader(tmp_path / "b", LoaderConfig(seq_len=24, batch_rows=1))
    batches = list(loader)
    assert sum(batch.num_positions for batch in batches) == 6 * 6


def test_a_derivation_that_is_killed_shows_nothing_and_goes_on_where_it_was(tmp_path):
    probe = Path(__file__).with_name("derive_crash_probe.py")
    done = subprocess.run([sys.executable, probe, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {"kills": 5, "failures": []}


def test_units_that_are_there_are_not_read_again(tmp_path):
    a = make_cache(tmp_path / "a", num_units=2)
    derive([a], tmp_path / "b", DeriveConfig(unit_sequences=2))
    before = content_of(tmp_path / "b")
    for shard in (a / "data").iterdir():
        shard.unlink()
    derive([a], tmp_path / "b", DeriveConfig(unit_sequences=2))
    assert content_of(tmp_path / "b") == before


def test_what_cannot_be_derived_is_refused_before_anything_is_written(tmp_path):
    a = make_cache(tmp_path / "a")
    refused: list[tuple[DeriveConfig, type[Exception], str]] = [
        (DeriveConfig(where="max(entropy) > 1"), ConfigError, "the entropy is not stored"),
        (DeriveConfig(where="nonsense > 1"), ConfigError, "not understood"),
        (DeriveConfig(reduce=Reduction(tau=0.1)), ConfigError, "tau is not possible for selection 'top_k'"),
        (DeriveConfig(codec="zip"), ConfigError, "codec 'zip' is unknown"),
        (DeriveConfig(bits=5), ConfigError, "codec: codec 'raw' does not take"),
        (DeriveConfig(unit_sequences=0), ConfigError, "unit_sequences is 0"),
        (DeriveConfig(fraction=0.001), InputError, "no sequence of 'a' is taken"),
        (DeriveConfig(mix=(1.0,)), ConfigError, "1 cache was given"),
    ]
    for options, error, sentence in refused:
        with pytest.raises(error, match=sentence):
            derive([a], tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="is both a source and the destination"):
        derive([a], tmp_path / "x" / ".." / "a")
    with pytest.raises(CacheNotFoundError):
        derive([tmp_path / "none"], tmp_path / "out")
    with pytest.raises(ConfigError, match="no source was given"):
        derive([], tmp_path / "out")


def test_a_source_that_is_not_complete_is_taken_only_where_that_is_accepted(tmp_path):
    from cache_making import make_manifest

    from kdcache.store.writing.writer import CacheWriter

    writer = CacheWriter.open(tmp_path / "a", make_manifest(2))
    writer.write_unit(0, make_unit(0))
    writer.fold()
    with pytest.raises(InputError, match="only 1 of 2 units are there"):
        derive([tmp_path / "a"], tmp_path / "out")
    derive([tmp_path / "a"], tmp_path / "out", DeriveConfig(accept=frozenset({"incomplete"})))
    assert len(records_of(tmp_path / "out")) == 3


def test_sources_and_target_may_be_in_an_object_store(tmp_path):
    pytest.importorskip("fsspec")
    source, there = make_cache(tmp_path / "a"), f"memory://{tmp_path.name}/a"
    derive([source], there)
    derive([there], tmp_path / "back")
    for ours, theirs in zip(records_of(tmp_path / "back"), records_of(source), strict=True):
        assert_same_record(ours, theirs)
    with pytest.raises(ConfigError, match="is both a source and the destination"):
        derive([there], there)


def test_a_target_that_was_made_otherwise_is_named_with_how(tmp_path):
    a, b = make_cache(tmp_path / "a"), make_cache(tmp_path / "b")
    derive([a], tmp_path / "out", DeriveConfig(fraction=0.5))
    with pytest.raises(MismatchError, match=r"made by sample \(fraction=0.5, seed=0\) of a .*asked for is repack of a"):
        derive([a], tmp_path / "out")
    with pytest.raises(MismatchError, match="holds another cache, captured from a teacher"):
        derive([a], b)
    with pytest.raises(MismatchError, match="plan"):
        derive([a], tmp_path / "out", DeriveConfig(fraction=0.5, unit_sequences=1))


def test_a_sequence_whose_last_position_goes_is_left_out(tmp_path):
    a = make_cache(tmp_path / "a", units=[[make_record(0), make_record(1, num_tokens=5)]])
    derive([a], tmp_path / "b", DeriveConfig(where_position="position >= 4"))
    assert [r.sequence.source for r in records_of(tmp_path / "b")] == ["made#0"]
    assert np.array_equal(records_of(tmp_path / "b")[0].sequence.positions_P, np.arange(4, 11))


@pytest.mark.parametrize("there", ["nothing", "an empty folder"])
def test_a_derivation_that_fails_leaves_nothing_behind(tmp_path, there):
    source, target = make_cache(tmp_path / "a"), tmp_path / "not" / "there" / "out"
    if there == "an empty folder":
        target.mkdir(parents=True)
    shards = sorted((source / "data").iterdir())
    shards[1].write_bytes(shards[1].read_bytes()[:-200])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CorruptCacheError, match=shards[1].name):  # after the first unit was published
        derive([source], target, DeriveConfig(unit_sequences=1))
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(CorruptCacheError):
        derive([source], f"memory://{tmp_path.name}/out", DeriveConfig(unit_sequences=1))
    left = locate(f"memory://{tmp_path.name}/out")
    assert [path for name in paths.DIRECTORIES for path in children(left / name)] == []


def test_what_a_full_disk_has_left_is_gone_on_with(tmp_path, monkeypatch):
    source, room = make_cache(tmp_path / "a"), []
    publish = fs.publish_file

    def until_full(root, temp, name):
        if not room:
            raise OSError(28, "No space left on device")
        room.pop()
        publish(root, temp, name)

    monkeypatch.setattr(fs, "publish_file", until_full)
    for num_files, is_left in ((0, False), (1, False), (4, True)):  # a unit has two, a shard and its record
        room[:] = [None] * num_files
        with pytest.raises(StorageError, match="No space left"):
            derive([source], tmp_path / "out", DeriveConfig(unit_sequences=1))
        assert (tmp_path / "out").exists() == is_left
    monkeypatch.undo()
    derive([source], tmp_path / "out", DeriveConfig(unit_sequences=1))
    assert len(records_of(tmp_path / "out")) == 9
