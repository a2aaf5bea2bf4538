from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.codec import get_codec
from kdcache.codec._numba_levels import codes_within_one
from kdcache.codec.levels import (
    LEAST_BITS,
    MOST_BITS,
    TAIL_BITS,
    fit_reference,
    level_logprobs,
    level_masses,
    max_level_error,
    nearest_codes,
)
from kdcache.errors import UnsupportedVersionError

BITS = range(LEAST_BITS, MOST_BITS + 1)


def position(seed: int, num_entries: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Falling logprobs of a position's exact entries, and its tail mass."""
    weights = np.sort(np.exp(np.random.default_rng(seed).normal(0, spread, num_entries + 3)))[::-1]
    masses = weights / weights.sum()
    return np.log(masses[:num_entries]).astype(np.float32), masses[num_entries:].sum(keepdims=True).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
def test_levels_fall_from_probability_1_to_0(bits):
    levels = level_logprobs(bits)
    assert levels[0] == 0
    assert levels[-2] == -4 * bits
    assert np.isneginf(levels[-1])
    assert (np.diff(levels[:-1]) < 0).all()
    np.testing.assert_array_equal(nearest_codes(levels, bits), np.arange(2**bits))


@pytest.mark.parametrize("bits", BITS)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), num_entries=st.integers(0, 40), spread=st.floats(0.0, 6.0))
def test_the_fast_path_is_the_definition_and_sums_stay_within_one(bits, seed, num_entries, spread):
    logprobs, tail = position(seed, num_entries, spread)
    codes, tail_codes = codes_within_one(logprobs, np.array([num_entries]), tail, bits)
    nearest = nearest_codes(logprobs, bits).tolist()
    (nearest_tail,) = nearest_codes(np.log(tail.astype(np.float64)), TAIL_BITS).tolist()
    expected = fit_reference(nearest, nearest_tail, logprobs.tolist(), float(tail[0]), bits)
    assert (codes.tolist(), int(tail_codes[0])) == expected
    before = np.exp(logprobs.astype(np.float64)).sum() + tail[0]
    after = level_masses(bits)[codes].sum() + level_masses(TAIL_BITS)[tail_codes[0]]
    assert after <= max(1.0, before) + 1e-9 + num_entries * np.exp(-4.0 * bits)
    assert (np.diff(codes.astype(int)) >= 0).all()
    assert (np.abs(level_logprobs(bits)[codes] - logprobs) <= max_level_error(logprobs, bits)).all()


def test_little_mass_is_lost_where_there_are_many_entries():
    logprobs, tail = position(3, 64, 2.5)
    codes, tail_codes = codes_within_one(logprobs, np.array([64]), tail, 8)
    assert 0.998 < level_masses(8)[codes].sum() + level_masses(8)[tail_codes[0]] <= 1


@pytest.mark.parametrize("bits", [3, 9, 8.0, True, None, "8"])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(UnsupportedVersionError, match=r"bits is .* expected an integer from 4 to 8"):
        get_codec("quantized", {"vocab_size": 97, "bits": bits})
