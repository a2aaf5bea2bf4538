"""Reductions against plain loops over dense rows; the random ones by a z-test that a biased one fails."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from derive_cases import SELECTIONS, VOCAB_SIZE, Z_LIMIT, captured, dense, largest_z, random_logprobs, text

from kdcache.derive.reduction.reduce import Reduction, reduce_record, reduced_selection
from kdcache.derive.reduction.sampled import reduce_threshold
from kdcache.derive.reduction.systematic import position_uniforms, systematic_counts
from kdcache.errors import ConfigError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import NO_TARGET
from kdcache.format.record_checks import check_distributions
from kdcache.format.selection import check_selection, most_entries
from kdcache.teacher.select.reference import draw_reference
from kdcache.teacher.select.uniforms import position_states, uniforms_of


def reduced(kind, reduction, *, num_tokens=30, seed=0):
    """A captured record, the one made of it, its selection, and the whole distributions."""
    before, sequence, logprobs_PV = SELECTIONS[kind], text(num_tokens), random_logprobs(num_tokens - 1)
    record, after = captured(sequence, logprobs_PV, before), reduced_selection(before, reduction, seed)
    made = reduce_record(record, before, after)
    check_selection(after)
    check_distributions(made.distributions, vocab_size=VOCAB_SIZE)
    assert (made.distributions.num_entries_P <= most_entries(after, VOCAB_SIZE)).all()
    return record, made, after, logprobs_PV


@pytest.mark.parametrize(
    ("kind", "reduction", "selection"),
    [
        ("top_k", Reduction(top_k=3), SelectionInfo(kind="top_k", params={"k": 3})),
        ("top_k", Reduction(top_p=0.5), SelectionInfo(kind="top_p_k", params={"k": 8, "p": 0.5})),
        ("top_k", Reduction(top_p=0.5, top_k=2), SelectionInfo(kind="top_p_k", params={"k": 2, "p": 0.5})),
        ("top_p_k", Reduction(top_p=0.3), SelectionInfo(kind="top_p_k", params={"k": 12, "p": 0.3})),
        ("top_p_k", Reduction(top_k=4), SelectionInfo(kind="top_p_k", params={"k": 4, "p": 0.8})),
    ],
)
def test_a_reduced_exact_record_is_what_a_capture_would_have_stored(kind, reduction, selection):
    record, made, after, logprobs_PV = reduced(kind, reduction)
    assert after == selection
    expected = captured(record.sequence, logprobs_PV, selection).distributions
    found = made.distributions
    np.testing.assert_array_equal(found.token_ids_E, expected.token_ids_E)
    np.testing.assert_array_equal(found.logprobs_E, expected.logprobs_E)
    np.testing.assert_array_equal(found.offsets_P1, expected.offsets_P1)
    np.testing.assert_allclose(found.tail_mass_P, expected.tail_mass_P, atol=1e-6)
    np.testing.assert_array_equal(found.outside_target_logprobs, expected.outside_target_logprobs)


@pytest.mark.parametrize(
    ("kind", "reduction"),
    [
        ("threshold", Reduction(tau=0.1)),
        ("sampled", Reduction(draws=12)),
        ("top_k_sampled", Reduction(draws=7)),
        ("top_k_sampled", Reduction(top_k=1)),
        ("top_k_sampled", Reduction(top_k=2, draws=5)),
    ],
)
def test_a_reduced_random_record_is_unbiased_and_keeps_every_target(kind, reduction):
    num_positions = 4000
    p_V = np.exp(random_logprobs(1)[0])
    sequence, before = text(num_positions + 1), SELECTIONS[kind]
    record = captured(sequence, np.log(np.tile(p_V, (num_positions, 1))), before)
    after = reduced_selection(before, reduction, 0)
    made = reduce_record(record, before, after).distributions
    check_distributions(made, vocab_size=VOCAB_SIZE)
    assert made.num_entries < record.distributions.num_entries
    assert largest_z(dense(made), p_V) < Z_LIMIT
    targets_P = sequence.target_ids_P
    known_P = made.target_logprobs(targets_P)[targets_P != NO_TARGET]
    np.testing.assert_allclose(known_P, np.log(p_V)[targets_P[targets_P != NO_TARGET]], rtol=1e-6)
    exact_p = np.where(made.is_exact_E, np.exp(made.logprobs_E.astype(np.float64)), 0.0)
    exact_P = np.bincount(np.repeat(np.arange(num_positions), made.num_entries_P), exact_p, minlength=num_positions)
    np.testing.assert_allclose(made.tail_mass_P, 1.0 - exact_P, atol=2e-6)


def test_the_z_test_fails_where_the_second_draw_has_the_numbers_of_the_first():
    """What another seed for each history is for; and proof that the test above can fail."""
    p_V, before, sequence = np.exp(random_logprobs(1)[0]), SELECTIONS["threshold"], text(4001)
    record = captured(sequence, np.log(np.tile(p_V, (4000, 1))), before)
    targets = sequence.target_ids_P, record.distributions.target_logprobs(sequence.target_ids_P)
    states_P = position_states(before.params["seed"], sequence.key, sequence.positions_P)
    made = reduce_threshold(record.distributions, targets, (0.03, 0.1), uniforms_of(states_P, 1)[:, 0])
    assert largest_z(dense(made), p_V) > 2 * Z_LIMIT


def test_reducing_twice_is_unbiased_too():
    p_V, sequence, selection = np.exp(random_logprobs(1)[0]), text(4001), SELECTIONS["threshold"]
    record = captured(sequence, np.log(np.tile(p_V, (4000, 1))), selection)
    for tau in (0.06, 0.15):
        after = reduced_selection(selection, Reduction(tau=tau), seed=0)
        record, selection = reduce_record(record, selection, after), after
    assert largest_z(dense(record.distributions), p_V) < Z_LIMIT
    assert selection.params["tau"] == 0.15


def test_a_larger_tau_is_the_systematic_draw_of_its_definition():
    record, made, after, _ = reduced("threshold", Reduction(tau=0.1))
    before, found = record.distributions, made.distributions
    u_P = position_uniforms(after.params["seed"], record.sequence.key, record.sequence.positions_P)
    for p in range(before.num_positions):
        entries = slice(before.offsets_P1[p], before.offsets_P1[p + 1])
        ids, logprobs, is_exact = before.token_ids_E[entries], before.logprobs_E[entries], before.is_exact_E[entries]
        stays = is_exact & (logprobs >= np.log(0.1))
        values_V = np.zeros(VOCAB_SIZE)
        values_V[ids[~stays]] = np.where(is_exact, np.exp(logprobs.astype(np.float64)), 0.03)[~stays]
        points = (np.arange(20) + u_P[p]) * 0.1
        drawn = draw_reference(values_V, points[points < values_V.sum()])
        here = slice(found.offsets_P1[p], found.offsets_P1[p + 1])
        assert found.token_ids_E[here].tolist() == [*ids[stays].tolist(), *sorted(drawn.tolist())]
        np.testing.assert_allclose(found.logprobs_E[here][stays.sum() :], np.log(0.1), rtol=1e-6)
        assert found.num_exact_P is not None
        assert found.num_exact_P[p] == stays.sum()


def test_fewer_draws_are_whole_draws_and_as_many_at_each_position():
    _, made, after, _ = reduced("sampled", Reduction(draws=12))
    counts = dense(made.distributions) * 12
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-5)
    np.testing.assert_allclose(counts.sum(axis=-1), 12)
    assert after.params["num_draws"] == 12


def test_what_is_of_the_whole_distribution_passes_through():
    before, sequence, logprobs_PV = SELECTIONS["threshold"], text(12), random_logprobs(11)
    before = SelectionInfo(kind="threshold", params=before.params, temperatures=(2.0,), entropy=True)
    record = captured(sequence, logprobs_PV, before)
    rows_PH = np.ones((11, 4), np.float32)
    record = dataclasses.replace(record, distributions=dataclasses.replace(record.distributions, features={"h": rows_PH}))
    after = reduced_selection(before, Reduction(tau=0.2), 0)
    made = reduce_record(record, before, after).distributions
    np.testing.assert_array_equal(made.log_z_PL, record.distributions.log_z_PL)
    np.testing.assert_array_equal(made.entropy_P, record.distributions.entropy_P)
    assert made.features["h"] is rows_PH
    assert (after.temperatures, after.entropy) == ((2.0,), True)


def test_systematic_counts_are_floor_or_ceiling_and_the_weight_in_the_mean():
    weights_E, ids_E = np.array([0.3, 2.6, 0.0, 1.0, 0.05]), np.array([7, 1, 3, 9, 2], np.int32)
    counts = np.stack([systematic_counts(weights_E, ids_E, np.array([0, 5]), np.array([u / 2000])) for u in range(2000)])
    assert ((counts == np.floor(weights_E)) | (counts == np.ceil(weights_E))).all()
    np.testing.assert_allclose(counts.mean(axis=0), weights_E, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "reduction", "sentence"),
    [
        ("top_k", Reduction(), "no reduction is named"),
        ("top_k", Reduction(top_k=8), "top_k is 8, but the cache's is 8 already"),
        ("top_k", Reduction(top_k=0), "expected a whole number of at least 1"),
        ("top_k", Reduction(tau=0.1), "which tokens share the mass of its tail was not kept"),
        ("top_p_k", Reduction(draws=9), "draws is not possible for selection 'top_p_k'"),
        ("top_p_k", Reduction(top_p=0.9), "expected one below that"),
        ("top_k", Reduction(top_p=1.5), "expected a number above 0 and at most 1"),
        ("top_k", Reduction(top_p=float("nan")), "expected a number above 0 and at most 1"),
        ("threshold", Reduction(top_k=4), "would bias the target; it can be reduced by tau"),
        ("threshold", Reduction(tau=0.01), "expected one above that"),
        ("threshold", Reduction(tau=1.2), "expected a number from"),
        ("sampled", Reduction(top_k=4), "would bias the target; it can be reduced by draws"),
        ("sampled", Reduction(draws=0), "expected a whole number from 1"),
        ("sampled", Reduction(draws=60), "draws is 60, but the cache's is 30 already"),
        ("sampled", Reduction(tau=0.1), "its estimates are not of that kind"),
        ("top_k_sampled", Reduction(top_p=0.4), "would bias the target"),
    ],
)
def test_a_reduction_that_cannot_be_had_is_refused_in_words(kind, reduction, sentence):
    with pytest.raises(ConfigError, match=sentence):
        reduced_selection(SELECTIONS[kind], reduction, 0)
