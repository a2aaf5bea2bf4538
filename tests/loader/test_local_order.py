import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.loader.order.local import LocalOrder
from kdcache.loader.order.shuffle import ORDER_VERSION

SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any)


def order_of(sizes: list[int], local_shards: int, seed: int = 0, epoch: int = 0) -> LocalOrder:
    return LocalOrder(np.array(sizes, np.int64), local_shards, seed, epoch)


def whole(order: LocalOrder) -> list[int]:
    return order.sequences_at(0, order.num_sequences).tolist()


def test_the_local_order_of_version_1_is_pinned() -> None:
    """States name the version: if these numbers change, ORDER_VERSION must too, and old states are refused."""
    assert ORDER_VERSION == 1
    assert whole(order_of([3, 1, 4, 0, 2], 2)) == [0, 1, 3, 2, 4, 7, 9, 8, 6, 5]
    assert whole(order_of([3, 1, 4, 0, 2], 2, seed=2**63 - 1, epoch=9)) == [1, 6, 5, 7, 0, 2, 4, 8, 3, 9]
    large = LocalOrder(np.full(100_000, 12_345, np.int64), 64, 5, 6)
    assert large.sequences_at(1_234_499_998, 1_234_500_000).tolist() == [1068962054, 978255107]


@settings(deadline=None)
@given(SIZES, st.integers(1, 14), st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_the_fast_path_equals_the_reference(sizes: list[int], local_shards: int, seed: int, epoch: int) -> None:
    order = order_of(sizes, local_shards, seed, epoch)
    expected = [order.sequence_at_reference(place) for place in range(sum(sizes))]
    assert whole(order) == expected
    assert sorted(expected) == list(range(sum(sizes)))


@settings(deadline=None)
@given(SIZES, st.integers(1, 14), st.data())
def test_a_range_is_a_slice_of_the_whole(sizes: list[int], local_shards: int, data: st.DataObject) -> None:
    order = order_of(sizes, local_shards)
    start = data.draw(st.integers(0, sum(sizes)))
    stop = data.draw(st.integers(start, sum(sizes)))
    assert order.sequences_at(start, stop).tolist() == whole(order)[start:stop]


def test_each_stretch_of_a_window_s_size_lies_in_few_shards() -> None:
    order = order_of([10] * 30, 3, seed=4)
    shards = np.array(whole(order)) // 10
    windows = [set(shards[start : start + 30].tolist()) for start in range(0, 300, 30)]
    assert [len(window) for window in windows] == [3] * 10
    assert sorted(shard for window in windows for shard in window) == list(range(30))
    mixed = np.array(whole(order))[:30] // 10
    assert np.count_nonzero(np.diff(mixed)) > 10  # the shards of a window do not come one after another


def test_windows_shards_and_epochs_have_orders_of_their_own() -> None:
    first, second = order_of([100] * 8, 2), order_of([100] * 8, 2, epoch=1)
    assert np.mean(np.array(whole(first)) == np.array(whole(second))) < 0.05
    inside = np.array(whole(first)) % 100
    assert np.mean(inside[:200] == inside[200:400]) < 0.05


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, 11)])
def test_places_outside_are_refused(start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="10 sequences"):
        order_of([4, 6], 1).sequences_at(start, stop)
