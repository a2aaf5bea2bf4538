"""A stranger's folder: what in it is a link out of it, a pipe or a folder with a file's name is not read, written or swept."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cache_making import make_cache, make_identity, make_manifest, make_unit

from kdcache.errors import CorruptCacheError, KdcacheError, StorageError
from kdcache.format import paths
from kdcache.store.files import fs
from kdcache.store.files.regular import open_regular, read_regular, write_new
from kdcache.store.reader import open_reader
from kdcache.store.remote.block_cache import DiskBlocks
from kdcache.store.repair import repair_cache
from kdcache.store.verify import verify_cache
from kdcache.store.writing.set_aside import FailedUnit, read_failures, record_failure
from kdcache.store.writing.writer import CacheWriter


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    """Opening a pipe without a writer would wait for ever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    make_cache(tmp_path / "cache", "raw")
    return tmp_path / "cache"


def one_of(cache: Path, folder: str) -> Path:
    return max((cache / folder).iterdir())


def link_out(path: Path) -> None:
    """The same content, outside, with a link to it."""
    elsewhere = path.parents[2] / f"elsewhere-{path.name}"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def link_folder_out(path: Path) -> None:
    link_out(path.parent)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's address is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def read_all(cache: Path) -> None:
    with open_reader(cache) as reader:
        for number in range(len(reader)):
            reader[number]


def start_and_fail(cache: Path) -> None:
    """All that writes: a start, a record of a failure, a fold."""
    writer = CacheWriter.open(cache, make_manifest(3, make_identity("raw")))
    record_failure(cache, FailedUnit(unit=1, error="X", reason="because", attempts=1))
    writer.fold()


@pytest.mark.parametrize(
    "spoil", [link_out, link_folder_out, pipe, folder, loop, device, unix_socket], ids=lambda s: s.__name__
)
@pytest.mark.parametrize("part", [paths.MANIFESTS, paths.DATA, paths.INDEX])
def test_what_is_no_plain_file_of_the_cache_is_refused_by_name(cache: Path, part: str, spoil: Callable[[Path], None]):
    path = one_of(cache, part)
    spoil(path)
    with pytest.raises(CorruptCacheError) as caught:
        read_all(cache)
    assert str(path if spoil is not link_folder_out else path.parent) in str(caught.value)
    with suppress(CorruptCacheError):
        assert verify_cache(cache).problems


@pytest.mark.parametrize("spoil", [link_out, pipe, folder, device], ids=lambda s: s.__name__)
def test_records_of_journal_and_failures_are_passed_over(tmp_path: Path, spoil: Callable[[Path], None], caplog):
    cache = tmp_path / "cache"
    writer = CacheWriter.open(cache, make_manifest(2, make_identity("raw")))
    writer.write_unit(0, make_unit(0))
    record_failure(cache, FailedUnit(unit=1, error="X", reason="because", attempts=1))
    spoil(one_of(cache, paths.FAILED))
    spoil(one_of(cache, paths.JOURNAL))
    assert read_failures(cache, published={0}) == []
    assert writer.published_units() == set()
    assert str(cache / paths.FAILED) in caplog.text
    assert str(cache / paths.JOURNAL) in caplog.text


@pytest.mark.parametrize("name", [*paths.DIRECTORIES, paths.FAILED])
def test_nothing_is_written_or_swept_through_a_folder_that_is_a_link(tmp_path: Path, name: str):
    """`tmp` could lead to anybody's folder of temporary files, `journal` to another cache's."""
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    elsewhere.mkdir()
    theirs = [elsewhere / "gone.1-1-00000000.0", elsewhere / "000009-0123456789abcdef.json"]
    for path in theirs:
        path.write_text("theirs")
        os.utime(path, (0, 0))
    make_cache(cache, "raw")
    shutil.rmtree(cache / name, ignore_errors=True)
    (cache / name).symlink_to(elsewhere)
    with pytest.raises(KdcacheError, match=r"is a link|is not a cache and not empty"):
        start_and_fail(cache)
    fs.remove_cache(cache, [])
    assert sorted(elsewhere.iterdir()) == sorted(theirs)


@pytest.mark.parametrize("name", [paths.TMP, paths.DAMAGED, paths.JOURNAL])
def test_a_repair_moves_and_writes_nothing_through_a_link(tmp_path: Path, cache: Path, name: str):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shard = one_of(cache, paths.DATA)
    pipe(shard)
    shutil.rmtree(cache / name, ignore_errors=True)
    (cache / name).symlink_to(elsewhere)
    with pytest.raises(StorageError, match="is a link"):
        repair_cache(cache)
    assert list(elsewhere.iterdir()) == []
    (cache / name).unlink()
    assert [found.name for found in repair_cache(cache).damage] == [f"{paths.DATA}/{shard.name}"]
    read_all(cache)


def test_a_sweep_takes_plain_files_alone(tmp_path: Path):
    cache = tmp_path / "cache"
    CacheWriter.open(cache, make_manifest(1, make_identity("raw")))
    kept = tmp_path / "kept"
    kept.write_text("theirs")
    os.utime(kept, (0, 0))
    odd = [cache / paths.TMP / f"gone.1-1-00000000.{n}" for n in range(3)]
    odd[0].symlink_to(kept)
    odd[1].mkdir()
    os.mkfifo(odd[2])
    swept = cache / paths.TMP / "gone.1-1-00000000.9"
    swept.write_text("")
    for path in (*odd, swept):
        os.utime(path, (0, 0), follow_symlinks=False)
    assert fs.sweep_temp_files(cache) == 1
    assert kept.read_text() == "theirs"
    assert not swept.exists()


def test_links_inside_the_cache_and_a_link_to_the_cache_are_read(tmp_path: Path, cache: Path):
    shard = one_of(cache, paths.DATA)
    shutil.move(shard, cache / "moved")
    shard.symlink_to("../moved")
    (tmp_path / "link").symlink_to(cache)
    read_all(tmp_path / "link")
    assert verify_cache(tmp_path / "link").is_sound


@pytest.mark.parametrize("below", ["", "caches/mine"])
def test_a_snapshot_of_the_hub_is_read_where_its_links_lead(tmp_path: Path, cache: Path, below: str):
    """huggingface_hub keeps a repository's files in blobs/, and a snapshot of links to them."""
    blobs, snapshot = tmp_path / "datasets--a--b" / "blobs", tmp_path / "datasets--a--b" / "snapshots" / "c0ffee" / below
    blobs.mkdir(parents=True)
    for path in sorted(cache.rglob("*")):
        if path.is_file():
            blob = blobs / path.name
            shutil.move(path, blob)
            link = snapshot / path.relative_to(cache)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    read_all(snapshot)
    assert verify_cache(snapshot).is_sound
    blob = blobs / one_of(snapshot, paths.INDEX).name  # a blob that is itself a link leads elsewhere
    shutil.move(blob, tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptCacheError, match="leads out of its folder"):
        read_all(snapshot)


def test_a_private_file_is_not_written_through_a_link(tmp_path: Path):
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (tmp_path / "run.json-unfinished").symlink_to(theirs)
    write_new(tmp_path / "run.json-unfinished", b"ours")
    assert theirs.read_text() == "theirs"
    assert read_regular(tmp_path / "run.json-unfinished", tmp_path) == b"ours"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none", tmp_path)


def test_blocks_are_plain_files(tmp_path: Path):
    blocks, key = DiskBlocks(tmp_path / "blocks", 2**20), f"{'0' * 64}-1"
    blocks.put(key, b"data")
    path = tmp_path / "blocks" / f"{key}.block"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert blocks.get(key) is None
    pipe(path)
    assert blocks.get(key) is None
    blocks.put(key, b"data")
    assert blocks.get(key) is not None
