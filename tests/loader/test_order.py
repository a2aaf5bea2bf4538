from collections import Counter

import numpy as np
import pytest

from kdcache.loader.order.shuffle import ORDER_VERSION, Order, sequence_at_reference, sequences_at


def whole(num_sequences: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return sequences_at(Order(num_sequences, seed, epoch), 0, num_sequences).tolist()


def test_the_order_of_version_1_is_pinned() -> None:
    """States name the version: if these numbers change, ORDER_VERSION must too, and old states are refused."""
    assert ORDER_VERSION == 1
    assert whole(10) == [3, 6, 8, 4, 1, 7, 0, 2, 9, 5]
    assert whole(10, epoch=1) == [1, 6, 9, 7, 2, 8, 5, 0, 3, 4]
    assert sequences_at(Order(10**12, 2**63 - 1, 7), 999_999_999_996, 10**12).tolist() == [
        249501482827,
        860476356386,
        328158650077,
        169427397265,
    ]


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 65, 100, 257])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 0), (0, 1), (2**63 - 1, 12345)])
def test_the_fast_path_equals_the_reference(num_sequences: int, seed: int, epoch: int) -> None:
    order = Order(num_sequences, seed, epoch)
    assert whole(num_sequences, seed, epoch) == [sequence_at_reference(order, i) for i in range(num_sequences)]


def test_large_orders_equal_the_reference_where_sampled() -> None:
    order = Order(123_456_789_012, 5, 6)
    for place in (0, 1, 99_999_999_999, 123_456_789_011):
        assert sequences_at(order, place, place + 1)[0] == sequence_at_reference(order, place)


def test_every_size_gives_a_permutation() -> None:
    for num_sequences in range(1, 2001):
        assert sorted(whole(num_sequences, seed=num_sequences % 7)) == list(range(num_sequences))


def test_a_range_is_a_slice_of_the_whole() -> None:
    order, everything = Order(1000, 3, 4), whole(1000, 3, 4)
    for start, stop in [(0, 0), (0, 1), (17, 400), (999, 1000), (1000, 1000)]:
        assert sequences_at(order, start, stop).tolist() == everything[start:stop]


def test_without_shuffle_the_order_is_the_cache_s() -> None:
    order = Order(50, 3, 4, shuffle=False)
    assert sequences_at(order, 10, 50).tolist() == list(range(10, 50))
    assert sequence_at_reference(order, 12) == 12


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, 11)])
def test_places_outside_are_refused(start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="10 sequences"):
        sequences_at(Order(10, 0, 0), start, stop)


def test_epochs_seeds_and_sizes_give_unrelated_orders() -> None:
    base = np.array(whole(1000))
    others = [np.arange(1000), whole(1000, epoch=1), whole(1000, seed=1), whole(1000, seed=1, epoch=1)]
    for other in others:
        assert np.mean(base == other) < 0.01
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.13  # four standard deviations of unrelated orders


def test_each_sequence_comes_first_about_equally_often() -> None:
    num_epochs, size = 1500, 10
    for place in (0, 5, 9):
        counts = Counter(whole(size, epoch=e)[place] for e in range(num_epochs))
        chi_square = sum((counts[s] - num_epochs / size) ** 2 / (num_epochs / size) for s in range(size))
        assert chi_square < 33.7  # 9 degrees of freedom: one in ten thousand


def test_neighbours_in_the_cache_are_not_neighbours_in_the_order() -> None:
    steps = np.diff(whole(5000, seed=9))
    assert np.mean(np.abs(steps) == 1) < 0.005
    assert abs(np.mean(steps > 0) - 0.5) < 0.03
