from __future__ import annotations

import numpy as np
import pytest
import selected
import strategies
from contracts import codec as contract
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.codec import CODECS, get_codec
from kdcache.codec.base import list_array
from kdcache.errors import FormatError, UnsupportedVersionError
from kdcache.format.record import NO_TARGET
from kdcache.format.record_checks import check_distributions


@pytest.mark.parametrize("codec_id", CODECS)
@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_a_codec_keeps_its_contract(codec_id, check):
    check(lambda vocab_size: get_codec(codec_id, {"vocab_size": vocab_size}))


@pytest.mark.parametrize("codec_id", CODECS)
def test_what_a_selection_keeps_beside_the_entries_comes_back(codec_id):
    contract.check_selections(codec_id)


@pytest.mark.parametrize("bits", [None, 4, 6, 16])
@pytest.mark.parametrize("codec_id", CODECS)
@pytest.mark.parametrize("selection", selected.SELECTIONS, ids=lambda s: s.kind)
def test_what_a_teacher_says_comes_back_under_every_selection(selection, codec_id, bits):
    if bits is not None and (codec_id not in ("quantized", "archive") or (bits == 16 and codec_id != "archive")):
        pytest.skip("has no such bits")
    params = {"vocab_size": 300, **({} if bits is None else {"bits": bits})}
    codec = get_codec(codec_id, params, selection)
    sequences = [selected.draw(selection, vocab_size=300, num_positions=size, seed=size) for size in (17, 1)]
    for found, expected in zip(contract.round_trip(codec, sequences), sequences, strict=True):
        contract.check_equal_within_bound(codec, found, expected)
        contract.check_sums_and_order(codec, found, expected)
        check_distributions(found, vocab_size=300)
        again = contract.round_trip(codec, [found])[0]
        np.testing.assert_array_equal(again.token_ids_E, found.token_ids_E)
        assert again.num_exact_P is None or (again.num_exact_P == expected.num_exact_P).all()


@pytest.mark.parametrize("codec_id", CODECS)
def test_unfit_parameters_are_refused(codec_id):
    contract.check_unfit_parameters(codec_id)


@pytest.mark.parametrize("codec_id", CODECS)
@settings(deadline=None, max_examples=60)
@given(data=st.data(), vocab_size=strategies.vocab_sizes)
def test_any_record_comes_back(codec_id, data, vocab_size):
    targets = st.lists(st.one_of(st.just(NO_TARGET), strategies.token_ids(vocab_size)), max_size=5)
    sequences = [
        data.draw(strategies.distributions(vocab_size=vocab_size, target_ids_P=np.array(data.draw(targets), np.int32)))
        for _ in range(data.draw(st.integers(0, 3)))
    ]
    contract.check_round_trip(get_codec(codec_id, {"vocab_size": vocab_size}), sequences)


def test_the_raw_codec_is_exact():
    assert not get_codec("raw", {"vocab_size": 97}).max_error_nats(np.array([-1.0, -np.inf, 0.0])).any()


def test_an_unknown_codec_is_refused_with_the_known_ones():
    with pytest.raises(UnsupportedVersionError, match=r"'zip'.*raw, packed, quantized, archive.*upgrade"):
        get_codec("zip", {})


def test_more_values_than_list_offsets_can_count_are_refused():
    class Long:
        def __len__(self) -> int:
            return 2**30

    import pyarrow as pa

    with pytest.raises(FormatError, match=str(2**31)):
        list_array([Long(), Long()], pa.int32())
