"""Writing to an S3 server over HTTP: what is complete is there, what is not is not, and of two writers one comes first."""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from cache_making import assert_same_record, make_identity, make_manifest, make_record, make_unit
from fault_proxy import FaultProxy, Request

from kdcache.config.remote import RemoteConfig
from kdcache.errors import CacheNotFoundError, ConfigError, MismatchError, MissingDependencyError, StorageError
from kdcache.store import chain
from kdcache.store.files import fs
from kdcache.store.files.location import RemotePath, locate
from kdcache.store.reader import open_reader
from kdcache.store.verify import verify_cache
from kdcache.store.writing.set_aside import FailedUnit, read_failures, record_failure
from kdcache.store.writing.writer import CacheWriter

QUICK = RemoteConfig(deadline_seconds=20.0, timeout_seconds=5.0, num_threads=4)


@pytest.fixture
def uri(s3: FaultProxy) -> str:
    return f"s3://{s3.bucket}/cache"


def write(uri: str, units, num_units: int, remote: RemoteConfig = QUICK) -> CacheWriter:
    writer = CacheWriter.open(uri, make_manifest(num_units), remote=remote)
    for unit in units:
        writer.write_unit(unit, make_unit(unit))
    return writer


def assert_complete(uri: str, num_units: int) -> None:
    assert verify_cache(uri).problems == []
    with open_reader(uri) as reader:
        assert reader.manifest.is_complete
        expected = [record for unit in range(num_units) for record in make_unit(unit)]
        assert len(reader) == len(expected)
        for number, record in enumerate(expected):
            assert_same_record(reader[number], record)


def names(uri: str, directory: str) -> set[str]:
    return {path.name for path in (locate(uri) / directory).iterdir()}


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_other_schemes_are_written_and_read_the_same_way(tmp_path, scheme):
    uri = (tmp_path / "a cache").as_uri() if scheme == "file" else f"memory://{tmp_path.name}/cache"
    write(uri, range(3), 3).fold()
    assert_complete(uri, 3)
    with pytest.raises(CacheNotFoundError):
        open_reader(f"{uri}-not-there")


def test_a_resumed_cache_is_complete_and_a_unit_done_twice_is_folded_once(uri):
    write(uri, [0, 1], 3).fold()
    assert write(uri, [], 3).published_units() == {0, 1}
    second = CacheWriter.open(uri, make_manifest(3), record_batch_bytes=1, remote=QUICK)
    second.write_unit(1, make_unit(1))
    second.write_unit(2, make_unit(2))
    assert second.fold().is_complete
    assert_complete(uri, 3)
    assert len(names(uri, "data")) == len(names(uri, "journal")) == 3


def test_what_is_no_cache_or_another_one_is_refused(uri):
    (locate(uri) / "notes.txt").write_bytes(b"mine")
    with pytest.raises(MismatchError, match="is not a cache and not empty"):
        write(uri, [], 3)
    write(f"{uri}2", [0], 3)
    with pytest.raises(MismatchError, match="holds another capture"):
        write(f"{uri}2", [], 4)


def see_alone(writer: CacheWriter, units: set[int]) -> None:
    whole = writer._journal
    writer._journal = lambda folded: (shard for shard in whole(folded) if shard.unit in units)


def test_of_two_writers_of_one_manifest_one_comes_first_and_the_other_folds_again(uri, s3):
    first, second = write(uri, [0, 1], 4), write(uri, [2, 3], 4)
    together, met = threading.Barrier(2), []

    def meet(request: Request) -> None:
        if request.method == "PUT" and "manifests/000001" in request.path and len(met) < 2:
            met.append(request)
            together.wait(timeout=10)

    # Each folds its own units alone: the other's are not in the journal that it reads.
    s3.choose = meet
    folds = [threading.Thread(target=writer.fold) for writer in (first, second)]
    see_alone(first, {0, 1})
    see_alone(second, {2, 3})
    for fold in folds:
        fold.start()
    for fold in folds:
        fold.join()
    assert len(met) == 2
    assert chain.manifest_numbers(locate(uri)) == [0, 1, 2]
    assert_complete(uri, 4)


def test_a_manifest_whose_answer_was_lost_counts_as_published(uri, s3):
    lost = []

    def lose(request: Request) -> str | None:
        if request.method == "PUT" and "manifests/" in request.path and request.path not in lost:
            lost.append(request.path)
            return "lost"
        return None

    s3.choose = lose
    write(uri, range(2), 2).fold()
    assert len(lost) == 2
    assert chain.manifest_numbers(locate(uri)) == [0, 1]
    assert_complete(uri, 2)


def test_faults_of_any_kind_while_writing_leave_a_sound_cache(uri, s3):
    faults = ["unavailable", "reset", "lost", "broken"]
    s3.choose = lambda request: faults[request.number // 5 % 4] if request.number % 5 == 0 else None
    write(uri, range(3), 3).fold()
    assert set(s3.faults) == set(faults)
    s3.choose = lambda request: None
    assert_complete(uri, 3)


def test_a_store_that_goes_away_fails_the_unit_in_words_and_leaves_no_file_behind(uri, s3, tmp_path):
    config = RemoteConfig(deadline_seconds=2.0, timeout_seconds=2.0, spool_dir=str(tmp_path / "spool"))
    writer = write(uri, [0], 2, config)
    s3.choose = lambda request: "unavailable"
    with pytest.raises(
        StorageError, match=r"unit 1 could not be written.*no good answer within 2 s.*nothing published is lost"
    ):
        writer.write_unit(1, make_unit(1))
    assert list((tmp_path / "spool").iterdir()) == []
    s3.choose = lambda request: None
    writer.write_unit(1, make_unit(1))
    assert writer.fold().is_complete


def test_a_dead_writers_spooled_shard_is_swept(uri, tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    left = spool / fs.temp_name().replace(f"-{os.getpid()}-", "-4194305-")
    left.write_bytes(b"half a shard")
    write(uri, [0], 1, RemoteConfig(spool_dir=str(spool)))
    assert list(spool.iterdir()) == []


def test_a_large_object_appears_with_its_last_part(s3: FaultProxy, tmp_path):
    path = RemotePath(f"s3://{s3.bucket}/large", QUICK)
    local = tmp_path / "file"
    local.write_bytes(np.random.default_rng(0).bytes(40 * 2**20))
    seen = []

    def look(request: Request) -> str | None:
        if request.method == "PUT" and "partNumber" in request.path:
            seen.append(path_exists(s3))
        return "unavailable" if len(seen) == 2 and request.method == "PUT" else None  # then it begins anew

    s3.choose = look
    path.upload(local)
    assert len(seen) > 3
    assert not any(seen)
    path.download(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == local.read_bytes()


def path_exists(s3: FaultProxy) -> bool:
    """Asked of the server itself, in the middle of a request to the proxy."""
    import http.client

    connection = http.client.HTTPConnection(*s3.upstream, timeout=30)
    connection.request("HEAD", f"/{s3.bucket}/large")
    status = connection.getresponse().status
    connection.close()
    return status == 200


def test_failures_are_recorded_and_read(uri):
    root = locate(uri)
    failed = FailedUnit(unit=3, error="TeacherError", reason="no", attempts=2)
    record_failure(root, failed)
    record_failure(root, failed)
    assert read_failures(root, published=()) == [failed]
    assert read_failures(root, published={3}) == []


def test_paths_and_uris_are_told_apart():
    assert locate("a/b") == Path("a/b")
    assert locate(Path("a/b")) == Path("a/b")
    assert locate("file:///a%20b/c") == Path("/a b/c")
    assert str(locate("s3://bucket/a/b/")) == "s3://bucket/a/b"
    assert str(locate("gs://bucket/a") / "data/x") == "gs://bucket/a/data/x"
    assert locate("hf://datasets/u/r/c").name == "c"
    for wrong in ("file://elsewhere/a", "gopher://a", "s3://"):
        with pytest.raises(ConfigError):
            locate(wrong)


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_store_whose_package_is_missing_says_which_extra_brings_it():
    with pytest.raises(MissingDependencyError, match=r"gs:// needs the package 'gcsfs'.*kdcache\[gs\]"):
        open_reader("gs://bucket/cache")


def test_a_fold_reads_of_a_shard_what_its_index_rows_are_made_of(uri, s3):
    record = make_record(0, num_tokens=400, k=60)
    writer = CacheWriter.open(uri, make_manifest(1, make_identity(k=60)), record_batch_bytes=4 * 10**5, remote=QUICK)
    shard = writer.write_unit(0, [record] * 32)
    s3.requests.clear()
    assert writer.fold().is_complete
    spans = [r.headers["Range"].removeprefix("bytes=").split("-") for r in s3.requests if r.is_read and "/data/" in r.path]
    assert shard.num_bytes > 6 * 10**6
    assert sum(int(stop) - int(start) + 1 for start, stop in spans) < shard.num_bytes / 3
    assert len(spans) == 12  # the footer, and one for each record batch
