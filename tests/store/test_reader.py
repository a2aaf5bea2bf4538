from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import stat
import threading

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from cache_making import assert_same_record, make_cache, make_manifest, make_record, make_unit

from kdcache.errors import CacheNotFoundError, CorruptCacheError, MismatchError
from kdcache.format import paths
from kdcache.format.manifest import FORMAT_VERSION, manifest_from_json, manifest_to_json
from kdcache.store import reader as reader_module
from kdcache.store.reader import open_reader
from kdcache.store.summary import summarize_cache
from kdcache.store.verify import verify_cache
from kdcache.store.writing.writer import CacheWriter

NUM_SEQUENCES = 5
EXPECTED = [record for unit in range(3) for record in make_unit(unit, num_sequences=NUM_SEQUENCES)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("reader") / "cache", num_sequences=NUM_SEQUENCES)


def assert_reads_all(reader) -> None:
    for number, record in enumerate(EXPECTED):
        assert_same_record(reader[number], record)


def listing(path) -> dict[str, tuple]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}


def test_lengths_come_from_the_index_alone(cache, tmp_path):
    with open_reader(cache) as reader:
        assert reader.num_tokens_S.dtype == reader.num_positions_S.dtype == np.uint32
        assert reader.num_tokens_S.tolist() == [r.sequence.num_tokens for r in EXPECTED]
        assert reader.num_positions_S.tolist() == [r.distributions.num_positions for r in EXPECTED]
        assert reader.snapshot == reader.manifest.digest


def test_numbers_count_from_either_end_and_no_further(cache):
    with open_reader(cache) as reader:
        assert_same_record(reader[-1], EXPECTED[-1])
        assert_same_record(reader[np.int64(2)], EXPECTED[2])
        for number in (len(EXPECTED), -len(EXPECTED) - 1):
            with pytest.raises(IndexError, match=f"sequence {number} of a cache of {len(EXPECTED)}"):
                reader[number]


def test_a_reader_can_be_used_after_it_was_closed(cache):
    reader = open_reader(cache)
    first = reader[0]
    reader.close()
    assert_reads_all(reader)
    assert_same_record(first, EXPECTED[0])


def test_records_outlive_their_reader(cache):
    records = [open_reader(cache)[i] for i in range(len(EXPECTED))]
    gc.collect()
    for found, expected in zip(records, EXPECTED, strict=True):
        assert_same_record(found, expected)


def test_few_record_batches_are_kept_open(cache, monkeypatch):
    monkeypatch.setattr(reader_module, "OPEN_BATCHES", 2)
    reader = open_reader(cache)
    assert_reads_all(reader)
    assert_reads_all(reader)
    assert len(reader._batches) == 2


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors by /proc")
def test_no_file_descriptor_is_kept_however_many_shards_are_read(cache):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    reader = open_reader(cache)
    assert_reads_all(reader)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_incomplete_cache_is_read_as_far_as_it_was_folded(tmp_path):
    writer = CacheWriter.open(tmp_path, make_manifest(3))
    with open_reader(tmp_path) as reader:
        assert len(reader) == 0
        assert not reader.manifest.is_complete
    writer.write_unit(2, make_unit(2))
    assert len(open_reader(tmp_path)) == 0
    writer.fold()
    writer.write_unit(0, make_unit(0))
    with open_reader(tmp_path) as reader:
        assert len(reader) == 3
        assert_same_record(reader[0], make_unit(2)[0])
    assert verify_cache(tmp_path).problems == []


def test_a_reader_keeps_its_snapshot_while_the_cache_grows(tmp_path):
    writer = CacheWriter.open(tmp_path, make_manifest(2))
    writer.write_unit(1, make_unit(1))
    writer.fold()
    reader = open_reader(tmp_path)
    writer.write_unit(0, make_unit(0))
    writer.fold()
    again = pickle.loads(pickle.dumps(reader))
    for old in (reader, again):
        assert len(old) == 3
        assert_same_record(old[0], make_unit(1)[0])
    assert len(open_reader(tmp_path)) == 6


def test_a_pickled_reader_reads_the_same_snapshot_from_another_directory(cache, monkeypatch, tmp_path):
    monkeypatch.chdir(cache.parent)
    data = pickle.dumps(open_reader("cache", verify=False))
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(data)
    assert_reads_all(again)
    assert again.snapshot == open_reader(cache).snapshot
    assert not again._verify
    assert_reads_all(copy.deepcopy(again))
    assert len(data) < 1000


def test_a_pickled_reader_refuses_another_cache_in_its_place(tmp_path):
    make_cache(tmp_path / "c", num_units=1)
    data = pickle.dumps(open_reader(tmp_path / "c"))
    (tmp_path / "c").rename(tmp_path / "old")
    make_cache(tmp_path / "c", num_units=2)
    with pytest.raises(MismatchError, match="another cache has taken its path"):
        pickle.loads(data)


def test_several_threads_may_read_at_once(cache, monkeypatch):
    monkeypatch.setattr(reader_module, "OPEN_BATCHES", 2)
    reader, errors = open_reader(cache), []

    def read(seed):
        try:
            for number in np.random.default_rng(seed).integers(0, len(EXPECTED), 150):
                assert_same_record(reader[number], EXPECTED[number])
                if number == 0:
                    reader.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def read_all_in_child(reader) -> None:
    assert_reads_all(reader)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_reader_may_be_used_after_a_fork_even_one_with_its_lock_held(cache):
    reader = open_reader(cache)
    reader[0]
    held, forked = threading.Event(), threading.Event()

    def hold():
        with reader._lock:
            held.set()
            forked.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    child = multiprocessing.get_context("fork").Process(target=read_all_in_child, args=(reader,))
    child.start()
    forked.set()
    holder.join()
    child.join(30)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0
    assert_reads_all(reader)


def test_a_reader_never_writes(tmp_path):
    make_cache(tmp_path / "c")
    before = listing(tmp_path)
    for path in [*(tmp_path / "c").rglob("*"), tmp_path / "c"]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        with open_reader(tmp_path / "c") as reader:
            assert len([reader[i] for i in range(len(reader))]) == 9
            pickle.loads(pickle.dumps(reader))[0]
        assert verify_cache(tmp_path / "c").problems == []
        summarize_cache(tmp_path / "c")
        assert listing(tmp_path) == before
    finally:
        for path in [tmp_path / "c", *(tmp_path / "c").rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_a_cache_without_journal_and_tmp_is_read(tmp_path):
    make_cache(tmp_path / "c")
    for path in (tmp_path / "c/journal").iterdir():
        path.unlink()
    (tmp_path / "c/journal").rmdir()
    (tmp_path / "c/tmp").rmdir()
    assert verify_cache(tmp_path / "c").problems == []
    assert len(open_reader(tmp_path / "c")) == 9


def test_a_cache_of_a_newer_minor_version_is_read_and_its_unknown_fields_passed_over(tmp_path):
    import hashlib
    import json

    make_cache(tmp_path, num_units=2)
    (index,) = (tmp_path / "index").iterdir()
    with pa.ipc.open_file(index.read_bytes()) as file:
        table = file.read_all()
    later = pa.array(["x"] * len(table))
    table = table.add_column(1, "domain", later).append_column("lengths", later).replace_schema_metadata({"later": "yes"})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    sha256 = hashlib.sha256(data).hexdigest()
    (tmp_path / paths.index_name(sha256)).write_bytes(data)
    parent = None
    for path in sorted((tmp_path / "manifests").iterdir()):
        fields = json.loads(path.read_bytes())
        del fields["digest"]
        if fields["index"] is not None:
            fields["index"] = {"name": paths.index_name(sha256), "sha256": sha256}
        fields |= {"format_version": [FORMAT_VERSION[0], FORMAT_VERSION[1] + 1], "novelty": [1, {"a": 2}], "parent": parent}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        parent = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(fields | {"digest": parent}))
    assert verify_cache(tmp_path).problems == []
    reader = open_reader(tmp_path)
    assert reader.snapshot == parent
    assert pickle.loads(pickle.dumps(reader)).snapshot == parent
    assert_same_record(reader[0], make_unit(0)[0])


@pytest.mark.parametrize(
    ("name", "why"), [("nothing", "does not exist"), ("empty", "no manifests"), ("file", "does not exist")]
)
def test_a_path_without_a_cache_says_so(tmp_path, name, why):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheNotFoundError, match=rf"no cache at '{tmp_path / name}'.*{why}.*kdcache capture"):
        open_reader(tmp_path / name)


def test_reading_without_verifying_is_for_measuring_and_does_not_look_at_digests(cache):
    assert_reads_all(open_reader(cache, verify=False))


def test_a_summary_is_what_the_records_add_up_to(cache):
    summary = summarize_cache(cache)
    distributions = [record.distributions for record in EXPECTED]
    tail_mass_P = np.concatenate([d.tail_mass_P for d in distributions]).astype(np.float64)
    logprobs = [r.distributions.target_logprobs(r.sequence.target_ids_P) for r in EXPECTED]
    assert summary.num_sequences == len(EXPECTED)
    assert summary.num_positions == len(tail_mass_P)
    assert summary.kept_mass == pytest.approx(1 - tail_mass_P.mean())
    assert summary.teacher_nll == pytest.approx(-np.nanmean(np.concatenate(logprobs).astype(np.float64)))
    assert summary.entropy_floor < summary.entropy_ceiling < np.log(97)
    assert sum(summary.column_bytes_per_position.values()) == pytest.approx(summary.bytes_per_position)
    assert summary.num_impossible_targets == 0


def test_a_summary_of_an_empty_cache_has_no_means(tmp_path):
    summary = summarize_cache(make_cache(tmp_path, units=[[]]))
    assert np.isnan([summary.bytes_per_position, summary.teacher_nll, summary.kept_mass]).all()
    assert summary.num_sequences == 0


def test_verify_tells_how_far_it_is(cache):
    seen = []
    report = verify_cache(cache, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == report.num_bytes == sum(shard.num_bytes for shard in report.manifest.shards)
    assert (report.num_sequences, report.is_sound) == (len(EXPECTED), True)
    assert abs(report.teacher_nll - report.cached_nll) <= report.nll_bound


def test_verify_finds_rows_that_do_not_belong_to_their_text(tmp_path):
    """A capture that shifted every distribution by one: all bytes sound, the manifest's sum the teacher's own."""
    make_cache(tmp_path, units=[[make_record(1)]])
    path = tmp_path / "manifests/000001.json"
    manifest = manifest_from_json(path.read_bytes(), where="m")
    shard = msgspec.structs.replace(manifest.shards[0], target_logprob_sum=manifest.shards[0].target_logprob_sum - 1)
    path.write_bytes(manifest_to_json(msgspec.structs.replace(manifest, shards=(shard,))))
    (problem,) = verify_cache(tmp_path).problems
    assert "logprobs do not belong to their text" in problem


def test_verify_finds_a_gap_and_a_break_in_the_chain_of_manifests(tmp_path):
    make_cache(tmp_path / "gap", num_units=1)
    (tmp_path / "gap/manifests/000000.json").unlink()
    assert "manifest 0 is missing" in verify_cache(tmp_path / "gap").problems[0]
    make_cache(tmp_path / "broken", num_units=1)
    path = tmp_path / "broken/manifests/000000.json"
    other = msgspec.structs.replace(manifest_from_json(path.read_bytes(), where="m"), versions={"kdcache": "9"})
    path.write_bytes(manifest_to_json(other))
    assert "names" in verify_cache(tmp_path / "broken").problems[0]
    assert other.digest in verify_cache(tmp_path / "broken").problems[0]


@pytest.mark.parametrize("name", ["num_tokens", "num_positions", "num_entries", "num_targets"])
def test_verify_finds_counts_that_are_not_the_shards(tmp_path, name):
    make_cache(tmp_path, units=[[make_record(1)]])
    path = tmp_path / "manifests/000001.json"
    manifest = manifest_from_json(path.read_bytes(), where="m")
    shard = msgspec.structs.replace(manifest.shards[0], **{name: 10**15})
    path.write_bytes(manifest_to_json(msgspec.structs.replace(manifest, shards=(shard,))))
    assert any(name in problem and str(10**15) in problem for problem in verify_cache(tmp_path).problems)


def test_verify_of_a_damaged_newest_manifest_raises(tmp_path):
    make_cache(tmp_path, num_units=1)
    (tmp_path / "manifests/000001.json").write_text("{}")
    with pytest.raises(CorruptCacheError, match=r"000001\.json"):
        verify_cache(tmp_path)
