import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.config.loader import LoaderConfig
from kdcache.errors import ConfigError
from kdcache.loader.order.mix import CacheTable
from kdcache.loader.rows.batching import batch_block, buffer_batches, row_length
from kdcache.loader.rows.layout import EpochLayout
from kdcache.loader.rows.packing import BLOCK_BUFFERS, PACKING_VERSION, cuts_batches

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=80)
UNPACKED = st.builds(
    LoaderConfig,
    seq_len=st.just(20),
    packing=st.just("none"),
    batch_rows=st.sampled_from([1, 2, 6]),
    packing_buffer=st.sampled_from([1, 5, 16]),
    group_by_length=st.booleans(),
    pad_to=st.sampled_from(["seq_len", "longest"]),
    pad_multiple=st.sampled_from([1, 8]),
    max_batch_tokens=st.sampled_from([None, 120, 300]),
    seed=st.integers(0, 99),
)


def layout_of(lengths: list[int], options: LoaderConfig, epoch: int = 0) -> EpochLayout:
    return EpochLayout([CacheTable.of_lengths(np.array(lengths, np.uint32))], options, epoch)


@settings(deadline=None)
@given(LENGTHS, UNPACKED, st.integers(0, 9))
def test_every_sequence_is_in_one_row_of_one_batch_within_the_bounds(
    lengths: list[int], options: LoaderConfig, epoch: int
) -> None:
    plan = layout_of(lengths, options, epoch)
    batches = [plan.batch(b) for b in range(plan.num_batches)]
    assert sorted(int(s) for batch in batches for row in batch.rows for s in row) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch.rows) % options.batch_rows == 0
        assert all(len(row) <= 1 for row in batch.rows)
        longest = max(lengths[s] for row in batch.rows for s in row)
        assert batch.seq_len == row_length(longest, options) >= longest
        if options.max_batch_tokens is None:
            assert len(batch.rows) == options.batch_rows
        else:
            assert len(batch.rows) * batch.seq_len <= options.max_batch_tokens
    assert [len(row) for batch in batches[:-1] for row in batch.rows].count(0) == 0
    counts = plan.counts()
    assert counts.num_empty_rows == sum(len(row) == 0 for row in batches[-1].rows)
    empty_places = counts.num_empty_rows * batches[-1].seq_len
    assert counts.num_slots == sum(len(batch.rows) * batch.seq_len for batch in batches) - empty_places
    assert counts.fill == pytest.approx(sum(lengths) / counts.num_slots)


@settings(deadline=None)
@given(LENGTHS, UNPACKED.filter(cuts_batches))
def test_any_batch_can_be_asked_for_first(lengths: list[int], options: LoaderConfig) -> None:
    in_order = layout_of(lengths, options)
    for b in reversed(range(in_order.num_batches)):
        fresh = layout_of(lengths, options).batch(b)
        assert [row.tolist() for row in fresh.rows] == [row.tolist() for row in in_order.batch(b).rows]


def test_a_token_budget_takes_as_many_groups_as_fit() -> None:
    options = LoaderConfig(seq_len=10, packing="none", batch_rows=2, pad_to="longest", pad_multiple=1, max_batch_tokens=24)
    lengths = np.array([3, 4, 5, 4, 6, 2, 2, 2, 9, 10, 1])
    assert [batch.tolist() for batch in buffer_batches(lengths, options)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10]]
    assert [row_length(t, options) for t in (1, 9, 10)] == [1, 9, 10]


def test_grouping_by_length_pads_less_and_keeps_the_last_batch_last() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, 333).tolist()
    shared = {"seq_len": 64, "packing": "none", "batch_rows": 8, "pad_to": "longest", "pad_multiple": 1, "packing_buffer": 128}
    plain, grouped = (
        layout_of(lengths, LoaderConfig(**shared)),
        layout_of(lengths, LoaderConfig(**shared, group_by_length=True)),
    )  # pyright: ignore[reportArgumentType]
    assert grouped.counts().fill > 0.9 > plain.counts().fill
    lengths_of_batches = [grouped.batch(b).seq_len for b in range(grouped.num_batches)]
    assert lengths_of_batches != sorted(lengths_of_batches)
    assert [grouped.num_batches - 1] == [
        b for b in range(grouped.num_batches) if any(len(r) == 0 for r in grouped.batch(b).rows)
    ]


def test_batches_of_version_1_are_pinned() -> None:
    """States name the version: if these batches change, PACKING_VERSION must too."""
    assert PACKING_VERSION == 1
    lengths = np.array([7, 2, 9, 4, 4, 1, 6, 3, 8, 5, 5, 5])
    options = LoaderConfig(
        seq_len=9,
        packing="none",
        batch_rows=2,
        packing_buffer=5,
        group_by_length=True,
        pad_to="longest",
        max_batch_tokens=20,
        seed=3,
    )
    rows = batch_block(np.arange(12), lengths, options, epoch=1, block=0)
    assert rows.sequences_S.tolist() == [0, 2, 3, 4, 5, 1, 6, 8, 7, 9, 10, 11]
    assert rows.batches_N1 is not None
    assert rows.batches_N1.tolist() == [0, 2, 4, 6, 8, 10, 12]


def test_windows_are_whole_batches_so_that_only_the_epoch_s_last_is_short() -> None:
    options = LoaderConfig(seq_len=8, packing="none", batch_rows=6, packing_buffer=7, pad_to="longest")
    plan = layout_of([5] * (12 * BLOCK_BUFFERS * 2 + 5), options)
    sizes = [sum(len(row) for row in plan.batch(b).rows) for b in range(plan.num_batches)]
    assert set(sizes[:-1]) == {6}
    assert sizes[-1] == 5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"group_by_length": True}, "group_by_length needs packing 'none'"),
        ({"max_batch_tokens": 10**6}, "max_batch_tokens needs packing 'none'"),
        ({"pad_to": "longest"}, "pad_to longest needs packing 'none'"),
        ({"packing": "none", "max_batch_tokens": 8191}, "max_batch_tokens is 8191.*raise it to 8192"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LoaderConfig(**options)  # pyright: ignore[reportArgumentType]
