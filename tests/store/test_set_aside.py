"""Failures of units are written down once each, read back for what is not published, and swept with a complete cache."""

from __future__ import annotations

import msgspec
import pyarrow as pa
import pytest
from cache_making import make_identity, make_manifest, make_unit

from kdcache.format import paths
from kdcache.format.manifest import SkippedSequence, UnitAccount
from kdcache.store import chain, index
from kdcache.store.verify import verify_cache
from kdcache.store.writing import admission
from kdcache.store.writing.set_aside import FailedUnit, read_failures, record_failure
from kdcache.store.writing.writer import CacheWriter


def start(path, num_units=3):
    return CacheWriter.open(path, make_manifest(num_units, make_identity("raw")))


def failure(unit, reason="the engine fell over", time="2026-01-01T00:00:00Z"):
    return FailedUnit(unit=unit, error="TeacherError", reason=reason, attempts=2, time=time)


def test_the_last_failure_of_each_unit_that_is_not_published_is_read(tmp_path):
    start(tmp_path)
    for failed in (failure(2), failure(0), failure(2, "another", "2026-01-02T00:00:00Z"), failure(1)):
        record_failure(tmp_path, failed)
    found = read_failures(tmp_path, published={1})
    assert [(f.unit, f.reason) for f in found] == [(0, "the engine fell over"), (2, "another")]


def test_the_same_failure_is_written_once_and_a_damaged_record_passed_over(tmp_path, caplog):
    start(tmp_path)
    record_failure(tmp_path, failure(1))
    record_failure(tmp_path, failure(1, time="2027-01-01T00:00:00Z"))
    (path,) = (tmp_path / "failed").iterdir()
    assert paths.is_own_name(f"failed/{path.name}")
    assert read_failures(tmp_path, published=set())[0].time.startswith("2026")
    path.write_text("{")
    assert read_failures(tmp_path, published=set()) == []
    assert "not a record of a failure" in caplog.text


def test_failures_harm_no_cache_and_are_swept_when_it_is_complete(tmp_path):
    writer = start(tmp_path)
    record_failure(tmp_path, failure(1))
    for unit in (0, 2, 1):
        writer.write_unit(unit, make_unit(unit))
        assert start(tmp_path).fold().is_complete == (unit == 1)
        assert bool(list((tmp_path / "failed").iterdir())) == (unit != 1)
    assert verify_cache(tmp_path).problems == []


def test_the_account_of_a_unit_is_asked_for_after_its_last_record_and_kept(tmp_path):
    writer = start(tmp_path)
    seen = []

    def records():
        yield from make_unit(0)
        seen.append("records")

    def account():
        seen.append("account")
        return UnitAccount(wall_seconds=1.5, cpu_seconds=1.0, skipped=(SkippedSequence(source="a:3", reason="NaN"),))

    writer.write_unit(0, records(), account=account)
    (shard,) = writer.fold().shards
    assert seen == ["records", "account"]
    assert chain.newest_manifest(tmp_path).shards[0].account == shard.account == account()
    writer.write_unit(1, make_unit(1))
    assert writer.fold().shards[1].account is msgspec.UNSET


@pytest.mark.parametrize("damage", [False, True])
def test_an_index_made_fold_by_fold_is_the_one_made_from_all_shards(tmp_path, damage, caplog):
    writer = start(tmp_path, 6)
    for unit in (4, 0, 5, 2, 1, 3):
        writer.write_unit(unit, make_unit(unit, num_sequences=unit % 3))
        manifest = writer.fold()
        expected = index.index_of_shards(tmp_path, manifest.shards)
        found = index.open_index(tmp_path, manifest.index)
        assert found.equals(expected)
        if damage and manifest.index is not None:
            (tmp_path / manifest.index.name).write_bytes(b"not an index")
    assert ("made again" in caplog.text) == damage


def test_a_cache_that_another_writer_starts_while_we_look_is_not_taken_for_foreign_files(tmp_path, monkeypatch):
    look = admission.chain.manifest_numbers

    def look_just_too_early(root):
        monkeypatch.setattr(admission.chain, "manifest_numbers", look)
        start(tmp_path).write_unit(0, make_unit(0))
        return []

    monkeypatch.setattr(admission.chain, "manifest_numbers", look_just_too_early)
    assert start(tmp_path).published_units() == {0}


def test_a_fold_opens_no_journal_record_of_a_unit_that_is_folded(tmp_path, monkeypatch):
    writer = start(tmp_path)
    opened = []
    read = chain.read_journal_record
    monkeypatch.setattr("kdcache.store.writing.writer.read_journal_record", lambda path: opened.append(path.name) or read(path))
    for unit in range(3):
        writer.write_unit(unit, make_unit(unit))
        assert writer.published_units() == set(range(unit + 1))
        writer.fold()
    assert len(opened) == 6, "each record once when the writer asks what is published, and once when it is folded"
    assert isinstance(index.open_index(tmp_path, writer.manifest.index), pa.Table)
