"""Reading from an S3 server over HTTP, through a proxy that fails, cuts, delays and changes answers."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import random
import shutil
import threading

import hostile
import numpy as np
import pytest
from cache_making import assert_same_record, make_cache, make_record, make_unit
from fault_proxy import FaultProxy, Request

from kdcache.config.remote import RemoteConfig
from kdcache.errors import CacheNotFoundError, ConfigError, CorruptCacheError, StorageError
from kdcache.store.files.location import RemotePath, locate
from kdcache.store.reader import CacheReader, open_reader
from kdcache.store.verify import verify_cache

NUM_UNITS, NUM_SEQUENCES = 3, 5
EXPECTED = [record for unit in range(NUM_UNITS) for record in make_unit(unit, num_sequences=NUM_SEQUENCES)]
ORDER = np.random.default_rng(0).permutation(len(EXPECTED)).tolist()
QUICK = RemoteConfig(deadline_seconds=30.0, timeout_seconds=1.5, num_threads=4)


def copy_to_store(folder, uri: str) -> str:
    """What `aws s3 cp --recursive` does."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            RemotePath(f"{uri}/{path.relative_to(folder).as_posix()}", RemoteConfig()).write_bytes(path.read_bytes())
    return uri


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("remote") / "cache", num_units=NUM_UNITS, num_sequences=NUM_SEQUENCES)


@pytest.fixture
def cache(s3: FaultProxy, local) -> str:
    uri = copy_to_store(local, f"s3://{s3.bucket}/some/cache")
    s3.requests.clear()
    return uri


def assert_stream(reader: CacheReader, order=ORDER) -> None:
    for number in order:
        assert_same_record(reader[number], EXPECTED[number])


def ranges(s3: FaultProxy) -> list[Request]:
    return [request for request in s3.requests if "Range" in request.headers and "/data/" in request.path]


def now_and_then(*faults: str, share: float = 0.3):
    """A fault for some of the reads of objects, the same ones in each run, never five times in a row."""
    draws, lock, in_turn = random.Random(1), threading.Lock(), itertools.cycle(faults)

    def choose(request: Request) -> str | None:
        with lock:
            return next(in_turn) if request.method == "GET" and draws.random() < share else None

    return choose


def test_a_cache_in_a_store_reads_as_the_one_on_disk(cache, local):
    with open_reader(cache) as remote, open_reader(local) as reader:
        assert len(remote) == len(reader)
        assert remote.snapshot == reader.snapshot
        assert np.array_equal(remote.num_tokens_S, reader.num_tokens_S)
        assert np.array_equal(remote.num_positions_S, reader.num_positions_S)
        assert_stream(remote)
    assert verify_cache(cache).problems == []


def test_what_is_read_ahead_is_not_asked_for_again_and_neighbours_come_in_one_request(cache, s3):
    with open_reader(cache, remote=QUICK) as reader:
        reader.ahead.prefetch(range(len(reader)))
        reader.ahead.prefetch(range(len(reader)))
        assert_stream(reader)
        assert len(ranges(s3)) == NUM_UNITS * 3  # a footer, four record batches, one record batch
        assert_stream(reader)
        assert len(ranges(s3)) == NUM_UNITS * 3


def test_threads_that_want_the_same_record_batch_at_once_ask_for_it_once(cache, s3):
    with open_reader(cache, remote=QUICK) as reader:
        start = threading.Barrier(6)

        def read() -> None:
            start.wait()
            assert_same_record(reader[7], EXPECTED[7])

        threads = [threading.Thread(target=read) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(ranges(s3)) == 2  # the footer and the record batch


def test_blocks_in_a_folder_are_read_by_the_next_reader_without_a_request_for_data(cache, s3, tmp_path):
    config = RemoteConfig(block_dir=str(tmp_path / "blocks"), block_bytes=2**20)
    with open_reader(cache, remote=config) as reader:
        assert_stream(reader)
    s3.requests.clear()
    with open_reader(cache, remote=config) as reader:
        assert_stream(reader)
    assert not ranges(s3)
    assert not [request for request in s3.requests if "/index/" in request.path]


@pytest.mark.parametrize("fault", ["unavailable", "broken", "reset", "lost", "truncated", "short"])
def test_no_fault_gives_a_wrong_record_or_ends_the_stream(cache, s3, fault):
    s3.choose = now_and_then(fault)
    with open_reader(cache, remote=QUICK) as reader:
        reader.ahead.prefetch(ORDER)
        assert_stream(reader)
    assert fault in s3.faults


@pytest.mark.parametrize("name", ["/data/", "/index/", "/manifests/"])
def test_bytes_that_are_changed_on_their_way_are_noticed_and_read_again(cache, s3, name):
    reads = itertools.count()

    def choose(request: Request) -> str | None:
        return "changed" if request.is_read and name in request.path and next(reads) in (0, 4) else None

    s3.choose = choose
    with open_reader(cache, remote=QUICK) as reader:
        reader.ahead.prefetch(ORDER)
        assert_stream(reader)
    assert "changed" in s3.faults


@pytest.mark.slow
def test_slow_answers_are_given_up_and_asked_for_again(cache, s3):
    s3.choose = now_and_then("slow", share=0.1)
    with open_reader(cache, remote=QUICK) as reader:
        assert_stream(reader)
    assert "slow" in s3.faults


def test_all_faults_at_once_change_nothing(cache, s3, tmp_path):
    s3.choose = now_and_then("unavailable", "reset", "truncated", "short", "lost")
    config = RemoteConfig(deadline_seconds=30.0, timeout_seconds=2.0, block_dir=str(tmp_path / "b"), block_bytes=20_000)
    with open_reader(cache, remote=config) as reader:
        for first in range(0, len(ORDER), 4):
            reader.ahead.prefetch(ORDER[first : first + 8])
            assert_stream(reader, ORDER[first : first + 4])
    assert len(set(s3.faults)) == 5


def test_a_store_that_stays_away_ends_in_a_sentence_at_the_deadline(cache, s3):
    with open_reader(cache, remote=RemoteConfig(deadline_seconds=2.0, timeout_seconds=2.0)) as reader:
        s3.choose = lambda request: "unavailable"
        with pytest.raises(StorageError, match=r"no good answer within 2 s and \d+ attempts"):
            reader[0]


def test_damage_in_the_store_itself_is_read_twice_and_then_told(cache, s3, local):
    shard = sorted((local / "data").iterdir())[0]
    damage = shard.read_bytes().replace(EXPECTED[1].sequence.input_ids_N.tobytes(), bytes(4 * EXPECTED[1].sequence.num_tokens))
    RemotePath(f"{cache}/data/{shard.name}", RemoteConfig()).write_bytes(damage)
    with open_reader(cache, remote=QUICK) as reader:
        assert_same_record(reader[0], EXPECTED[0])
        before = len(ranges(s3))
        with pytest.raises(CorruptCacheError, match=f"{cache}/data/{shard.name}: record batch 1, sequence 0: the digest"):
            reader[1]
        assert len(ranges(s3)) - before == 3  # the record batch; then the footer and the record batch again
        assert_same_record(reader[2], EXPECTED[2])
    assert any(shard.name in problem for problem in verify_cache(cache).problems)


def test_a_truncated_and_a_missing_shard_are_told_without_waiting_for_the_deadline(cache, local):
    first, second, _ = sorted(path.name for path in (local / "data").iterdir())
    path = RemotePath(f"{cache}/data/{first}", RemoteConfig())
    path.write_bytes(path.read_bytes()[:-100])
    RemotePath(f"{cache}/data/{second}", RemoteConfig()).unlink()
    with open_reader(cache) as reader:
        with pytest.raises(CorruptCacheError, match="it is truncated or damaged"):
            reader[0]
        with pytest.raises(CorruptCacheError, match="the shard is missing"):
            reader[NUM_SEQUENCES]
        assert_same_record(reader[2 * NUM_SEQUENCES], EXPECTED[2 * NUM_SEQUENCES])


def test_a_place_without_a_cache_says_so(s3):
    with pytest.raises(CacheNotFoundError, match=f"no cache at 's3://{s3.bucket}/nothing'"):
        open_reader(f"s3://{s3.bucket}/nothing")


def test_a_pickled_reader_reads_on(cache):
    with open_reader(cache, remote=QUICK) as reader:
        assert_stream(reader, ORDER[:3])
        with pickle.loads(pickle.dumps(reader)) as other:
            assert other.root.config == QUICK
            assert_stream(other)


@pytest.mark.parametrize("blocks", [None, "blocks"])
def test_a_reader_may_be_used_after_a_fork(cache, tmp_path, blocks):
    config = RemoteConfig(block_dir=None if blocks is None else str(tmp_path / blocks), block_bytes=2**20)
    with open_reader(cache, remote=config) as reader:
        reader.ahead.prefetch(ORDER)
        assert_stream(reader, ORDER[:3])
        reader.ahead.prefetch(ORDER)
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=assert_stream, args=(reader,)) for _ in range(2)]
        for child in children:
            child.start()
        assert_stream(reader)
        for child in children:
            child.join(60)
            assert child.exitcode == 0


def test_several_threads_may_read_at_once(cache):
    errors = []

    def read(seed: int) -> None:
        try:
            assert_stream(reader, np.random.default_rng(seed).permutation(len(EXPECTED)).tolist())
        except BaseException as error:
            errors.append(error)

    with open_reader(cache, remote=QUICK) as reader:
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for first in range(len(ORDER)):
            reader.ahead.prefetch(ORDER[first:])
        for thread in threads:
            thread.join()
    assert errors == []


def test_a_window_that_does_not_fit_is_refused_with_the_size_that_would(cache, tmp_path):
    for config in (
        RemoteConfig(memory_bytes=20_000),
        RemoteConfig(block_dir=str(tmp_path / "blocks"), block_bytes=20_000),
    ):
        with open_reader(cache, remote=config) as reader:
            sizes = [shard.num_bytes for shard in reader.manifest.shards]
            needed = reader.ahead.largest_shards_bytes(2)
            assert needed == sum(sorted(sizes)[1:])
            reader.ahead.reserve(reader.ahead.largest_shards_bytes(1))
            with pytest.raises(ConfigError, match=rf"takes {needed} bytes: set remote\.\w+ to (\d+) or more") as refusal:
                reader.ahead.reserve(needed)
        enough = int(str(refusal.value).partition(" or more")[0].rpartition(" ")[2])
        field = "memory_bytes" if config.block_dir is None else "block_bytes"
        larger = {"block_dir": config.block_dir, field: enough}
        with open_reader(cache, remote=RemoteConfig(**larger)) as reader:
            reader.ahead.reserve(needed)


def test_the_bytes_of_a_window_are_known_from_the_index_within_some_percent(s3, tmp_path):
    units = [make_unit(unit, num_sequences=60) for unit in range(2)]
    folder = make_cache(tmp_path / "large", units=units, record_batch_bytes=1500)
    uri = copy_to_store(folder, f"s3://{s3.bucket}/large")
    with open_reader(uri) as reader:
        num_bytes = sum(shard.num_bytes for shard in reader.manifest.shards)
        assert reader.ahead.ahead_bytes(range(len(reader))) == pytest.approx(num_bytes, rel=0.01)
        assert reader.ahead.ahead_bytes([0, 1, 0]) < num_bytes / 10


def test_a_cache_on_disk_fetches_nothing_ahead(local):
    with open_reader(local) as reader:
        assert reader.ahead is None
    with open_reader(local.as_uri()) as reader:
        assert reader.root == local
        assert_stream(reader)


def test_compressed_buffers_in_a_store_are_refused_before_anything_is_allocated_for_them(s3):
    import pyarrow as pa

    from kdcache.store.remote.remote_file import open_columns, parse_record_batch, parse_tail, read_tail

    batch = pa.record_batch({"key": pa.array([0] * 10_000)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    path = locate(f"s3://{s3.bucket}/bomb.arrow")
    path.write_bytes(sink.getvalue().to_pybytes())
    num_bytes = path.stat().st_size
    layout = parse_tail(memoryview(read_tail(path.read_range, num_bytes)), num_bytes)
    block = path.read_range(layout.messages[0].offset, layout.messages[0].stop)
    with pytest.raises(CorruptCacheError, match="compressed buffers"):
        parse_record_batch(pa.py_buffer(block), layout.schema)
    with pytest.raises(CorruptCacheError, match="compressed buffers"):
        open_columns(path, num_bytes, ["key"])


def test_a_cache_that_claims_another_s_shards_puts_no_blocks_in_their_place(tmp_path):
    """A manifest's SHA-256 of a shard is a claim that no reader of parts can check."""
    sound = make_cache(tmp_path / "sound", units=[[make_record(0)]])
    lying = shutil.copytree(sound, tmp_path / "lying")
    (name,) = [path.relative_to(sound) for path in (sound / "data").iterdir()]
    claims = (sound / "manifests/000001.json").read_bytes()
    (before,) = [record.distributions.logprobs_E for record in open_reader(sound)]
    hostile.edit_rows(lying, hostile.set_list("logprobs", (before - 1).tolist()))
    hostile.shard_path(lying).rename(lying / name)
    (lying / "manifests/000001.json").write_bytes(claims)
    uris = [copy_to_store(folder, f"memory://claims/{folder.name}") for folder in (lying, sound)]
    config = RemoteConfig(block_dir=str(tmp_path / "blocks"), block_bytes=2**20)
    with open_reader(uris[0], remote=config) as first, open_reader(uris[1], remote=config) as second:
        np.testing.assert_array_equal(first[0].distributions.logprobs_E, before - 1)  # it reads, as its rows are signed
        np.testing.assert_array_equal(second[0].distributions.logprobs_E, before)
        assert first.snapshot == second.snapshot
