from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.codec._numba import pack_bits, unpack_bits
from kdcache.codec.bit_stream import pack_bits_reference, packed_size, unpack_bits_reference
from kdcache.codec.packed import PackedCodec


def ids_of(width: int, seed: int, num_entries: int) -> np.ndarray:
    rng = np.random.default_rng((width, seed))
    ids = rng.integers(0, 1 << width, num_entries).astype(np.int32)
    ids[rng.random(num_entries) < 0.2] = (1 << width) - 1
    return ids


@pytest.mark.parametrize("width", range(1, 32))
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32), num_entries=st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 640])))
def test_the_fast_path_is_the_definition_at_every_width(width, seed, num_entries):
    ids = ids_of(width, seed, num_entries)
    stream = pack_bits_reference(ids, width)
    np.testing.assert_array_equal(pack_bits(ids, width), stream, strict=True)
    np.testing.assert_array_equal(unpack_bits(stream, num_entries, width), ids, strict=True)
    np.testing.assert_array_equal(unpack_bits_reference(stream, num_entries, width), ids, strict=True)
    assert len(stream) == packed_size(num_entries, width) == -(-num_entries * width // 64) * 8


def test_the_stream_is_the_one_that_the_spec_describes():
    # Three ids of five bits, least significant first: 00001 00010 10101 -> bits 10000 01000 10101 -> bytes 0x41 0x54.
    assert pack_bits_reference(np.array([1, 2, 21], np.int32), 5).tobytes() == b"\x41\x54" + b"\0" * 6


@pytest.mark.parametrize("shift", range(8))
def test_a_stream_is_read_at_any_alignment_and_from_memory_that_is_not_to_be_written(shift):
    ids = ids_of(17, 0, 100)
    stream = pack_bits(ids, 17)
    buffer = np.zeros(len(stream) + 16, np.uint8)
    buffer[shift : shift + len(stream)] = stream
    view = buffer[shift : shift + len(stream)]
    view.flags.writeable = False
    np.testing.assert_array_equal(unpack_bits(view, 100, 17), ids)


@pytest.mark.parametrize(("vocab_size", "id_bits"), [(1, 1), (2, 1), (3, 2), (128, 7), (129, 8), (2**31 - 1, 31), (2**31, 31)])
def test_the_width_is_what_the_largest_id_needs(vocab_size, id_bits):
    assert PackedCodec(vocab_size=vocab_size).id_bits == id_bits


@settings(max_examples=300)
@given(value=st.floats(-65504.0, 0.0, width=32))
def test_no_float16_is_further_off_than_the_bound(value):
    found = float(np.float32(np.float16(np.float32(value))))
    assert abs(found - value) <= PackedCodec(vocab_size=2).max_error_nats(np.array([value]))[0]


def test_order_survives_the_rounding():
    logprobs = np.sort(np.random.default_rng(0).uniform(-20, 0, 10_000).astype(np.float32))[::-1]
    assert (np.diff(logprobs.astype(np.float16).astype(np.float32)) <= 0).all()


def test_ids_that_may_not_be_written_are_packed_like_others():
    """An engine's answer is a view of the bytes it sent."""
    ids = np.frombuffer(np.arange(7, dtype=np.int32).tobytes(), np.int32)
    assert not ids.flags.writeable
    np.testing.assert_array_equal(pack_bits(ids, 3), pack_bits_reference(ids, 3))
