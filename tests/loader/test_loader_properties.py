"""One promise, at random: whatever the stops, ranks and threads, the global stream is the one that a single rank gives."""

import json
from collections import Counter
from dataclasses import dataclass

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_reader import MemoryReader, assert_same_stream, sequences_of

from kdcache.config.loader import LoaderConfig, MaskConfig, MixConfig
from kdcache.loader.batches.batch import Batch, stack_batches
from kdcache.loader.loader import Loader

SEQ_LEN = 10
FIRST = 100
"""Cache c's sequences have ids made of c * FIRST + i."""


@dataclass(frozen=True)
class Leg:
    """A part of a run between two stops; `num_batches` None for the end of the epoch that it begins in."""

    world_size: int
    num_threads: int
    num_batches: int | None


LEGS = st.lists(
    st.builds(Leg, st.sampled_from([1, 2, 3, 6]), st.sampled_from([0, 0, 2]), st.none() | st.integers(0, 9)), max_size=5
)
CACHE = st.lists(st.lists(st.integers(1, SEQ_LEN), max_size=9), min_size=1, max_size=6).filter(any)
"""The lengths of the sequences in each of its shards."""
CACHES = st.lists(CACHE, min_size=1, max_size=3)
UNPACKED = st.fixed_dictionaries(
    {
        "packing": st.just("none"),
        "group_by_length": st.booleans(),
        "pad_to": st.sampled_from(["seq_len", "longest"]),
        "max_batch_tokens": st.sampled_from([None, 12 * SEQ_LEN, 17 * SEQ_LEN]),
    }
)
FIELDS = st.fixed_dictionaries(
    {
        "seq_len": st.just(SEQ_LEN),
        "batch_rows": st.sampled_from([6, 12]),
        "packing_buffer": st.integers(1, 40),
        "order": st.sampled_from(["global", "local"]),
        "local_shards": st.integers(1, 4),
        "shuffle": st.booleans(),
        "seed": st.integers(0, 2**63 - 1),
        "mask": st.sampled_from(
            [MaskConfig(), MaskConfig(roles=("assistant", "user"), role_weights={"user": 0.5}, drop_first=1)]
        ),
        "num_threads": st.just(0),
    }
)


@st.composite
def set_ups(draw: st.DrawFn) -> tuple[list[MemoryReader], LoaderConfig]:
    """One to three caches, and options that fit them."""
    caches = draw(CACHES)
    fields = draw(FIELDS) | draw(st.sampled_from([{}]) | UNPACKED)
    readers = [
        MemoryReader(
            [n for shard in shards for n in shard],
            k=2,
            first=c * FIRST,
            identity={"shards": [len(shard) for shard in shards]},
            chat=True,
        )
        for c, shards in enumerate(caches)
    ]
    counts = st.tuples(*(st.integers(1, 25) for _ in caches)).map(lambda counts: MixConfig(counts=counts))
    weights = st.tuples(*(st.floats(0.2, 5) for _ in caches))
    weighted = weights.map(lambda weights: MixConfig(weights=weights, epoch_ends="all_exhausted"))
    return readers, LoaderConfig(**fields, mix=draw(st.just(MixConfig()) | counts | weighted))


def run_leg(readers: list[MemoryReader], options: LoaderConfig, leg: Leg, state: str | int) -> tuple[list[Batch], str]:
    """Fresh loaders for all ranks, from a state, or the start of an epoch, to a state; the ranks' shares put together."""
    options = msgspec.structs.replace(options, num_threads=leg.num_threads)
    epoch = state if isinstance(state, int) else 0
    ranks = [Loader(readers, options, rank=r, world_size=leg.world_size, epoch=epoch) for r in range(leg.world_size)]
    batches: list[Batch] = []
    for loader in ranks:
        if isinstance(state, str):
            loader.load_state_dict(json.loads(state))
    while leg.num_batches is None or len(batches) < leg.num_batches:
        for shares in zip(*ranks, strict=True):
            batches.append(stack_batches(shares))
            if len(batches) == leg.num_batches:
                break
        if leg.num_batches is None:
            break
    states = {json.dumps(loader.state_dict(), sort_keys=True) for loader in ranks}
    for loader in ranks:
        loader.close()
    assert len(states) == 1
    return batches, states.pop()


@settings(deadline=None, max_examples=50)
@given(set_ups(), LEGS, st.integers(0, 2**40))
def test_any_run_with_stops_gives_the_stream_of_one_rank_without(
    set_up: tuple[list[MemoryReader], LoaderConfig], legs: list[Leg], epoch: int
) -> None:
    readers, options = set_up
    stream: list[Batch] = []
    state: str | int = epoch
    for leg in legs:
        before = state
        batches, state = run_leg(readers, options, leg, state)
        assert_same_stream(run_leg(readers, options, leg, before)[0], batches)  # resumed twice from one state
        stream += batches
    alone = Loader(readers, options, epoch=epoch)
    expected: list[Batch] = []
    while len(expected) < len(stream):
        expected += alone
    assert_same_stream(stream, expected[: len(stream)])


@settings(deadline=None, max_examples=120)
@given(set_ups(), st.sampled_from([1, 2, 3]), st.integers(0, 2**40))
def test_an_epoch_gives_each_sequence_as_often_as_its_plan_says(
    set_up: tuple[list[MemoryReader], LoaderConfig], ranks: int, epoch: int
) -> None:
    readers, options = set_up
    loaders = [Loader(readers, options, rank=r, world_size=ranks, epoch=epoch) for r in range(ranks)]
    counts, planned = loaders[0].counts(), loaders[0]._layout.order.counts
    given_sequences = [s for loader in loaders for batch in loader for s in sequences_of(batch)]
    assert len(given_sequences) == counts.num_sequences == sum(planned)
    seen = Counter(given_sequences)
    for c, (reader, count) in enumerate(zip(readers, planned, strict=True)):
        often = [seen[c * FIRST + i] for i in range(len(reader))]
        assert sum(often) == count
        if options.mix == MixConfig():
            assert set(often) == {1}
        else:  # an epoch may end one pass of a cache and begin another
            assert max(often) - min(often) <= 2
    reports = [loader.report() for loader in loaders]
    assert all(report.is_complete and report.epoch == epoch for report in reports)
    assert sum(report.num_sequences for report in reports) == counts.num_sequences
    assert sum(report.num_tokens for report in reports) == counts.num_tokens
