import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kdcache.config.loader import LoaderConfig
from kdcache.errors import ConfigError
from kdcache.loader.checks import check_config, check_ranks
from kdcache.loader.order.mix import CacheTable
from kdcache.loader.rows.layout import EpochLayout


def make_layout(num_sequences: int = 300, **options: object) -> EpochLayout:
    lengths = np.random.default_rng(0).integers(1, 17, num_sequences).astype(np.uint32)
    fields = {"seq_len": 16, "batch_rows": 4, "packing_buffer": 5} | options
    return EpochLayout([CacheTable.of_lengths(lengths)], LoaderConfig(**fields), epoch=3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("packing", ["first_fit", "none"])
def test_the_batches_of_an_epoch_hold_every_sequence_once(packing: str) -> None:
    layout = make_layout(packing=packing)
    batches = [layout.batch(b) for b in range(layout.num_batches)]
    assert sorted(int(s) for batch in batches for row in batch.rows for s in row) == list(range(300))
    assert all(len(batch.rows) == 4 for batch in batches)


def test_any_batch_can_be_asked_for_first() -> None:
    in_order = make_layout()
    expected = [[row.tolist() for row in in_order.batch(b).rows] for b in range(in_order.num_batches)]
    for b in (in_order.num_batches - 1, 0, 17):
        assert [row.tolist() for row in make_layout().batch(b).rows] == expected[b]


def test_asking_for_the_first_batch_does_not_compute_the_whole_epoch() -> None:
    layout = make_layout(10_000)
    layout.batch(0)
    assert len(layout._before) == 2


@pytest.mark.parametrize("grouping", [{}, {"group_by_length": True}, {"pad_to": "longest"}])
@pytest.mark.parametrize("num_sequences", [1, 8, 297])
def test_the_number_of_batches_is_known_without_a_plan_where_lengths_have_no_say_in_it(
    num_sequences: int, grouping: dict[str, object]
) -> None:
    layout = make_layout(num_sequences, packing="none", **grouping)
    num_batches = layout.num_batches
    assert len(layout._before) == 1
    assert layout.has_batch(num_batches - 1)
    assert not layout.has_batch(num_batches)
    assert layout.counts().num_batches == num_batches


def test_a_plan_keeps_few_blocks_whatever_the_cache_s_size() -> None:
    layout = make_layout(10_000)
    assert layout.num_rows > 1000
    assert len(layout._before) > 100
    assert len(layout._blocks) <= 8


def test_rows_and_batches_outside_are_refused() -> None:
    layout = make_layout()
    assert not layout.has_batch(layout.num_batches)
    assert not layout.has_row(-1)
    with pytest.raises(IndexError, match="batches"):
        layout.batch(layout.num_batches)
    with pytest.raises(IndexError, match="rows"):
        layout.row(layout.num_rows)


def test_only_the_last_batch_has_empty_rows_and_they_are_counted() -> None:
    layout = make_layout()
    empty = [sum(len(row) == 0 for row in layout.batch(b).rows) for b in range(layout.num_batches)]
    counts = layout.counts()
    assert set(empty[:-1]) == {0}
    assert empty[-1] == counts.num_empty_rows == -counts.num_rows % 4
    assert counts.num_sequences == 300
    assert counts.num_batches == layout.num_batches == len(empty)
    assert counts.fill == counts.num_tokens / (counts.num_rows * 16)


def test_threads_and_pickles_see_the_same_plan() -> None:
    layout, other = make_layout(3000), pickle.loads(pickle.dumps(make_layout(3000)))
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(layout.batch, range(layout.num_batches)))
    for b, batch in enumerate(batches):
        assert [row.tolist() for row in batch.rows] == [row.tolist() for row in other.batch(b).rows]


def test_a_sequence_longer_than_a_row_is_refused_with_both_ways_out() -> None:
    lengths = np.array([10, 20, 30], np.uint32)
    check_config(LoaderConfig(seq_len=30), [CacheTable.of_lengths(lengths)])
    with pytest.raises(
        ConfigError, match=r"seq_len is 16.*2 of 3.*sequence 1 with 20.*raise seq_len to 30.*window\.size <= 16"
    ):
        check_config(LoaderConfig(seq_len=16), [CacheTable.of_lengths(lengths)])


def test_an_empty_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="no sequence"):
        check_config(LoaderConfig(), [CacheTable.of_lengths(np.zeros(0, np.uint32))])


@pytest.mark.parametrize(
    "options", [{"seq_len": 0}, {"batch_rows": -1}, {"seed": -1}, {"packing": "best"}, {"packing_buffer": 10**6}]
)
def test_options_made_in_python_are_checked_as_those_from_a_file(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        check_config(LoaderConfig(**options), [CacheTable.of_lengths(np.ones(3, np.uint32))])  # pyright: ignore[reportArgumentType]


def test_ranks_must_share_a_batch_equally() -> None:
    check_ranks(LoaderConfig(batch_rows=6), 2, 3)
    with pytest.raises(ConfigError, match="batch_rows is 6, which 4 ranks"):
        check_ranks(LoaderConfig(batch_rows=6), 0, 4)
    with pytest.raises(ConfigError, match="rank is 3 of world_size 3"):
        check_ranks(LoaderConfig(batch_rows=6), 3, 3)
