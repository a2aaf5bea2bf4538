"""The loader over a real cache on disk, against the same records in memory."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from memory_reader import MemoryReader, assert_same_stream

from kdcache.config.loader import LoaderConfig
from kdcache.errors import CorruptCacheError, StateError
from kdcache.loader.loader import Loader
from kdcache.loader.view import PackedView
from kdcache.store.reader import CacheReader, open_reader
from kdcache.store.writing.writer import CacheWriter

LENGTHS = np.random.default_rng(1).integers(1, 13, 40).tolist()
OPTIONS = LoaderConfig(seq_len=16, batch_rows=4, packing_buffer=8, num_threads=2)


def write_cache(path: Path, memory: MemoryReader) -> CacheReader:
    writer = CacheWriter.open(path, memory.manifest, record_batch_bytes=2000)
    writer.write_unit(0, memory.records)
    writer.fold()
    return open_reader(path)


@pytest.fixture
def memory() -> MemoryReader:
    return MemoryReader(LENGTHS)


def test_a_cache_on_disk_gives_the_stream_of_the_same_records_in_memory(tmp_path: Path, memory: MemoryReader) -> None:
    with write_cache(tmp_path / "cache", memory) as reader, Loader(reader, OPTIONS) as loader:
        for epoch in range(2):
            assert_same_stream(list(loader), list(Loader(memory, OPTIONS, epoch=epoch)))


def test_loader_and_view_of_a_cache_can_be_pickled_and_go_on(tmp_path: Path, memory: MemoryReader) -> None:
    with write_cache(tmp_path / "cache", memory) as reader, Loader(reader, OPTIONS) as loader:
        next(iter(loader))
        copy = pickle.loads(pickle.dumps(loader))
        assert_same_stream(list(copy), list(loader))
        view = PackedView(reader, OPTIONS)
        assert_same_stream(list(pickle.loads(pickle.dumps(view))), list(view))


def test_a_state_of_another_snapshot_is_refused(tmp_path: Path, memory: MemoryReader) -> None:
    with write_cache(tmp_path / "one", memory) as one, write_cache(tmp_path / "two", MemoryReader(LENGTHS[:-1])) as two:
        state = Loader(one, OPTIONS).state_dict()
        with pytest.raises(StateError, match=f"snapshot '{one.snapshot}', here '{two.snapshot}'"):
            Loader(two, OPTIONS).load_state_dict(state)


def test_a_flipped_bit_in_a_shard_is_an_error_at_its_batch_and_not_a_wrong_number(tmp_path: Path, memory: MemoryReader) -> None:
    write_cache(tmp_path / "cache", memory).close()
    shard = next((tmp_path / "cache" / "data").iterdir())
    data = bytearray(shard.read_bytes())
    place = data.index(memory.records[7].distributions.logprobs_E.tobytes())
    data[place] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    with open_reader(tmp_path / "cache") as reader, Loader(reader, OPTIONS) as loader:
        number = next(b for b in range(len(loader)) if any(7 in row for row in loader._layout.batch(b).rows))
        with pytest.raises(CorruptCacheError, match="digest"):
            list(loader)
        assert loader.state_dict()["next_batch"] == number
