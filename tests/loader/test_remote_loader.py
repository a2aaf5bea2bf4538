"""Training batches from an S3 server: those of the local copy, whatever the network does, fetched ahead and once."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cache_making import make_cache, make_unit
from fault_proxy import FaultProxy
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry as filesystems

import kdcache
from kdcache.config.loader import LoaderConfig
from kdcache.config.remote import RemoteConfig
from kdcache.errors import ConfigError
from kdcache.extras import STORES
from kdcache.loader.loader import Loader
from kdcache.store.files.location import RemotePath

NUM_UNITS, NUM_SEQUENCES = 5, 6
OPTIONS = {
    order: LoaderConfig(seq_len=32, batch_rows=2, packing_buffer=8, order=order, local_shards=2, num_threads=2)
    for order in ("global", "local")
}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    units = [make_unit(unit, num_sequences=NUM_SEQUENCES) for unit in range(NUM_UNITS)]
    return make_cache(tmp_path_factory.mktemp("remote") / "cache", units=units)


@pytest.fixture
def cache(s3: FaultProxy, local) -> str:
    uri = copied(local, f"s3://{s3.bucket}/cache", RemoteConfig())
    s3.requests.clear()
    return uri


def copied(local: Path, uri: str, config: RemoteConfig) -> str:
    for path in local.rglob("*.*"):
        if path.is_file():
            RemotePath(f"{uri}/{path.relative_to(local).as_posix()}", config).write_bytes(path.read_bytes())
    return uri


def stream(loader: Loader, num_epochs: int = 2) -> list[bytes]:
    return [
        b"".join(
            np.ascontiguousarray(values).tobytes() for values in (b.input_ids_BT, b.teacher.token_ids_PK, b.teacher.logprobs_PK)
        )
        for _ in range(num_epochs)
        for b in loader
    ]


@pytest.mark.parametrize("order", OPTIONS)
def test_the_stream_is_that_of_the_local_copy_whatever_the_network_does(cache, local, s3, tmp_path, order, monkeypatch):
    with kdcache.open(local) as on_disk, Loader(on_disk, OPTIONS[order]) as loader:
        expected = stream(loader)
    faults = ["unavailable", "reset", "truncated", "short", "lost", "broken", "slow"]
    s3.choose = lambda request: faults[request.number // 4 % 7] if request.number % 4 == 0 else None
    monkeypatch.setattr(s3, "slow_seconds", 2.0)
    config = RemoteConfig(deadline_seconds=60.0, timeout_seconds=1.0, block_dir=str(tmp_path / "blocks"), block_bytes=2**20)
    with kdcache.open(cache, remote=config) as reader, Loader(reader, OPTIONS[order]) as loader:
        assert stream(loader) == expected
        assert len(loader._layout_of(0).batch(0).rows) == 2
    assert set(s3.faults) == set(faults)


@pytest.mark.parametrize("order", OPTIONS)
def test_each_byte_is_asked_for_once_where_there_is_room_for_the_window(cache, s3, tmp_path, order):
    with kdcache.open(cache, remote=RemoteConfig(block_dir=str(tmp_path), block_bytes=2**20)) as reader:
        with Loader(reader, OPTIONS[order]) as loader:
            stream(loader)
        num_batches = sum(reader.reader.num_record_batches(shard.unit) for shard in reader.manifest.shards)
    reads = [request for request in s3.requests if request.is_read and "/data/" in request.path]
    assert len({(request.path, request.headers["Range"]) for request in reads}) == len(reads)
    assert len(reads) < num_batches + NUM_UNITS  # some in one request: neighbours that were wanted together


def test_windows_that_come_and_go_read_a_shard_once_an_epoch_although_not_all_fit(cache, s3, local, tmp_path):
    largest = max(path.stat().st_size for path in (local / "data").iterdir())
    config = RemoteConfig(block_dir=str(tmp_path), block_bytes=4 * largest)
    with kdcache.open(cache, remote=config) as reader, Loader(reader, OPTIONS["local"]) as loader:
        stream(loader, 1)
    fetched = sum(
        int(stop) - int(start) + 1
        for request in s3.requests
        if request.is_read and "/data/" in request.path
        for start, stop in [request.headers["Range"].removeprefix("bytes=").split("-")]
    )
    total = sum(path.stat().st_size for path in (local / "data").iterdir())
    assert total < fetched <= 2 * total  # of shards this small the footer's request brings the whole of each


@pytest.mark.parametrize("order", OPTIONS)
def test_a_folder_that_is_too_small_for_the_window_is_refused_at_the_start_with_the_size_needed(cache, tmp_path, order):
    config = RemoteConfig(block_dir=str(tmp_path), block_bytes=3000)
    refused = pytest.raises(ConfigError, match=r"remote\.block_bytes is 3000, .* set remote\.block_bytes to \d+ or more")
    with kdcache.open(cache, remote=config) as reader, Loader(reader, OPTIONS[order]) as loader, refused:
        iter(loader)


def needed(cache: str, options: LoaderConfig, folder: Path, num_workers: int) -> int:
    """Bytes that a loader asks for, as one of so many workers, where there is room for none."""
    config, refused = RemoteConfig(block_dir=str(folder), block_bytes=1), pytest.raises(ConfigError)
    with kdcache.open(cache, remote=config) as reader, Loader(reader, options) as loader, refused as error:
        loader.iterate(step=num_workers)
    return int(re.findall(r"to (\d+) or more", str(error.value))[0])


def test_workers_that_share_a_folder_need_a_window_each_where_they_read_all_over_the_cache(cache, tmp_path):
    options = LoaderConfig(seq_len=32, batch_rows=1, num_threads=0, prefetch_batches=1)
    local = msgspec.structs.replace(options, order="local", local_shards=2)
    one = needed(cache, options, tmp_path, 1)
    assert one < needed(cache, options, tmp_path, 2) <= 3 * one
    assert needed(cache, local, tmp_path, 2) == needed(cache, local, tmp_path, 1)


def test_a_selection_and_a_mix_of_a_remote_and_a_local_cache_are_fetched_ahead_too(cache, local, s3):
    even = range(0, NUM_UNITS * NUM_SEQUENCES, 2)
    with kdcache.open(local) as on_disk, kdcache.open(cache) as remote:
        with Loader([on_disk, on_disk.select(even)], OPTIONS["global"]) as loader:
            expected = stream(loader, 1)
        with Loader([on_disk, remote.select(even)], OPTIONS["global"]) as loader:
            assert stream(loader, 1) == expected


def test_a_resumed_loader_and_a_pickled_one_go_on_with_the_same_stream(cache, local):
    options = OPTIONS["local"]
    with Loader(str(local), options) as loader:
        expected = stream(loader, 1)
    with Loader(cache, options) as loader:
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        state = loader.state_dict()
    with Loader(cache, options) as loader:
        loader.load_state_dict(state)
        with pickle.loads(pickle.dumps(loader)) as again:
            assert stream(again, 1) == expected[3:]
        assert stream(loader, 1) == expected[3:]


@pytest.mark.parametrize("uri", ["gs://bucket/folder/cache", "hf://datasets/someone/folder/cache"])
def test_a_cache_under_another_scheme_gives_the_stream_of_the_local_copy(local, tmp_path, monkeypatch, uri):
    """Of what is ours alone: in place of the stores' own packages fsspec's memory stands under their names."""
    scheme = uri.partition("://")[0]

    class Store(MemoryFileSystem):
        protocol, store, pseudo_dirs = scheme, {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            assert path.partition("://")[0] in (scheme, path), "what this store is asked for is its own"
            return super()._strip_protocol(path.removeprefix(f"{scheme}://"))

    monkeypatch.setitem(filesystems, scheme, Store)
    monkeypatch.setitem(STORES, scheme, "fsspec")  # gcsfs need not be installed
    # Of a number of threads that nothing else asks for: stores are kept by their configs.
    config = RemoteConfig(block_dir=str(tmp_path), block_bytes=2**20, num_threads=3)
    copied(local, uri, config)
    with kdcache.open(local) as on_disk, Loader(on_disk, OPTIONS["local"]) as loader:
        expected = stream(loader)
    with kdcache.open(uri, remote=config) as cache, Loader(cache, OPTIONS["local"]) as loader:
        assert cache.reader.ahead is not None
        assert stream(loader) == expected
    assert any("/data/" in name for name in Store.store)
