"""Which sequences are taken, and leaving out positions."""

from __future__ import annotations

import numpy as np
import pytest
from cache_making import make_identity, make_record
from derive_cases import SELECTIONS, VOCAB_SIZE, captured, random_logprobs, text

from kdcache.derive.choose import Select, sampled, selected
from kdcache.derive.derivation import check_concatenation
from kdcache.derive.positions import keep_positions
from kdcache.derive.scalars import check_available, record_values
from kdcache.errors import ConfigError, InputError, MismatchError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import SequenceRecord, sequence_key
from kdcache.format.record_checks import check_distributions

KEYS = np.random.default_rng(3).integers(0, 256, (1000, 16), np.uint8)


def test_numbers_and_keys_choose_each_sequence_once():
    twice = np.concatenate([KEYS[:10], KEYS[4:5]])
    select = Select(ranges=((2, 4), (3, 6)), keys=(KEYS[4].tobytes(), KEYS[9].tobytes()))
    assert np.flatnonzero(selected(select, twice)).tolist() == [2, 3, 4, 5, 9, 10]


def test_what_is_not_there_cannot_be_chosen():
    with pytest.raises(ConfigError, match=r"5:1001 is not among the 1,000 sequences"):
        selected(Select(ranges=((5, 1001),)), KEYS)
    with pytest.raises(InputError, match=f"no sequence has the key {'00' * 16} \\(1 of 2 keys"):
        selected(Select(keys=(bytes(16), KEYS[0].tobytes())), KEYS)
    with pytest.raises(ConfigError, match="has 2 bytes, expected 16"):
        selected(Select(keys=(b"ab",)), KEYS)


def test_a_sample_has_its_size_whatever_the_order_and_a_larger_one_holds_it():
    small, large, order = sampled(0.1, 5, KEYS), sampled(0.3, 5, KEYS), np.random.default_rng(0).permutation(1000)
    assert (small.sum(), large.sum()) == (100, 300)
    assert not (small & ~large).any()
    np.testing.assert_array_equal(sampled(0.1, 5, KEYS[order]), small[order])
    assert (sampled(0.1, 6, KEYS) & small).sum() < 30


def test_samples_take_every_sequence_as_often():
    taken = sum(sampled(0.25, seed, KEYS[:40]).astype(int) for seed in range(2000))
    assert abs((np.asarray(taken) / 2000 - 0.25) / np.sqrt(0.25 * 0.75 / 2000)).max() < 4.5


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_a_fraction_lies_between_nothing_and_all(fraction):
    with pytest.raises(ConfigError, match="expected one above 0 and at most 1"):
        sampled(fraction, 0, KEYS)


@pytest.mark.parametrize("kind", SELECTIONS)
def test_positions_left_out_take_their_rows_with_them(kind):
    selection = SelectionInfo(kind=kind, params=SELECTIONS[kind].params, temperatures=(2.0,), entropy=True)
    sequence, logprobs_PV = text(20), random_logprobs(19)
    whole = captured(sequence, logprobs_PV, selection)
    keep_P = np.random.default_rng(0).random(19) < 0.5
    found = keep_positions(whole, keep_P, make_identity("raw"))
    check_distributions(found.distributions, vocab_size=VOCAB_SIZE)
    np.testing.assert_array_equal(found.sequence.positions_P, sequence.positions_P[keep_P])
    assert found.sequence.key == sequence_key(sequence.input_ids_N, found.sequence.supervised_N, "")
    kept_targets_P, d = found.sequence.target_ids_P, whole.distributions
    np.testing.assert_array_equal(
        found.distributions.target_logprobs(kept_targets_P), d.target_logprobs(sequence.target_ids_P)[keep_P]
    )
    ids, logprobs = found.distributions.padded(40)
    expected_ids, expected_logprobs = d.padded(40)
    np.testing.assert_array_equal(ids, expected_ids[keep_P])
    np.testing.assert_array_equal(logprobs, expected_logprobs[keep_P])
    for name in ("tail_mass_P", "log_z_PL", "entropy_P"):
        np.testing.assert_array_equal(getattr(found.distributions, name), getattr(d, name)[keep_P])
    if d.num_exact_P is not None:
        np.testing.assert_array_equal(found.distributions.num_exact_P, d.num_exact_P[keep_P])


def test_a_record_of_which_nothing_is_left_out_stays_itself():
    record = make_record(1)
    assert keep_positions(record, np.ones(11, bool), make_identity("raw")) is record


def test_scalars_are_those_of_the_whole_distribution():
    selection = SelectionInfo(kind="top_k", params={"k": 5}, entropy=True)
    logprobs_PV, sequence = random_logprobs(19), text(20, source="here")
    values = record_values(captured(sequence, logprobs_PV, selection), ["entropy", "top1_probability"], selection, VOCAB_SIZE)
    np.testing.assert_allclose(values["top1_probability"], np.exp(logprobs_PV.max(axis=-1)), rtol=1e-6)
    np.testing.assert_allclose(values["entropy"], -(np.exp(logprobs_PV) * logprobs_PV).sum(axis=-1), rtol=1e-5)
    assert (values["num_tokens"], values["num_targets"], values["source"]) == (20.0, 19.0, "here")


def test_the_entropy_lies_between_floor_and_ceiling_where_it_is_not_stored():
    logprobs_PV, selection = random_logprobs(19), SELECTIONS["top_k"]
    values = record_values(captured(text(20), logprobs_PV, selection), ["entropy_floor"], selection, VOCAB_SIZE)
    entropy_P = -(np.exp(logprobs_PV) * logprobs_PV).sum(axis=-1)
    assert (values["entropy_floor"] <= entropy_P + 1e-6).all()
    assert (values["entropy_ceiling"] >= entropy_P - 1e-6).all()


def test_the_largest_probability_below_tau_is_said_to_be_tau():
    selection, flat_PV = SelectionInfo(kind="threshold", params={"tau": 0.1, "seed": 0}), np.full((3, 41), -np.log(41.0))
    values = record_values(captured(text(4), flat_PV, selection), ["top1_probability"], selection, VOCAB_SIZE)
    assert np.asarray(values["top1_probability"]).tolist() == [0.1] * 3


def test_what_a_selection_does_not_keep_cannot_be_asked_of_it():
    with pytest.raises(ConfigError, match="the entropy is not stored in this cache; ask for entropy_floor or entropy_ceiling"):
        check_available({"entropy"}, SELECTIONS["top_k"])
    with pytest.raises(ConfigError, match="top1_probability cannot be told from selection 'sampled'"):
        check_available({"top1_probability"}, SELECTIONS["sampled"])
    check_available({"target_logprob", "entropy_floor"}, SELECTIONS["threshold"])


def test_caches_of_other_teachers_or_selections_do_not_follow_one_another():
    first = make_identity()
    seeded = [make_identity(selection=SelectionInfo(kind="threshold", params={"tau": 0.1, "seed": s})) for s in (0, 1)]
    check_concatenation([first, make_identity("packed")], ["a", "b"])
    check_concatenation(seeded, ["a", "b"])
    with pytest.raises(MismatchError, match=r"'a' and 'b' cannot be concatenated.*teacher.model: 'made-up' != 'other'"):
        check_concatenation([first, make_identity(model="other")], ["a", "b"])
    with pytest.raises(MismatchError, match=r"selection.params.k: 5 != 7"):
        check_concatenation([first, make_identity(k=7)], ["a", "b"])


def test_a_record_is_never_changed_in_place():
    record = make_record(2, supervised="every")
    before = [values.copy() for values in (record.sequence.supervised_N, record.distributions.token_ids_E)]
    keep_positions(record, np.arange(12) % 2 == 0, make_identity("raw"))
    assert isinstance(record, SequenceRecord)
    np.testing.assert_array_equal(record.sequence.supervised_N, before[0])
    np.testing.assert_array_equal(record.distributions.token_ids_E, before[1])
