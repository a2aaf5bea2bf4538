import pickle
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from memory_reader import MemoryReader, assert_same_stream, sequences_of

import kdcache
from kdcache.config.loader import LoaderConfig, MixConfig
from kdcache.errors import CacheNotFoundError, ConfigError, MismatchError, StateError
from kdcache.loader.cache import Cache, open_cache
from kdcache.loader.loader import Loader
from kdcache.loader.view import PackedView
from kdcache.store.writing.writer import CacheWriter

LENGTHS = np.random.default_rng(1).integers(1, 13, 40).tolist()
OPTIONS = LoaderConfig(seq_len=16, batch_rows=4, packing_buffer=8, num_threads=2)
SHARDS = (0, 9, 20, 40)


def write(path: Path, memory: MemoryReader) -> Path:
    """A cache of three shards."""
    writer = CacheWriter.open(path, memory.manifest, record_batch_bytes=2000)
    for unit in range(3):
        writer.write_unit(unit, memory.records[SHARDS[unit] : SHARDS[unit + 1]])
    writer.fold()
    return path


def memory_of(first: int = 0, lengths: list[int] = LENGTHS, **identity: object) -> MemoryReader:
    return MemoryReader(lengths, first=first, identity={"num_units": 3} | identity)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("caches") / "one", memory_of())


@pytest.fixture
def cache(path: Path) -> Cache:
    return open_cache(str(path))


def number_of(record: kdcache.SequenceRecord) -> int:
    return int(record.sequence.input_ids_N[0]) // 1000


def test_an_open_cache_is_a_sequence_of_records(cache: Cache) -> None:
    assert len(cache) == 40
    assert [number_of(cache[i]) for i in (0, 7, 39, -1, -40)] == [0, 7, 39, 39, 0]
    assert [number_of(record) for record in cache.get([5, 30, 5, -1])] == [5, 30, 5, 39]
    assert [number_of(record) for record in cache] == list(range(40))
    assert cache.num_tokens_S.tolist() == LENGTHS
    for outside in (40, -41):
        with pytest.raises(IndexError, match="of 40"):
            cache[outside]


def test_a_selection_is_a_cache_of_its_sequences_alone(cache: Cache) -> None:
    some = cache.select([3, 30, -1, 3])
    assert [number_of(some[i]) for i in range(len(some))] == [3, 30, 39, 3]
    assert some.num_tokens_S.tolist() == [LENGTHS[i] for i in (3, 30, 39, 3)]
    assert [number_of(record) for record in some.select([1, 0])] == [30, 3]
    flags = np.arange(40) % 7 == 0
    assert [number_of(record) for record in cache.select(flags)] == [0, 7, 14, 21, 28, 35]
    assert len(cache.select([])) == 0


def test_a_filter_sees_the_columns_of_the_index(cache: Cache) -> None:
    short = cache.filter(lambda c: c["num_tokens"] <= 4)
    assert [number_of(record) for record in short] == [i for i, n in enumerate(LENGTHS) if n <= 4]
    second = short.filter(lambda c: c["unit"] == 1)
    assert set(second.columns()["index"].tolist()) <= set(range(9, 20))
    assert cache.columns()["unit"].tolist() == [0] * 9 + [1] * 11 + [2] * 20
    positions = [int(record.sequence.supervised_N.sum()) for record in cache]
    assert cache.columns()["num_positions"].tolist() == positions


def test_shards_of_a_selection_are_the_stretches_in_one_shard(cache: Cache) -> None:
    assert cache.shard_sizes.tolist() == [9, 11, 20]
    assert cache.select(range(5, 30)).shard_sizes.tolist() == [4, 11, 10]
    assert cache.select([0, 1, 30, 2]).shard_sizes.tolist() == [2, 1, 1]


@pytest.mark.parametrize("numbers", [[40], [-41], [0.5], [[1]], [True, False]])
def test_a_selection_that_is_none_is_refused(cache: Cache, numbers: list[object]) -> None:
    with pytest.raises(ConfigError, match="select got"):
        cache.select(numbers)  # pyright: ignore[reportArgumentType]


def test_sources_say_where_sequences_came_from(cache: Cache) -> None:
    assert cache.select([4, 2]).sources() == ["memory#4", "memory#2"]


def test_a_selection_has_a_name_of_its_own_in_the_state(cache: Cache) -> None:
    half = cache.select(range(20))
    assert half.snapshot != cache.snapshot
    assert half.snapshot == cache.select(np.arange(20)).snapshot
    state = Loader(half, OPTIONS).state_dict()
    with pytest.raises(StateError, match=rf"snapshot '{half.snapshot}', here '{cache.snapshot}'"):
        Loader(cache, OPTIONS).load_state_dict(state)
    assert sorted(s for batch in Loader(half, OPTIONS) for s in sequences_of(batch)) == list(range(20))


def test_the_name_of_a_selection_is_computed_once_and_cannot_become_wrong(cache: Cache) -> None:
    half = cache.select(range(20))
    assert half.snapshot is half.snapshot
    assert pickle.loads(pickle.dumps(half)).snapshot == half.snapshot
    with pytest.raises(ValueError, match="read-only"):
        half.columns()["index"][0] = 7


def test_a_loader_takes_an_address_and_closes_what_it_opened(path: Path, cache: Cache) -> None:
    expected = list(Loader(cache, OPTIONS))
    with Loader(str(path), OPTIONS) as loader:
        assert_same_stream(list(loader), expected)
    with Loader(path, OPTIONS) as loader:
        assert_same_stream(list(loader), expected)
    assert_same_stream(list(PackedView(path, OPTIONS)), list(PackedView(cache, OPTIONS)))
    with pytest.raises(CacheNotFoundError):
        Loader([cache, str(path) + "-not-there"], OPTIONS)
    with pytest.raises(ConfigError, match="no cache"):
        Loader([], OPTIONS)


@pytest.mark.parametrize("order", ["global", "local"])
def test_several_caches_on_disk_give_the_stream_of_the_same_records_in_memory(tmp_path: Path, path: Path, order: str) -> None:
    other = memory_of(100, LENGTHS[:25] + [3] * 15, num_units=3)
    options = LoaderConfig(
        seq_len=16, batch_rows=4, order=order, local_shards=2, mix=MixConfig(counts=(50, 15)), num_threads=2  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    in_memory = [memory_of(shards=(9, 11, 20)), memory_of(100, LENGTHS[:25] + [3] * 15, shards=(9, 11, 20))]
    with Loader([path, write(tmp_path / "other", other)], options) as loader:
        for epoch in range(2):
            assert_same_stream(list(loader), list(Loader(in_memory, options, epoch=epoch)))


@pytest.mark.parametrize(
    ("identity", "sentence"),
    [
        ({"tokenizer": "1"}, "tokenizer fingerprint '0' and '1'"),
        ({"vocab_size": 2**20 + 1}, "teacher's vocabulary 1048576 and 1048577"),
        ({"kind": "top_p_k"}, "selection 'top_k' and 'top_p_k'"),
    ],
)
def test_caches_that_cannot_share_a_batch_are_refused(identity: dict[str, object], sentence: str) -> None:
    with pytest.raises(MismatchError, match=f"cannot be mixed: .*{sentence}"):
        Loader([MemoryReader([3]), MemoryReader([3], identity=identity)], OPTIONS)


def test_caches_of_different_k_share_batches_of_the_larger() -> None:
    readers = [MemoryReader([3] * 8, k=2, supervised="all"), MemoryReader([3] * 8, k=5, first=50, supervised="all")]
    batches = list(Loader(readers, OPTIONS))
    assert {batch.teacher.token_ids_PK.shape[1] for batch in batches} == {5}
    sizes = {int((ids >= 0).sum()) for batch in batches for ids in batch.teacher.token_ids_PK}
    assert sizes == {2, 5}


def lengths_in(cache: Cache) -> list[int]:
    return [cache[i].sequence.num_tokens for i in range(len(cache))]


def test_a_cache_can_be_used_in_forked_processes(cache: Cache) -> None:
    some = cache.select([3, 1, 4])
    expected = lengths_in(some)
    with get_context("fork").Pool(2) as pool:
        assert pool.map(lengths_in, [some, cache.select([5])]) == [expected, [LENGTHS[5]]]


def test_a_cache_and_a_loader_can_be_sent_to_a_fresh_process(cache: Cache, tmp_path: Path) -> None:
    loader = Loader(cache.select(range(30)), OPTIONS)
    next(iter(loader))
    (tmp_path / "pickled").write_bytes(pickle.dumps((cache.select([3, 1]), loader)))
    program = (
        "import pickle, sys; cache, loader = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print([r.sequence.num_tokens for r in cache], [b.num_tokens for b in loader], loader.report().num_batches)"
    )
    result = subprocess.run([sys.executable, "-c", program, tmp_path / "pickled"], capture_output=True, text=True, check=True)
    rest = [batch.num_tokens for batch in loader]
    assert result.stdout.strip() == f"{[LENGTHS[3], LENGTHS[1]]} {rest} {len(rest) + 1}"
    assert len((tmp_path / "pickled").read_bytes()) < 5000


def test_the_report_adds_up_over_an_epoch_and_is_marked_where_it_was_resumed() -> None:
    loader = Loader(memory_of(), OPTIONS)
    batches = list(loader)
    report = loader.report()
    assert report.is_complete
    assert (report.epoch, report.first_batch, report.num_batches) == (0, 0, len(batches))
    assert (report.num_sequences, report.num_tokens) == (40, sum(LENGTHS))
    assert report.num_positions == sum(len(batch.flat_positions_P) for batch in batches)
    assert report.padding_share == 1 - sum(LENGTHS) / (16 * 4 * len(batches))
    assert "40 sequences" in str(report)
    resumed = Loader(memory_of(), OPTIONS)
    first = next(iter(resumed))
    other = Loader(memory_of(), OPTIONS)
    other.load_state_dict(resumed.state_dict())
    list(other)
    assert (other.report().first_batch, other.report().num_batches) == (1, len(batches) - 1)
    assert first.num_sequences + other.report().num_sequences == 40


def test_the_public_names_are_these(path: Path) -> None:
    with kdcache.open(str(path)) as cache, kdcache.Loader(cache) as loader:
        assert isinstance(cache, kdcache.Cache)
        assert sum(batch.num_sequences for batch in loader) == 40
