from __future__ import annotations

import contextlib

import numpy as np
import pytest
import selected
from contracts import codec as contract
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike

from kdcache.codec import estimates, get_codec
from kdcache.codec.archive.codec import ArchiveCodec
from kdcache.codec.archive.model import MOST_ENTRIES_PER_BYTE
from kdcache.codec.archive.reference import Decoder, Layout, Record
from kdcache.codec.base import EntryArrays, copy_into
from kdcache.codec.levels import level_masses
from kdcache.errors import CorruptCacheError, FormatError, UnsupportedVersionError
from kdcache.format.record import Distributions
from kdcache.format.selection import has_estimates

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
    assert decoder.num_bytes == len(stream)
    assert_same(found, meaning(codec, record, distributions.offsets_P1))


def meaning(codec: ArchiveCodec, record: Record, offsets_P1) -> Distributions:
    """What the definition's record stands for, by the tables of levels and the rules for estimates."""
    num_exact_P = np.array(record.num_exact, np.int64)
    is_exact_E = estimates.is_exact(offsets_P1, num_exact_P)
    codes_E, kept_P = np.array(record.codes, np.int32), num_exact_P if has_estimates(codec.selection) else None
    tail_mass_P = np.ones(len(num_exact_P), np.float32)
    if record.tail_codes:
        tail_codes_P = np.array(record.tail_codes, np.int32)
        half = codec.bits == 16
        tail_mass_P = np.exp(codec._logprobs(tail_codes_P, 16)) if half else level_masses(8).astype(np.float32)[tail_codes_P]
    counts_D = None
    if estimates.stores_counts(codec.selection):
        counts_D = codec.selection.params["num_draws"] - codes_E[~is_exact_E]
    rows = (offsets_P1, kept_P, tail_mass_P)
    return Distributions(
        token_ids_E=np.array(record.token_ids, np.int32),
        logprobs_E=estimates.all_logprobs(codec._logprobs(codes_E[is_exact_E], codec.bits), counts_D, rows, codec.selection),
        offsets_P1=offsets_P1,
        tail_mass_P=tail_mass_P,
        outside_target_logprobs=codec._logprobs(np.array(record.outside_codes, np.int32), 8),
        num_exact_P=kept_P,
    )


def assert_same(found: Distributions, expected: Distributions) -> None:
    for name in ("token_ids_E", "logprobs_E", "tail_mass_P", "outside_target_logprobs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), strict=True, err_msg=name)
    assert (found.num_exact_P is None) == (expected.num_exact_P is None)
    if expected.num_exact_P is not None:
        np.testing.assert_array_equal(found.num_exact_P, expected.num_exact_P)


@pytest.mark.parametrize(("selection", "bits"), CASES, ids=lambda case: getattr(case, "kind", case))
@pytest.mark.parametrize("keeps", [None, 0b0110_1001_1011, 0])
@pytest.mark.parametrize("spare", [0, 3])
def test_decoding_into_arrays_is_decoding_and_placing(selection, bits, keeps, spare):
    distributions = selected.draw(selection, vocab_size=300, num_positions=12, seed=bits)
    codec = get_codec("archive", {"vocab_size": 300, "bits": bits}, selection)
    columns, keep_P = columns_of(codec, distributions), None if keeps is None else (keeps >> np.arange(12) & 1).astype(bool)
    num_kept, width = 12 if keep_P is None else int(keep_P.sum()), int(distributions.num_entries_P.max()) + spare
    found, expected = blank(num_kept, width), blank(num_kept, width)
    codec.decode_into(columns, distributions.offsets_P1, found, keep_P)
    copy_into(codec.decode(columns, distributions.offsets_P1), expected, keep_P)
    for name in ("token_ids_PK", "logprobs_PK", "tail_mass_P", "num_exact_P"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def blank(num_positions: int, width: int, dtype: DTypeLike = np.float32) -> EntryArrays:
    shape = (num_positions, width)
    return EntryArrays(
        np.full(shape, 123, np.int32), np.full(shape, 1.5, dtype), np.full(shape[0], 7, np.float32),
        num_exact_P=np.full(shape[0], 9, np.int64),
    )  # fmt: skip


def test_float16_is_decoded_into_float16():
    distributions = selected.draw(selected.SELECTIONS[0], vocab_size=97, num_positions=9, seed=0)
    codec = get_codec("archive", {"vocab_size": 97, "bits": 16}, selected.SELECTIONS[0])
    columns, width = columns_of(codec, distributions), int(distributions.num_entries_P.max())
    found, expected = blank(9, width, np.float16), blank(9, width)
    for out in (found, expected):
        codec.decode_into(columns, distributions.offsets_P1, out)
    assert found.logprobs_PK.dtype == np.float16
    np.testing.assert_array_equal(found.logprobs_PK.astype(np.float32), expected.logprobs_PK)


def test_every_float16_that_a_logprob_may_become_is_read_as_numpy_reads_it():
    halves = np.arange(0x7C01, dtype=np.uint16)
    sizes = halves.view(np.float16).astype(np.float32)
    rows = np.array_split(np.arange(len(sizes)), 500)
    supports = contract.make([list(zip(range(len(row)), -sizes[row], strict=True)) for row in rows], tails=[0.0] * len(rows))
    codec = get_codec("archive", {"vocab_size": 97, "bits": 16})
    found = contract.round_trip(codec, [supports])[0]
    np.testing.assert_array_equal(found.logprobs_E, -sizes)
    np.testing.assert_array_equal(np.signbit(found.logprobs_E), True)


def test_arrays_that_do_not_fit_are_not_written_to():
    distributions = selected.draw(selected.SELECTIONS[0], vocab_size=97, num_positions=9, seed=0)
    codec = get_codec("archive", {"vocab_size": 97}, selected.SELECTIONS[0])
    columns, width = columns_of(codec, distributions), int(distributions.num_entries_P.max())
    with pytest.raises(CorruptCacheError, match=f"a position has {width} entries"):
        codec.decode_into(columns, distributions.offsets_P1, blank(9, width - 1))
    wide = blank(9, 2 * width)
    strided = EntryArrays(wide.token_ids_PK[:, ::2], wide.logprobs_PK[:, ::2], wide.tail_mass_P)
    with pytest.raises(ValueError, match="C-contiguous"):
        codec.decode_into(columns, distributions.offsets_P1, strided)
    with pytest.raises(ValueError, match="8 positions, but 9 are kept"):
        codec.decode_into(columns, distributions.offsets_P1, blank(8, width))
    assert (wide.token_ids_PK == 123).all()


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
    out = blank(distributions.num_positions, int(distributions.num_entries_P.max()))
    try:
        found = codec.decode(columns, distributions.offsets_P1)
    except CorruptCacheError:
        with pytest.raises(CorruptCacheError):
            codec.decode_into(columns, distributions.offsets_P1, out)
        return
    codec.decode_into(columns, distributions.offsets_P1, out)
    assert found.num_entries == distributions.num_entries
    assert found.num_positions == distributions.num_positions
    assert len(found.outside_target_logprobs) <= found.num_positions
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
