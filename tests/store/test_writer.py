from __future__ import annotations

import errno
import threading

import numpy as np
import pytest
import strategies
from cache_making import (
    VOCAB_SIZE,
    K,
    assert_same_record,
    content_of,
    make_cache,
    make_record,
    make_unit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from writer_cases import changed, files, start

from kdcache.errors import CorruptCacheError, FormatError, StorageError
from kdcache.format.record import SequenceRecord
from kdcache.store.files import fs
from kdcache.store.reader import open_reader
from kdcache.store.verify import verify_cache
from kdcache.store.writing import writer


@pytest.mark.parametrize("codec_id", ["raw", "packed"])
@pytest.mark.parametrize("record_batch_bytes", [1, 700, 10**9])
def test_what_is_written_is_read(tmp_path, codec_id, record_batch_bytes):
    make_cache(tmp_path, codec_id, num_sequences=5, record_batch_bytes=record_batch_bytes)
    expected = [record for unit in range(3) for record in make_unit(unit, num_sequences=5)]
    with open_reader(tmp_path) as reader:
        assert len(reader) == len(expected)
        for found, record in zip(reader, expected, strict=True):
            assert_same_record(found, record, is_exact=codec_id == "raw")
    assert verify_cache(tmp_path).problems == []


@settings(deadline=None, max_examples=15)
@given(units=st.lists(st.lists(strategies.sequence_records(), max_size=3), min_size=1, max_size=3))
def test_any_records_make_a_sound_cache(tmp_path_factory, units):
    for codec_id in ("raw", "packed"):
        path = make_cache(tmp_path_factory.mktemp("c"), codec_id, units=units, k=6, record_batch_bytes=100)
        assert verify_cache(path).problems == []
        with open_reader(path) as reader:
            found = [reader[i] for i in range(len(reader))]
        if codec_id == "raw":
            for ours, theirs in zip(found, [record for unit in units for record in unit], strict=True):
                assert_same_record(ours, theirs)


def test_the_same_records_make_the_same_bytes(tmp_path):
    one, two = (make_cache(tmp_path / name, "packed", num_sequences=5) for name in ("one", "two"))
    assert content_of(one) == content_of(two)


def test_a_cache_resumed_in_another_order_has_an_undisturbed_ones_content(tmp_path):
    expected = content_of(make_cache(tmp_path / "whole"))
    path = tmp_path / "resumed"
    for unit in (2, 0, 1):
        again = start(path, record_batch_bytes=1)
        assert unit not in again.published_units()
        again.write_unit(unit, make_unit(unit))
        assert unit in again.published_units()
        again.fold()
    assert content_of(path) == expected


def test_a_unit_that_was_journalled_but_not_folded_is_published(tmp_path):
    start(tmp_path).write_unit(1, make_unit(1))
    again = start(tmp_path)
    assert again.published_units() == {1}
    assert again.manifest.shards == ()
    assert [shard.unit for shard in again.fold().shards] == [1]


def test_two_writers_take_turns_on_one_cache(tmp_path):
    one, two = start(tmp_path, record_batch_bytes=1), start(tmp_path, record_batch_bytes=1)
    one.write_unit(0, make_unit(0))
    two.write_unit(2, make_unit(2))
    assert len(one.fold().shards) == 2
    assert two.published_units() == {0, 2}
    two.write_unit(1, make_unit(1))
    assert one.fold() == two.fold()
    assert content_of(tmp_path) == content_of(make_cache(tmp_path.with_name(f"{tmp_path.name}-whole")))


def test_a_unit_done_twice_is_folded_once_and_the_loser_is_swept_when_the_cache_is_complete(tmp_path):
    one, two = start(tmp_path, record_batch_bytes=1), start(tmp_path, record_batch_bytes=10**6)
    shards = [w.write_unit(0, make_unit(0)) for w in (one, two)]
    assert shards[0].name != shards[1].name
    winner, loser = sorted(shards, key=lambda shard: shard.name)
    one.fold()
    assert (tmp_path / loser.name).exists(), "an incomplete cache is not swept"
    for unit in (1, 2):
        one.write_unit(unit, make_unit(unit))
    manifest = two.fold()
    assert [shard.name for shard in manifest.shards if shard.unit == 0] == [winner.name]
    assert not (tmp_path / loser.name).exists()
    assert len(files(tmp_path / "data")) == len(files(tmp_path / "journal")) == 3
    assert verify_cache(tmp_path).problems == []


def test_what_is_not_ours_is_not_swept(tmp_path):
    one = start(tmp_path, num_units=1)
    kept = ["data/photo.jpg", "journal/notes.txt", "index/x/y", "data/000000-xyz.arrow"]
    for name in kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    one.write_unit(0, make_unit(0))
    one.fold()
    assert set(kept) <= set(files(tmp_path))


def test_an_index_that_a_killed_fold_left_is_swept_and_those_of_older_snapshots_are_kept(tmp_path):
    one = start(tmp_path, num_units=2)
    one.write_unit(0, make_unit(0))
    older = one.fold().index.name
    (tmp_path / "index" / f"{'0' * 16}.arrow").write_text("left over")
    one.write_unit(1, make_unit(1))
    newer = one.fold().index.name
    assert files(tmp_path / "index") == sorted(name.split("/")[1] for name in (older, newer))


def test_many_writers_at_once_lose_nothing_and_repeat_nothing(tmp_path):
    errors = []

    def work(number):
        try:
            mine = start(tmp_path / "c", num_units=12, record_batch_bytes=1 + number * 500)
            for unit in range(number, 12, 2):
                mine.write_unit(unit, make_unit(unit, num_sequences=1))
                mine.fold()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]  # two do the even units, two the odd ones
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    manifest = start(tmp_path / "c", num_units=12).fold()
    assert [shard.unit for shard in manifest.shards] == list(range(12))
    assert verify_cache(tmp_path / "c").problems == []
    assert len(files(tmp_path / "c/data")) == 12
    assert files(tmp_path / "c/tmp") == []


def test_a_fold_that_another_writer_overtakes_starts_again_from_the_others_manifest(tmp_path, monkeypatch):
    one, two = start(tmp_path), start(tmp_path)
    one.write_unit(0, make_unit(0))

    def overtaken(point):
        if point == "index published":
            monkeypatch.setattr(fs, "reached", lambda point: None)
            two.write_unit(1, make_unit(1))
            two.fold()

    monkeypatch.setattr(fs, "reached", overtaken)
    manifest = one.fold()
    assert manifest.number == 1
    assert [shard.unit for shard in manifest.shards] == [0, 1]


def test_a_fold_whose_shard_another_writer_sweeps_meanwhile_ends_with_the_others(tmp_path, monkeypatch):
    one, two = start(tmp_path, num_units=1, record_batch_bytes=1), start(tmp_path, num_units=1, record_batch_bytes=10**6)
    loser = max(one, two, key=lambda w: w.write_unit(0, make_unit(0)).name)
    names = files(tmp_path / "journal")
    (tmp_path / "journal" / names[0]).rename(tmp_path / "hidden")  # the loser looks before the winner has journalled
    publish_index = writer.publish_index

    def swept_first(*arguments):
        monkeypatch.setattr(writer, "publish_index", publish_index)
        (tmp_path / "hidden").rename(tmp_path / "journal" / names[0])
        (one if loser is two else two).fold()
        return publish_index(*arguments)

    monkeypatch.setattr(writer, "publish_index", swept_first)
    manifest = loser.fold()
    assert manifest.is_complete
    assert verify_cache(tmp_path).problems == []


def test_a_fold_that_never_comes_first_gives_up(tmp_path, monkeypatch):
    one = start(tmp_path)
    one.write_unit(0, make_unit(0))
    monkeypatch.setattr(writer.chain, "add_manifest", lambda root, manifest: False)
    monkeypatch.setattr(writer, "MAX_FOLD_TRIES", 3)
    with pytest.raises(StorageError, match="could not be folded"):
        one.fold()


def test_a_damaged_journal_record_is_passed_over_and_its_unit_is_done_again(tmp_path, caplog):
    one = start(tmp_path, record_batch_bytes=1)
    for unit in range(3):
        one.write_unit(unit, make_unit(unit))
    record = tmp_path / "journal" / files(tmp_path / "journal")[1]
    record.write_bytes(record.read_bytes()[:-20])
    assert one.published_units() == {0, 2}
    assert len(one.fold().shards) == 2
    assert str(record) in caplog.text
    one.write_unit(1, make_unit(1))
    assert one.fold().is_complete
    assert content_of(tmp_path) == content_of(make_cache(tmp_path.with_name(f"{tmp_path.name}-whole")))


def test_a_journal_record_under_anothers_name_or_of_a_unit_beyond_the_plan_is_passed_over(tmp_path):
    larger, smaller = start(tmp_path / "larger", num_units=9), start(tmp_path / "smaller", num_units=3)
    shard = larger.write_unit(7, make_unit(7))
    smaller.write_unit(0, make_unit(0))
    for directory in ("journal", "data"):
        for name in files(tmp_path / "larger" / directory):
            (tmp_path / "larger" / directory / name).rename(tmp_path / "smaller" / directory / name)
    journal = tmp_path / "smaller/journal"
    (journal / f"000001-{shard.sha256[:16]}.json").write_bytes((journal / f"000007-{shard.sha256[:16]}.json").read_bytes())
    assert smaller.published_units() == {0}


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_journalled_shard_that_is_missing_or_truncated_is_done_again(tmp_path, damage):
    one = start(tmp_path)
    shard = one.write_unit(0, make_unit(0))
    path = tmp_path / shard.name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert one.published_units() == set()
    assert one.fold().shards == ()
    assert one.write_unit(0, make_unit(0)) == shard
    assert len(one.fold().shards) == 1


def test_a_fold_over_a_damaged_shard_names_it(tmp_path):
    one = start(tmp_path)
    shard = one.write_unit(0, make_unit(0))
    (tmp_path / shard.name).write_bytes(b"x" * shard.num_bytes)
    with pytest.raises(CorruptCacheError, match=shard.name):
        one.fold()


def test_empty_units_are_units(tmp_path):
    make_cache(tmp_path, units=[[], make_unit(1), []])
    with open_reader(tmp_path) as reader:
        assert len(reader) == 3
        assert reader.manifest.is_complete
    assert verify_cache(tmp_path).problems == []


def test_a_cache_of_empty_units_alone_is_a_cache(tmp_path):
    make_cache(tmp_path, units=[[], []])
    with open_reader(tmp_path) as reader:
        assert len(reader) == 0
        assert reader.num_tokens_S.dtype == np.uint32
    assert verify_cache(tmp_path).problems == []


def test_a_plan_without_units_is_complete_at_once(tmp_path):
    assert start(tmp_path, num_units=0).fold().is_complete
    with open_reader(tmp_path) as reader:
        assert len(reader) == 0
    assert verify_cache(tmp_path).problems == []


@pytest.mark.parametrize("unit", [-1, 3])
def test_a_unit_beyond_the_plan_is_refused(tmp_path, unit):
    with pytest.raises(FormatError, match=f"unit {unit} is not in the plan of 3 units"):
        start(tmp_path).write_unit(unit, [])


def test_records_that_fail_to_come_leave_nothing_behind(tmp_path):
    def failing():
        yield make_record(1)
        raise RuntimeError("the teacher is ill")

    one = start(tmp_path)
    before = files(tmp_path)
    with pytest.raises(RuntimeError, match="the teacher is ill"):
        one.write_unit(0, failing())
    assert files(tmp_path) == before


@pytest.mark.parametrize("act", ["write_unit", "fold", "open"])
def test_a_full_disk_is_told_as_such_and_loses_nothing(tmp_path, monkeypatch, act):
    one = start(tmp_path, record_batch_bytes=1)
    one.write_unit(0, make_unit(0))

    def refuse(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    fs.make_directories(tmp_path / "new")
    acts = {
        "open": lambda: start(tmp_path / "new"),
        "fold": one.fold,
        "write_unit": lambda: one.write_unit(1, make_unit(1)),
    }
    with monkeypatch.context() as patched:
        patched.setattr(fs, "sync_file", refuse)
        patched.setattr(fs, "make_directories", lambda root: None)
        with pytest.raises(StorageError, match=r"No space left.*nothing published is lost"):
            acts[act]()
    assert files(tmp_path / "tmp") == []
    assert start(tmp_path).published_units() == {0}


def record_with_target_logprob(value: float) -> SequenceRecord:
    record = make_record(1)
    outside = record.distributions.outside_target_logprobs.copy()
    outside[0] = value
    return SequenceRecord(record.sequence, changed(record.distributions, outside_target_logprobs=outside))


@pytest.mark.parametrize("codec_id", ["raw", "packed"])
def test_a_target_of_probability_zero_is_counted_and_the_rest_of_the_text_still_proves_its_place(tmp_path, codec_id):
    path = make_cache(tmp_path, codec_id, units=[[record_with_target_logprob(-np.inf), make_record(2)]])
    report = verify_cache(path)
    assert report.problems == []
    assert report.manifest.shards[0].num_impossible_targets == 1
    assert abs(report.teacher_nll - report.cached_nll) <= report.nll_bound < 0.01


def test_a_target_too_improbable_for_float16_leaves_no_bound_and_is_no_damage(tmp_path):
    report = verify_cache(make_cache(tmp_path, "packed", units=[[record_with_target_logprob(-1e5)]]))
    assert report.problems == []
    assert report.nll_bound == np.inf


def test_what_is_counted_of_a_shard_is_what_it_holds(tmp_path):
    records = make_unit(0, num_sequences=5)
    shard = start(tmp_path).write_unit(0, records)
    assert shard.num_sequences == 5
    assert shard.num_tokens == sum(r.sequence.num_tokens for r in records)
    assert shard.num_positions == sum(r.distributions.num_positions for r in records)
    assert shard.num_entries == sum(r.distributions.num_entries for r in records)
    assert shard.num_targets == sum(int((r.sequence.target_ids_P >= 0).sum()) for r in records)
    assert shard.num_bytes == (tmp_path / shard.name).stat().st_size
    assert 0 < sum(shard.column_bytes.values()) < shard.num_bytes
    logprobs = [r.distributions.target_logprobs(r.sequence.target_ids_P).astype(np.float64) for r in records]
    assert shard.target_logprob_sum == pytest.approx(np.nansum(np.concatenate(logprobs)), rel=1e-12)
    assert (VOCAB_SIZE, K) == (97, 5)
