from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import strategies
from cache_making import make_record, make_sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import FormatError
from kdcache.format.record import NO_TARGET, PADDING_ID, Distributions, distributions_from_dense, find_targets, sequence_key
from kdcache.format.record_checks import check_distributions, check_mass


def replaced(d: Distributions, **fields) -> Distributions:
    names = ("token_ids_E", "logprobs_E", "offsets_P1", "tail_mass_P", "outside_target_logprobs")
    return Distributions(**{name: fields.get(name, getattr(d, name)) for name in names})


def test_a_target_is_the_token_after_the_position_and_the_last_position_has_none():
    sequence = make_sequence(0, num_tokens=6, supervised="every")
    assert sequence.target_ids_P.tolist() == [*sequence.input_ids_N[1:].tolist(), NO_TARGET]
    assert sequence.target_ids_P.dtype == np.int32
    assert sequence.positions_P.tolist() == list(range(6))


def test_a_sequence_without_supervised_positions_has_no_targets():
    sequence = make_sequence(0, num_tokens=6, supervised="none")
    assert sequence.target_ids_P.tolist() == []
    assert sequence.positions_P.tolist() == []


@given(record=strategies.sequence_records())
def test_a_drawn_record_keeps_every_promise(record):
    check_distributions(record.distributions, vocab_size=97)
    assert record.distributions.num_positions == record.sequence.supervised_N.sum()


@given(record=strategies.sequence_records())
def test_targets_are_found_as_a_plain_loop_finds_them(record):
    d, targets_P = record.distributions, record.sequence.target_ids_P
    has_target_P, inside_P, logprobs_P = find_targets(d, targets_P)
    for p, target in enumerate(targets_P):
        entries = slice(d.offsets_P1[p], d.offsets_P1[p + 1])
        support = dict(zip(d.token_ids_E[entries].tolist(), d.logprobs_E[entries].tolist(), strict=True))
        assert has_target_P[p] == (target != NO_TARGET)
        assert inside_P[p] == (target in support)
        assert np.array_equal(logprobs_P[p], np.float32(support.get(int(target), np.nan)), equal_nan=True)


@given(record=strategies.sequence_records())
def test_every_target_has_its_logprob_inside_or_outside_the_support(record):
    logprobs_P = record.distributions.target_logprobs(record.sequence.target_ids_P)
    np.testing.assert_array_equal(np.isnan(logprobs_P), record.sequence.target_ids_P == NO_TARGET)


def test_a_wrong_number_of_outside_targets_is_refused():
    record = make_record(1)
    d = record.distributions
    more = replaced(d, outside_target_logprobs=np.append(d.outside_target_logprobs, np.float32(-1)))
    with pytest.raises(FormatError, match="targets are none"):
        more.target_logprobs(record.sequence.target_ids_P)


@given(record=strategies.sequence_records(), more=st.integers(0, 2))
def test_padding_keeps_the_entries_and_marks_the_rest(record, more):
    d = record.distributions
    width = int(d.num_entries_P.max(initial=0)) + more
    ids_PK, logprobs_PK = d.padded(width)
    assert ids_PK.shape == logprobs_PK.shape == (d.num_positions, width)
    np.testing.assert_array_equal(ids_PK[ids_PK != PADDING_ID], d.token_ids_E)
    np.testing.assert_array_equal((ids_PK != PADDING_ID).sum(axis=1), d.num_entries_P)
    assert np.isneginf(logprobs_PK[ids_PK == PADDING_ID]).all()
    if width and d.num_entries_P.max(initial=0):
        with pytest.raises(ValueError, match="num_columns"):
            d.padded(int(d.num_entries_P.max()) - 1)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), num_positions=st.integers(0, 5), k=st.integers(0, 9))
def test_dense_rows_come_into_the_records_order_with_the_mass_that_they_leave_out(seed, num_positions, k):
    rng = np.random.default_rng(seed)
    logprobs_PV = rng.integers(-4, 0, (num_positions, 9)).astype(np.float64)  # few values: many ties
    logprobs_PV -= np.log(np.exp(logprobs_PV).sum(axis=1, keepdims=True))
    ids_PK = np.argsort(rng.random((num_positions, 9)), axis=1)[:, :k]
    targets_P = rng.integers(-1, 9, num_positions).astype(np.int32)
    rows = np.arange(num_positions)
    d = distributions_from_dense(
        ids_PK, np.take_along_axis(logprobs_PV, ids_PK, axis=1), targets_P, logprobs_PV[rows, targets_P]
    )
    check_distributions(d, vocab_size=9)
    mass_P = np.take_along_axis(np.exp(logprobs_PV), ids_PK, axis=1).sum(axis=1)
    np.testing.assert_allclose(d.tail_mass_P, 1 - mass_P, atol=1e-6)
    found_P = d.target_logprobs(targets_P)
    has_target_P = targets_P != NO_TARGET
    np.testing.assert_allclose(found_P[has_target_P], logprobs_PV[rows, targets_P][has_target_P], rtol=1e-6)
    for p in range(num_positions):
        entries = slice(d.offsets_P1[p], d.offsets_P1[p + 1])
        pairs = list(zip((-d.logprobs_E[entries]).tolist(), d.token_ids_E[entries].tolist(), strict=True))
        assert pairs == sorted(pairs)
        assert set(d.token_ids_E[entries].tolist()) == set(ids_PK[p].tolist())


def broken() -> dict[str, tuple[dict, str]]:
    d = make_record(3).distributions
    twice, outside, negative = d.token_ids_E.copy(), d.token_ids_E.copy(), d.token_ids_E.copy()
    twice[6], outside[7], negative[8] = twice[5], 97, -1
    rising, above, nan = d.logprobs_E.copy(), d.logprobs_E.copy(), d.logprobs_E.copy()
    rising[5], above[0], nan[5] = -90.0, 0.5, np.nan
    tail = np.where(np.arange(d.num_positions) == 2, 1.5, d.tail_mass_P).astype(np.float32)
    return {
        "a repeated id": ({"token_ids_E": twice}, "supervised position 1: a token id appears twice"),
        "an id beyond the vocabulary": (
            {"token_ids_E": outside},
            "supervised position 1: a token id is outside the vocabulary of 97",
        ),
        "a negative id": ({"token_ids_E": negative}, "supervised position 1: a token id is outside"),
        "wrong order": ({"logprobs_E": rising}, "supervised position 1: logprobs are not in falling order"),
        "a positive logprob": ({"logprobs_E": above}, "supervised position 0: a logprob is above 0 or NaN"),
        "NaN": ({"logprobs_E": nan}, "supervised position 1: a logprob is above 0 or NaN"),
        "a tail above one": ({"tail_mass_P": tail}, "supervised position 2: tail_mass is outside"),
        "a NaN tail": ({"tail_mass_P": tail * np.nan}, "supervised position 0: tail_mass is outside"),
        "too few tails": ({"tail_mass_P": tail[1:]}, "tails"),
        "too few logprobs": ({"logprobs_E": rising[1:]}, "logprobs"),
        "no offsets": ({"offsets_P1": np.zeros(0, np.int64)}, "offsets"),
        "offsets that fall": ({"offsets_P1": np.array([0, 9, 5, d.num_entries])}, "offsets"),
        "offsets that end early": ({"offsets_P1": d.offsets_P1[:-1]}, "offsets"),
        "a NaN target": ({"outside_target_logprobs": np.array([np.nan], np.float32)}, "target's logprob"),
    }


@pytest.mark.parametrize("name", broken())
def test_a_broken_promise_is_named_with_its_position(name):
    fields, sentence = broken()[name]
    with pytest.raises(FormatError, match=sentence):
        check_distributions(replaced(make_record(3).distributions, **fields), vocab_size=97)


def test_a_teachers_probabilities_sum_to_one_or_it_is_said():
    logprobs = np.log(np.array([0.5, 0.25, 0.6, 0.3], np.float32))
    d = Distributions(
        token_ids_E=np.arange(4, dtype=np.int32), logprobs_E=logprobs, offsets_P1=np.array([0, 2, 4]),
        tail_mass_P=np.array([0.25, 0.1], np.float32), outside_target_logprobs=np.zeros(0, np.float32),
    )  # fmt: skip
    check_mass(d)
    for change in (
        {"logprobs_E": logprobs / 2},
        {"tail_mass_P": np.array([0.25, 0.2], np.float32)},
        {"logprobs_E": logprobs - 0.1},
    ):
        with pytest.raises(FormatError, match="do not sum to 1: the logprobs are not normalised over the whole vocabulary"):
            check_mass(replaced(d, **change))
    check_mass(
        replace(d, num_exact_P=np.array([2, 1]), tail_mass_P=np.array([0.25, 0.4], np.float32))
    )  # an estimate's probability is not what is left of 1


def test_a_key_depends_on_tokens_mask_and_template_and_on_where_one_ends_and_the_next_begins():
    ids, mask = np.array([1, 2, 3], np.int32), np.array([True, False, True])
    keys = {
        sequence_key(ids, mask, ""),
        sequence_key(ids[:2], mask[:2], ""),
        sequence_key(ids[::-1], mask, ""),
        sequence_key(ids, ~mask, ""),
        sequence_key(ids, mask, "t"),
        sequence_key(np.append(ids, 1).astype(np.int32), np.append(mask, True), ""),
    }
    assert len(keys) == 6
    assert all(len(key) == 16 for key in keys)
    assert sequence_key(np.repeat(ids, 2)[::2], np.repeat(mask, 2)[::2], "") == sequence_key(ids, mask, "")
    assert (
        sequence_key(ids, mask, "").hex() == "55ea0b711db9838c9643699a4541af57"
    )  # the same in every version, on every machine


def test_where_no_token_follows_every_part_says_so_with_the_number_that_torch_leaves_out():
    from kdcache.kernels import base
    from kdcache.loader.batches import batch

    assert NO_TARGET == base.NO_TARGET == batch.NO_TARGET == -100
