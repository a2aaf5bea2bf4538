"""Damage has a way out: what is damaged is set aside, the rest is read, and exactly that is made again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from cache_making import assert_same_record, make_cache, make_unit
from fault_proxy import FaultProxy
from hostile import INDEX_SCHEMA, file_bytes, flip, replace_index

from kdcache.cli.main import main
from kdcache.errors import CorruptCacheError, StorageError
from kdcache.store import chain
from kdcache.store.files.location import RemotePath, locate
from kdcache.store.reader import open_reader
from kdcache.store.repair import find_misfits, repair_cache
from kdcache.store.verify import verify_cache
from kdcache.store.writing.writer import CacheWriter

NUM_SEQUENCES = 3


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "cache", num_units=3, num_sequences=NUM_SEQUENCES)


def shard_of(cache: Path, unit: int) -> Path:
    (path,) = (cache / "data").glob(f"{unit:06d}-*")
    return path


def spoil(cache: Path, how: str) -> None:
    path = shard_of(cache, 1)
    if how == "a flipped bit":
        ids = make_unit(1, num_sequences=NUM_SEQUENCES)[0].sequence.input_ids_N.tobytes()
        flip(path, path.read_bytes().index(ids) + 5)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.unlink()


def make_again(cache: Path, before: bytes) -> None:
    writer = CacheWriter.open(cache, open_reader(cache).manifest, record_batch_bytes=1)
    assert writer.published_units() == {0, 2}
    writer.write_unit(1, make_unit(1, num_sequences=NUM_SEQUENCES))
    manifest = writer.fold()
    assert (manifest.is_complete, manifest.number) == (True, 3)
    assert verify_cache(cache).problems == []
    assert shard_of(cache, 1).read_bytes() == before


@pytest.mark.parametrize("how", ["a flipped bit", "cut", "missing"])
def test_a_damaged_unit_is_set_aside_and_only_that_is_made_again(cache: Path, how: str):
    before = shard_of(cache, 1).read_bytes()
    spoil(cache, how)
    repair = repair_cache(cache)
    assert [(damage.unit, damage.name) for damage in repair.damage] == [(1, f"data/{damage_name(repair)}")]
    assert (repair.manifest.number, repair.made_index) == (2, False)
    assert (cache / "damaged").is_dir()
    assert len(list((cache / "damaged").glob("*.arrow"))) == (how != "missing")
    expected = [record for unit in (0, 2) for record in make_unit(unit, num_sequences=NUM_SEQUENCES)]
    with open_reader(cache) as reader:
        assert len(reader) == len(expected)
        for found, record in zip(reader, expected, strict=True):
            assert_same_record(found, record)
    assert verify_cache(cache).problems == []
    make_again(cache, before)


def damage_name(repair) -> str:
    return repair.damage[0].name.rpartition("/")[2]


def test_a_sound_cache_is_left_as_it_is(cache: Path):
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    assert repair_cache(cache).damage == ()
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before


def test_a_damaged_index_is_made_again_with_and_without_a_damaged_shard(cache: Path):
    (index,) = (cache / "index").iterdir()
    flip(index, index.stat().st_size // 2)
    repair = repair_cache(cache)
    assert (repair.damage, repair.made_index, len(open_reader(cache))) == ((), True, 9)
    (newest,) = [path for path in (cache / "index").iterdir() if path.name == Path(repair.manifest.index.name).name]
    flip(newest, newest.stat().st_size // 2)
    spoil(cache, "a flipped bit")
    assert repair_cache(cache).made_index
    assert verify_cache(cache).problems == []
    assert len(open_reader(cache)) == 6


def test_a_repair_that_is_killed_after_a_file_has_moved_is_done_by_the_next(cache: Path, monkeypatch: pytest.MonkeyPatch):
    spoil(cache, "a flipped bit")
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.store.repair._publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            repair_cache(cache)
    assert [damage.reason for damage in find_misfits(cache, open_reader(cache).manifest)] == ["it is missing"]
    assert repair_cache(cache).manifest.number == 2
    assert len(open_reader(cache)) == 6


def test_an_error_of_a_damaged_row_says_where_and_what_to_do(cache: Path):
    spoil(cache, "a flipped bit")
    with open_reader(cache) as reader, pytest.raises(CorruptCacheError) as caught:
        reader[NUM_SEQUENCES]
    error = caught.value
    assert str(error).endswith(f"; `kdcache repair {cache}` sets what is damaged aside")
    assert error.path == str(shard_of(cache, 1))
    assert (error.record_batch, error.sequence) == (0, NUM_SEQUENCES)


@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "empty"])
def test_a_damaged_index_ends_with_the_command_that_makes_it_again(cache: Path, how: str):
    (index,) = (cache / "index").iterdir()
    if how == "flipped":
        flip(index, index.stat().st_size // 2)
    elif how == "cut":
        os.truncate(index, 100)
    elif how == "missing":
        index.unlink()
    else:
        replace_index(cache, file_bytes([], INDEX_SCHEMA))
        index = cache / chain.newest_manifest(cache).index.name
    with pytest.raises(CorruptCacheError) as caught:
        open_reader(cache)
    assert str(caught.value).endswith(f"; `kdcache repair {cache}` makes the index again from the shards")
    assert caught.value.path == str(index)
    assert repair_cache(cache).made_index
    assert len(open_reader(cache)) == 9


def test_the_command_says_what_it_did(cache: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["repair", str(cache)]) == 0
    assert "nothing to repair" in capsys.readouterr().out
    spoil(cache, "cut")
    assert main(["verify", str(cache)]) == 1
    assert f"`kdcache repair {cache}` sets damaged units aside" in capsys.readouterr().err
    assert main(["repair", str(cache)]) == 1
    captured = capsys.readouterr()
    assert "set aside: unit 1: data/000001-" in captured.err
    assert "snapshot 2 holds 2 of 3 units; run the same `kdcache capture` again to redo 1 unit" in captured.out


def test_a_cache_in_a_store_is_repaired_too(cache: Path, s3: FaultProxy):
    uri = f"s3://{s3.bucket}/cache"
    for path in cache.rglob("*"):
        if path.is_file():
            RemotePath(f"{uri}/{path.relative_to(cache).as_posix()}", locate(uri).config).write_bytes(path.read_bytes())
    name = f"data/{shard_of(cache, 1).name}"
    data = bytearray(shard_of(cache, 1).read_bytes())
    data[len(data) // 2] ^= 1
    (locate(uri) / name).write_bytes(bytes(data))
    assert [damage.unit for damage in repair_cache(uri).damage] == [1]
    assert (locate(uri) / f"damaged/{shard_of(cache, 1).name}").read_bytes() == bytes(data)
    assert len(open_reader(uri)) == 6


@pytest.mark.parametrize(("number", "is_damage"), [(errno.EACCES, False), (errno.EMFILE, False), (errno.EIO, True)])
def test_a_shard_that_may_not_be_read_is_not_taken_for_a_damaged_one(
    cache: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_damage: bool
):
    def fail(path: Path) -> str:
        raise OSError(number, os.strerror(number))

    before = sorted(path.name for path in cache.rglob("*"))
    monkeypatch.setattr("kdcache.store.files.fs.sha256_of", fail)
    if is_damage:
        assert "it cannot be read: " in repair_cache(cache).damage[0].reason
        return
    with pytest.raises(StorageError, match=r"cannot be read: .*; nothing was set aside"):
        repair_cache(cache)
    assert sorted(path.name for path in cache.rglob("*")) == before


@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_manifest_is_set_aside_and_the_journal_gives_back_its_units(cache: Path, number: int):
    path = cache / "manifests" / f"{number:06d}.json"
    flip(path, len(path.read_bytes()) // 2)
    if number == 1:
        with pytest.raises(CorruptCacheError, match=f"`kdcache repair {cache}` sets the manifest aside") as caught:
            open_reader(cache)
        assert caught.value.path == str(path)
    else:  # an older snapshot: readers and writers do without it
        assert CacheWriter.open(cache, open_reader(cache).manifest).published_units() == {0, 1, 2}
        assert len(verify_cache(cache).problems) == 1
    repair = repair_cache(cache)
    assert [(damage.unit, damage.name) for damage in repair.damage] == [(None, f"manifests/{path.name}")]
    assert repair.manifest.is_complete
    assert verify_cache(cache).problems == []
    assert len(open_reader(cache)) == 9


def test_a_cache_without_a_whole_manifest_is_said_to_be_beyond_repair(cache: Path):
    for path in (cache / "manifests").iterdir():
        flip(path, 40)
    with pytest.raises(CorruptCacheError, match=r"no manifest of .* is whole.*make the cache again in another folder"):
        repair_cache(cache)
    assert len(list((cache / "manifests").iterdir())) == 2


def test_a_damaged_journal_record_is_set_aside(cache: Path):
    path = next((cache / "journal").iterdir())
    flip(path, 40)
    assert len(verify_cache(cache).problems) == 1
    assert [damage.name for damage in repair_cache(cache).damage] == [f"journal/{path.name}"]
    assert verify_cache(cache).problems == []


def test_one_flipped_bit_is_one_problem(cache: Path):
    spoil(cache, "a flipped bit")
    (problem,) = verify_cache(cache).problems
    assert "record batch 0" in problem
