from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.config.loader import LoaderConfig, MixConfig
from kdcache.errors import ConfigError
from kdcache.loader.order.mix import CacheTable, EpochOrder, epoch_counts, interleave_reference
from kdcache.loader.order.shuffle import ORDER_VERSION

COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=5)


def order_of(sizes: list[int], epoch: int = 0, **options: object) -> EpochOrder:
    tables = [CacheTable.of_lengths(np.full(size, c + 1, np.uint32)) for c, size in enumerate(sizes)]
    return EpochOrder(tables, LoaderConfig(**options), epoch)  # pyright: ignore[reportArgumentType]


def whole(order: EpochOrder) -> list[int]:
    return order.sequences_at(0, order.num_sequences).tolist()


def test_the_mixture_of_version_1_is_pinned() -> None:
    """States name the version: if these numbers change, ORDER_VERSION must too, and old states are refused."""
    assert ORDER_VERSION == 1
    mix = MixConfig(counts=(5, 2, 4))
    assert whole(order_of([3, 4, 4], mix=mix)) == [2, 7, 4, 1, 10, 0, 9, 2, 5, 8, 0]
    assert whole(order_of([3, 4, 4], epoch=2, seed=7, mix=mix)) == [0, 8, 6, 2, 9, 2, 10, 0, 5, 7, 1]


@settings(deadline=None)
@given(COUNTS, st.data())
def test_any_range_of_the_mixture_is_that_of_all_places_sorted(counts: list[int], data: st.DataObject) -> None:
    order = order_of(counts, shuffle=False)
    expected = [int(order.bases[cache]) + j for cache, j in interleave_reference(counts)]
    assert whole(order) == expected
    start = data.draw(st.integers(0, sum(counts)))
    stop = data.draw(st.integers(start, sum(counts)))
    assert order.sequences_at(start, stop).tolist() == expected[start:stop]


def test_every_stretch_has_each_cache_s_share() -> None:
    order = order_of([700, 200, 100])
    caches = np.searchsorted(order.bases, order.sequences_at(0, 1000), "right") - 1
    for start in range(0, 900, 50):
        counts = Counter(caches[start : start + 100].tolist())
        assert [abs(counts[c] - share) <= 1 for c, share in enumerate((70, 20, 10))] == [True] * 3


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (MixConfig(), [100, 30, 50]),
        (MixConfig(weights=(1, 1, 1)), [30, 30, 30]),
        (MixConfig(weights=(1, 1, 1), epoch_ends="all_exhausted"), [100, 100, 100]),
        (MixConfig(weights=(0.5, 0.3, 0.2)), [50, 30, 20]),
        (MixConfig(weights=(5, 3, 2), epoch_ends="all_exhausted"), [125, 75, 50]),
        (MixConfig(counts=(7, 300, 1)), [7, 300, 1]),
    ],
)
def test_an_epoch_s_counts_follow_from_sizes_and_weights(mix: MixConfig, expected: list[int]) -> None:
    assert epoch_counts([100, 30, 50], mix) == expected


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 99), st.floats(0.1, 9)), min_size=1, max_size=4))
def test_epochs_end_when_the_first_or_the_last_cache_does(caches: list[tuple[int, float]]) -> None:
    sizes, weights = [size for size, _ in caches], tuple(weight for _, weight in caches)
    everything = epoch_counts(sizes, MixConfig(weights=weights, epoch_ends="all_exhausted"))
    assert all(count >= size for count, size in zip(everything, sizes, strict=True))
    assert any(count == size for count, size in zip(everything, sizes, strict=True))
    try:
        once = epoch_counts(sizes, MixConfig(weights=weights))
    except ConfigError:
        return
    assert all(count <= size for count, size in zip(once, sizes, strict=True))
    assert any(count == size for count, size in zip(once, sizes, strict=True))


def test_each_cache_goes_on_where_the_epoch_before_left_it() -> None:
    """Over epochs the sequences of each cache come equally often, however the epochs cut its passes."""
    mix = MixConfig(counts=(4, 25))
    seen = [s for epoch in range(6) for s in whole(order_of([7, 10], epoch, mix=mix))]
    counts = Counter(seen)
    assert {counts[s] for s in range(7)} == {3, 4}
    assert {counts[s] for s in range(7, 17)} == {15}
    own = [s for s in seen if s < 7]
    assert sorted(own[:7]) == sorted(own[7:14]) == list(range(7))
    assert own[:7] != own[7:14]


def test_caches_of_one_size_have_orders_of_their_own() -> None:
    order = order_of([200, 200])
    sequences = np.array(whole(order))
    first, second = sequences[sequences < 200], sequences[sequences >= 200] - 200
    assert np.mean(first == second) < 0.05


def test_an_epoch_of_one_cache_is_that_cache_s_order() -> None:
    alone = order_of([50], epoch=3, seed=5)
    assert sorted(whole(alone)) == list(range(50))
    assert alone.expected_sum() == 50 * 49 // 2


def test_lengths_are_those_of_the_right_cache() -> None:
    order = order_of([5, 3, 2])
    assert order.num_tokens(np.array([9, 0, 7, 4, 5])).tolist() == [3, 1, 2, 1, 2]


@pytest.mark.parametrize(
    ("mix", "sentence"),
    [
        (MixConfig(weights=(1.0,)), "mix.weights has 1 numbers for 2 caches"),
        (MixConfig(counts=(1, 2, 3)), "mix.counts has 3 numbers for 2 caches"),
        (MixConfig(weights=(1.0, 1e-9)), "gives cache 1 no sequence in an epoch of 10"),
    ],
)
def test_weights_that_do_not_fit_are_refused(mix: MixConfig, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        epoch_counts([10, 10], mix)
