import gc
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from memory_reader import MemoryReader, assert_same, assert_same_stream, make_record, sequences_of
from numpy.typing import NDArray

from kdcache.config.loader import LoaderConfig
from kdcache.errors import ConfigError, CorruptCacheError, StateError
from kdcache.format.record import SequenceRecord
from kdcache.loader.batches.batch import Batch, stack_batches
from kdcache.loader.caches import CacheSet
from kdcache.loader.loader import Loader
from kdcache.loader.prefetch import THREAD_NAME
from kdcache.loader.read import read_rows

LENGTHS = np.random.default_rng(0).integers(1, 13, 41).tolist()


@pytest.fixture(scope="module")
def reader() -> MemoryReader:
    return MemoryReader(LENGTHS)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


def make_options(**fields: Any) -> LoaderConfig:
    return LoaderConfig(**{"seq_len": 16, "batch_rows": 6, "packing_buffer": 8, "num_threads": 0, **fields})


def stream(loader: Loader, num_epochs: int) -> list[Batch]:
    return [batch for _ in range(num_epochs) for batch in loader]


def test_an_epoch_gives_every_sequence_once_in_the_order_of_its_plan(reader: MemoryReader) -> None:
    loader = Loader(reader, make_options())
    expected = [int(s) for b in range(len(loader)) for row in loader._layout.batch(b).rows for s in row]
    counts = loader.counts()
    batches = list(loader)
    assert [s for batch in batches for s in sequences_of(batch)] == expected
    assert sorted(expected) == list(range(41))
    assert len(batches) == counts.num_batches
    assert sum(batch.num_sequences for batch in batches) == counts.num_sequences
    assert sum(batch.num_tokens for batch in batches) == counts.num_tokens == sum(LENGTHS)


@pytest.mark.parametrize("lost", ["sequence", "token"])
def test_an_epoch_whose_batches_hold_less_than_was_planned_ends_with_an_error(
    reader: MemoryReader, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    def read_less(caches: CacheSet, rows: list[NDArray[np.int64]], *others: Any) -> Batch:
        if lost == "sequence":
            return read_rows(caches, [rows[0][1:], *rows[1:]], *others)
        batch = read_rows(caches, rows, *others)
        batch.segment_ids_BT[0, 0] = 0
        return batch

    loader = Loader(reader, make_options())
    monkeypatch.setattr("kdcache.loader.loader.read_rows", read_less)
    with pytest.raises(RuntimeError, match="the batches of an epoch of 41 sequences"):
        list(loader)


def test_each_loop_is_the_next_epoch_in_another_order(reader: MemoryReader) -> None:
    loader = Loader(reader, make_options())
    first, second = list(loader), list(loader)
    assert loader.epoch == 2
    assert [s for b in first for s in sequences_of(b)] != [s for b in second for s in sequences_of(b)]
    assert_same_stream(second, list(Loader(reader, make_options(), epoch=1)))


def test_without_shuffle_and_packing_the_sequences_come_as_they_are(reader: MemoryReader) -> None:
    loader = Loader(reader, make_options(shuffle=False, packing="none"))
    assert [s for batch in loader for s in sequences_of(batch)] == list(range(41))


def test_k_is_the_same_in_all_batches_of_a_top_k_cache() -> None:
    """Also where a batch has only small supports, or none."""
    ragged = MemoryReader([3] * 20, k=5, ragged=True)
    assert {batch.teacher.token_ids_PK.shape[1] for batch in Loader(ragged, make_options(batch_rows=1))} == {5}
    none = MemoryReader([3] * 20, k=5, supervised="none")
    assert {batch.teacher.token_ids_PK.shape for batch in Loader(none, make_options(batch_rows=1))} == {(0, 5)}


def test_k_of_another_selection_is_the_batch_s_largest_support() -> None:
    ragged = MemoryReader([3] * 20, k=5, identity={"kind": "top_p_k"}, ragged=True)
    for batch in Loader(ragged, make_options(batch_rows=1)):
        assert batch.teacher.token_ids_PK.shape[1] == (batch.teacher.token_ids_PK >= 0).sum(axis=1).max(initial=0)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_stream(reader: MemoryReader, num_threads: int) -> None:
    threaded = Loader(reader, make_options(num_threads=num_threads, prefetch_batches=3))
    assert_same_stream(stream(threaded, 2), stream(Loader(reader, make_options()), 2))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_ranks_together_give_the_stream_of_one(reader: MemoryReader, world_size: int) -> None:
    ranks = [Loader(reader, make_options(), rank=r, world_size=world_size) for r in range(world_size)]
    together = [stack_batches(shares) for _ in range(2) for shares in zip(*ranks, strict=True)]
    assert_same_stream(together, stream(Loader(reader, make_options()), 2))


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resuming_from_every_step_gives_the_whole_remainder(reader: MemoryReader, world_size: int, num_threads: int) -> None:
    """A fresh loader at each step, over an epoch's end and to the end of the second; states go through JSON."""

    def make(rank: int) -> Loader:
        return Loader(reader, make_options(num_threads=num_threads), rank=rank, world_size=world_size)

    for rank in range(world_size):
        whole = make(rank)
        states, batches = [whole.state_dict()], []
        for _ in range(2):
            for batch in whole:
                batches.append(batch)
                states.append(whole.state_dict())
        for step, state in enumerate(states):
            resumed = make(rank)
            resumed.load_state_dict(json.loads(json.dumps(state)))
            assert resumed.state_dict() == state
            remainder = list(islice(forever(resumed), len(batches) - step))
            assert_same_stream(remainder, batches[step:])
            assert resumed.state_dict() == states[-1]


def forever(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader


def test_states_are_small_json_and_equal_on_all_ranks(reader: MemoryReader) -> None:
    ranks = [Loader(reader, make_options(num_threads=2 * r), rank=r, world_size=3) for r in range(3)]
    states: list[str] = []
    for _ in zip(*ranks, strict=True):
        states = [json.dumps(loader.state_dict(), sort_keys=True) for loader in ranks]
        assert len(set(states)) == 1
        assert len(states[0]) < 1000
    assert json.loads(states[0])["epoch"] == 1


def test_the_state_counts_what_was_given_not_what_was_read_ahead() -> None:
    reader = MemoryReader(LENGTHS)
    loader = Loader(reader, make_options(num_threads=2, prefetch_batches=4))
    next(iter(loader))
    assert loader.state_dict()["next_batch"] == 1


def test_a_loop_after_a_break_goes_on_behind_the_last_batch(reader: MemoryReader) -> None:
    loader, batches = Loader(reader, make_options(num_threads=2)), []
    whole = list(Loader(reader, make_options()))
    while len(batches) < len(whole):
        for batch in loader:
            batches.append(batch)
            if len(batches) % 2 == 0:
                break
    assert_same_stream(batches, whole)


def test_leaving_after_an_epoch_s_last_batch_begins_the_next_epoch(reader: MemoryReader) -> None:
    loader = Loader(reader, make_options())
    for _ in range(len(loader)):
        for _ in loader:
            break
    assert (loader.epoch, loader.state_dict()["epoch"], loader.state_dict()["next_batch"]) == (0, 1, 0)
    assert_same_stream(list(loader), list(Loader(reader, make_options(), epoch=1)))


def test_set_epoch_moves_to_a_start_and_leaves_a_resumed_place_alone(reader: MemoryReader) -> None:
    loader = Loader(reader, make_options())
    loader.set_epoch(3)
    whole = list(Loader(reader, make_options(), epoch=3))
    assert_same(next(iter(loader)), whole[0])
    loader.set_epoch(3)
    assert_same_stream(list(loader), whole[1:])
    with pytest.raises(ConfigError, match="epoch is -1"):
        loader.set_epoch(-1)


def test_the_length_stays_the_whole_epoch_s_until_its_loop_ends(reader: MemoryReader) -> None:
    loader = Loader(reader, make_options())
    lengths = {len(loader) for _ in loader}
    assert lengths == {len(list(Loader(reader, make_options())))}


def state_with(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: state | changes


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (state_with(snapshots=["0" * 64]), r"snapshot '0000.*here '"),
        (state_with(version=1), "version 1, this kdcache reads version 3"),
        (state_with(order_version=7), "order_version 7, here 1"),
        (state_with(packing_version=7), "packing_version 7, here 1"),
        (state_with(seed=5), "seed 5, here 0"),
        (
            lambda s: s | {"config": s["config"] | {"seq_len": 32, "batch_rows": 12}},
            "seq_len 32, here 16; batch_rows 12, here 6",
        ),
        (state_with(next_batch=10_000), "batch 10000 of epoch 0, which has"),
        (state_with(next_batch=-1), "batch -1"),
        (state_with(epoch="1"), "not a state.*epoch"),
        (state_with(extra=1), "not a state.*extra"),
        (lambda s: {}, "not a state"),
        (lambda s: None, "not a state"),
    ],
)
def test_a_state_from_elsewhere_is_refused_showing_both_sides(reader: MemoryReader, damage: Any, sentence: str) -> None:
    loader = Loader(reader, make_options())
    first = next(iter(loader))
    state = loader.state_dict()
    with pytest.raises(StateError, match=sentence):
        loader.load_state_dict(damage(state))
    assert loader.state_dict() == state
    assert first.num_sequences > 0


def test_a_state_goes_on_under_other_threads(reader: MemoryReader) -> None:
    loader, other = Loader(reader, make_options()), Loader(reader, make_options(num_threads=3, prefetch_batches=9))
    next(iter(loader))
    other.load_state_dict(loader.state_dict())
    assert_same_stream(list(other), list(loader))


class DamagedReader(MemoryReader):
    """Sequence `bad` cannot be read."""

    bad = -1

    def __getitem__(self, index: int, /) -> SequenceRecord:
        if index == self.bad:
            raise CorruptCacheError(f"record batch 0, sequence {index}: the digest does not match")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_damaged_record_surfaces_at_its_batch_and_the_state_still_names_it(num_threads: int) -> None:
    reader, given = DamagedReader(LENGTHS), []
    loader = Loader(reader, make_options(num_threads=num_threads))
    reader.bad = int(loader._layout.batch(2).rows[3][0])
    for _ in range(2):
        with pytest.raises(CorruptCacheError, match="digest does not match"):
            given.extend(loader)  # keeps what came before the error
        assert loader.state_dict()["next_batch"] == 2
    assert_same_stream(given, list(islice(Loader(MemoryReader(LENGTHS), make_options()), 2)))


def test_a_record_of_another_length_than_the_index_s_is_refused() -> None:
    reader = MemoryReader([4, 5, 6])
    reader.records[1] = make_record(1, 4, k=3)
    with pytest.raises(CorruptCacheError, match="sequence 1: its record holds 4 tokens, the index says 5"):
        list(Loader(reader, make_options()))


def test_a_second_loop_over_the_same_loader_ends_the_first_with_an_error(reader: MemoryReader) -> None:
    loader = Loader(reader, make_options(num_threads=2))
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    with pytest.raises(StateError, match="one at a time"):
        next(first)
    assert loader.state_dict()["next_batch"] == 2
    next(second)
    loader.set_epoch(4)
    with pytest.raises(StateError, match="one at a time"):
        next(second)


def test_closing_ends_loop_and_threads(reader: MemoryReader) -> None:
    with Loader(reader, make_options(num_threads=2)) as loader:
        running = iter(loader)
        next(running)
    loader.close()
    with pytest.raises(StateError, match="closed"):
        next(running)
    with pytest.raises(StateError, match="closed"):
        iter(loader)


def test_a_loader_that_is_let_go_leaves_no_thread(reader: MemoryReader) -> None:
    loader = Loader(reader, make_options(num_threads=2))
    running = iter(loader)
    next(running)
    del loader, running
    gc.collect()


def test_a_pickled_loader_goes_on_where_it_was(reader: MemoryReader) -> None:
    loader = Loader(reader, make_options(num_threads=2))
    next(iter(loader))
    copy = pickle.loads(pickle.dumps(loader))
    assert copy.state_dict() == loader.state_dict()
    assert_same_stream(list(copy), list(loader))


def test_what_cannot_be_loaded_is_refused_at_once(reader: MemoryReader) -> None:
    with pytest.raises(ConfigError, match="seq_len is 8"):
        Loader(reader, make_options(seq_len=8))
    with pytest.raises(ConfigError, match="4 ranks"):
        Loader(reader, make_options(), world_size=4)
    with pytest.raises(ConfigError, match="epoch is -1"):
        Loader(reader, make_options(), epoch=-1)
    with pytest.raises(ConfigError, match="no sequence"):
        Loader(MemoryReader([]), make_options())


def test_the_loader_asks_for_each_sequence_once_and_only_for_its_own() -> None:
    reader = MemoryReader(LENGTHS)
    batches = list(Loader(reader, make_options(), rank=1, world_size=2))
    assert sorted(reader.reads) == sorted(s for batch in batches for s in sequences_of(batch))
    assert 0 < len(reader.reads) < 41
