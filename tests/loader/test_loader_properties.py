"""One promise, at random: whatever the stops and the ranks, the global stream is the one that a single rank gives."""

import json
from dataclasses import dataclass

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_reader import MemoryReader, assert_same_stream, sequences_of

from kdcache.config.loader import LoaderConfig
from kdcache.loader.batch import Batch, stack_batches
from kdcache.loader.loader import Loader

SEQ_LEN = 10


@dataclass(frozen=True)
class Leg:
    """A part of a run between two stops."""

    world_size: int
    num_threads: int
    num_batches: int


LEGS = st.lists(st.builds(Leg, st.sampled_from([1, 2, 3, 6]), st.sampled_from([0, 0, 2]), st.integers(0, 9)), max_size=5)
OPTIONS = st.builds(
    LoaderConfig,
    seq_len=st.just(SEQ_LEN),
    batch_rows=st.sampled_from([6, 12]),
    packing=st.sampled_from(["first_fit", "none"]),
    pack_window=st.integers(1, 40),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    num_threads=st.just(0),
)


def run_leg(reader: MemoryReader, options: LoaderConfig, leg: Leg, state: str | None) -> tuple[list[Batch], str]:
    """Fresh loaders for all ranks, from a state to another; the ranks' shares put together."""
    options = msgspec.structs.replace(options, num_threads=leg.num_threads)
    ranks = [Loader(reader, options, rank=r, world_size=leg.world_size) for r in range(leg.world_size)]
    batches: list[Batch] = []
    for loader in ranks:
        if state is not None:
            loader.load_state_dict(json.loads(state))
    while len(batches) < leg.num_batches:
        for shares in zip(*ranks, strict=True):
            batches.append(stack_batches(shares))
            if len(batches) == leg.num_batches:
                break
    states = {json.dumps(loader.state_dict(), sort_keys=True) for loader in ranks}
    for loader in ranks:
        loader.close()
    assert len(states) == 1
    return batches, states.pop()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=40), OPTIONS, LEGS)
def test_any_run_with_stops_gives_the_stream_of_one_rank_without(
    lengths: list[int], options: LoaderConfig, legs: list[Leg]
) -> None:
    reader = MemoryReader(lengths, k=2)
    stream: list[Batch] = []
    state: str | None = None
    for leg in legs:
        batches, state = run_leg(reader, options, leg, state)
        stream += batches
    alone = Loader(reader, options)
    expected: list[Batch] = []
    while len(expected) < len(stream):
        expected += alone
    assert_same_stream(stream, expected[: len(stream)])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=40), OPTIONS, st.sampled_from([1, 2, 3]), st.integers(0, 2**40))
def test_every_sequence_is_given_exactly_once_per_epoch(
    lengths: list[int], options: LoaderConfig, ranks: int, epoch: int
) -> None:
    reader = MemoryReader(lengths, k=2)
    given_by = [
        [s for b in Loader(reader, options, rank=r, world_size=ranks, epoch=epoch) for s in sequences_of(b)]
        for r in range(ranks)
    ]
    assert sorted(s for one in given_by for s in one) == list(range(len(lengths)))
