from __future__ import annotations

import contextlib

import numpy as np
import pytest
import selected
from contracts import codec as contract
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.codec import get_codec
from kdcache.codec.archive import ArchiveCodec
from kdcache.codec.archive_model import MOST_ENTRIES_PER_BYTE
from kdcache.codec.archive_reference import Decoder, Layout
from kdcache.errors import CorruptCacheError, FormatError, UnsupportedVersionError

CASES = [(selection, bits) for selection in selected.SELECTIONS for bits in (4, 8, 16)]


def columns_of(codec, distributions):
    return {name: view[0] for name, view in contract.through_arrow(codec, [distributions]).items()}


def layout_of(codec: ArchiveCodec) -> Layout:
    width, most_code, num_draws, stores_exact, most_tail, *_ = codec._about(0, 0, 0)
    return Layout(width, num_draws, bool(stores_exact), most_code, bool(most_tail))


@pytest.mark.parametrize(("selection", "bits"), CASES, ids=lambda case: getattr(case, "kind", case))
@pytest.mark.parametrize("vocab_size", [7, 300, 2**21])
def test_the_fast_path_is_the_definition(selection, bits, vocab_size):
    distributions = selected.draw(selection, vocab_size=vocab_size, num_positions=12, seed=bits)
    codec = get_codec("archive", {"vocab_size": vocab_size, "bits": bits}, selection)
    assert isinstance(codec, ArchiveCodec)
    found = contract.round_trip(codec, [distributions])[0]
    stream = columns_of(codec, distributions)["archive"].tobytes()
    decoder = Decoder(stream, layout_of(codec))
    counts = distributions.num_entries_P
    given_exact = counts if distributions.num_exact_P is None else distributions.num_exact_P
    record = decoder.decode(counts.tolist(), given_exact.tolist())
    assert record.token_ids == found.token_ids_E.tolist()
    assert record.num_exact == given_exact.tolist()
    assert len(record.outside_codes) == len(found.outside_target_logprobs_M)
    assert decoder.num_bytes == len(stream)
    exact = codec._logprobs(np.array(record.codes, np.int32)[distributions.is_exact_E], bits)
    np.testing.assert_array_equal(exact, found.logprobs_E[distributions.is_exact_E])


@pytest.mark.parametrize("selection", selected.SELECTIONS, ids=lambda s: s.kind)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_mutated_stream_is_refused_or_another_record(selection, data):
    distributions = selected.draw(selection, vocab_size=97, num_positions=9, seed=0)
    codec = get_codec("archive", {"vocab_size": 97}, selection)
    columns = columns_of(codec, distributions)
    stream = bytearray(columns["archive"].tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "add", "zero", "ones"]))
        at = data.draw(st.integers(0, max(len(stream) - 1, 0)))
        if kind == "flip" and stream:
            stream[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del stream[at:]
        elif kind == "add":
            stream[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        else:
            stream[at:] = (b"\0" if kind == "zero" else b"\xff") * (len(stream) - at)
    check_refused_or_sound(codec, {**columns, "archive": np.frombuffer(bytes(stream), np.uint8)}, distributions)


def check_refused_or_sound(codec, columns, distributions):
    try:
        found = codec.decode(columns, distributions.offsets_P1)
    except CorruptCacheError:
        return
    assert found.num_entries == distributions.num_entries
    assert found.num_positions == distributions.num_positions
    assert len(found.outside_target_logprobs_M) <= found.num_positions
    assert ((found.token_ids_E >= 0) & (found.token_ids_E < codec.vocab_size)).all()
    assert (found.logprobs_E <= 0).all()


@settings(deadline=None, max_examples=100)
@given(
    stream=st.binary(max_size=200),
    counts=st.lists(st.integers(0, 65535), max_size=6),
    vocab_size=st.sampled_from([1, 97, 2**31]),
)
def test_any_bytes_are_refused_or_a_record_and_take_memory_in_proportion(stream, counts, vocab_size):
    codec = get_codec("archive", {"vocab_size": vocab_size})
    offsets = np.concatenate([[0], np.cumsum(np.array(counts, np.int64))]).astype(np.int64)
    if offsets[-1] > MOST_ENTRIES_PER_BYTE * len(stream):
        with pytest.raises(CorruptCacheError, match="too few"):
            codec.decode({"archive": np.frombuffer(stream, np.uint8)}, offsets)
    else:
        with contextlib.suppress(CorruptCacheError):
            codec.decode({"archive": np.frombuffer(stream, np.uint8)}, offsets)


def test_whole_vocabularies_take_next_to_nothing_but_are_filled_up():
    everything = contract.make([[(i, -4.5) for i in range(97)]] * 200, tails=[0.0] * 200)
    codec = get_codec("archive", {"vocab_size": 97})
    assert len(columns_of(codec, everything)["archive"]) >= everything.num_entries / MOST_ENTRIES_PER_BYTE
    contract.check_equal_within_bound(codec, contract.round_trip(codec, [everything])[0], everything)


@pytest.mark.parametrize(
    ("supports", "said"),
    [([[(1, -np.inf), (1, -np.inf)]], "twice"), ([[(1, -2.0), (2, -1.0)]], "falling order")],
)
def test_a_record_that_is_none_is_not_encoded(supports, said):
    with pytest.raises(FormatError, match=said):
        get_codec("archive", {"vocab_size": 97}).encode([contract.make(supports)])


def test_frequent_ids_become_short_wherever_they_stand():
    rng = np.random.default_rng(0)
    supports = [[(int(t), -1.0 - i) for i, t in enumerate(rng.permutation(8) * 12_345 + 7)] for _ in range(300)]
    columns = columns_of(get_codec("archive", {"vocab_size": 131_072}), contract.make(supports))
    assert len(columns["archive"]) * 8 / 2400 < 5.5  # 17 bits of fixed width and 8 of logprob; 3 of id are needed


@pytest.mark.parametrize("bits", [3, 9, 15, 17, 8.0, True, None, "8"])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(UnsupportedVersionError, match=r"bits is .* expected an integer from 4 to 8, or 16"):
        get_codec("archive", {"vocab_size": 97, "bits": bits})
