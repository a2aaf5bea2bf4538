"""Mixtures against weighted sums of dense rows; unbiased ones by a z-test."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from cache_making import make_identity
from derive_cases import SELECTIONS, VOCAB_SIZE, Z_LIMIT, captured, dense, largest_z, random_logprobs, text

from kdcache.derive.match import match_keys, shared_sequences
from kdcache.derive.mix import check_weights, mix_records, mixed_identity
from kdcache.errors import ConfigError, InputError, MismatchError
from kdcache.format.manifest import Identity, SelectionInfo
from kdcache.format.record import NO_TARGET
from kdcache.format.record_checks import check_distributions

WEIGHTS = (0.3, 0.7)


def identity(selection: SelectionInfo, model: str = "a") -> Identity:
    return make_identity("raw", vocab_size=VOCAB_SIZE, model=model, selection=selection)


def mixed(kinds, num_positions=25, *, same_everywhere=False):
    """The mixture of two teachers' records, its selection, and the mixture's whole distribution."""
    sequence = text(num_positions + 1)
    each = [random_logprobs(1 if same_everywhere else num_positions, seed) for seed in (1, 2)]
    each = [np.tile(rows, (num_positions // len(rows), 1)) for rows in each]
    records = [captured(sequence, rows, SELECTIONS[kind]) for rows, kind in zip(each, kinds, strict=True)]
    made_of = mixed_identity([identity(SELECTIONS[kind]) for kind in kinds], ["a", "b"], WEIGHTS, 0)
    record = mix_records(records, WEIGHTS, made_of.selection)
    check_distributions(record.distributions, vocab_size=VOCAB_SIZE)
    return record, records, made_of.selection, sum(w * np.exp(rows) for w, rows in zip(WEIGHTS, each, strict=True))


@pytest.mark.parametrize("kinds", [("top_k", "top_k"), ("top_p_k", "top_k")])
def test_a_mixture_of_exact_caches_holds_what_both_know_and_nothing_else(kinds):
    record, records, selection, p_PV = mixed(kinds)
    assert selection == SelectionInfo(kind="top_k", params={"k": 8})
    found_PV, parts = dense(record.distributions), [dense(part.distributions) > 0 for part in records]
    np.testing.assert_array_equal(found_PV > 0, parts[0] & parts[1])
    np.testing.assert_allclose(found_PV[found_PV > 0], p_PV[found_PV > 0], rtol=1e-6)
    np.testing.assert_allclose(record.distributions.tail_mass_P, 1.0 - found_PV.sum(axis=-1), atol=1e-6)
    assert record.distributions.num_exact_P is None


@pytest.mark.parametrize("kinds", [("threshold", "threshold"), ("sampled", "top_k_sampled"), ("threshold", "sampled")])
def test_a_mixture_of_random_caches_is_unbiased(kinds):
    record, _, selection, p_PV = mixed(kinds, 4000, same_everywhere=True)
    assert (selection.kind, selection.params["num_draws"]) == ("sampled", 65535)
    assert largest_z(dense(record.distributions), p_PV[0]) < Z_LIMIT


@pytest.mark.parametrize("kinds", [("threshold", "threshold"), ("top_k", "top_p_k"), ("sampled", "sampled")])
def test_the_target_of_a_mixture_is_exact_wherever_it_stands(kinds):
    record, _, _, p_PV = mixed(kinds, 200)
    targets_P = record.sequence.target_ids_P
    has_P = targets_P != NO_TARGET
    found_P = record.distributions.target_logprobs(targets_P)[has_P]
    np.testing.assert_allclose(found_P, np.log(p_PV[has_P, targets_P[has_P]]), rtol=1e-5)


def test_rounding_to_draws_moves_no_estimate_by_more_than_one():
    record, records, _, _ = mixed(("threshold", "threshold"))
    union_PV = sum(w * dense(part.distributions) for w, part in zip(WEIGHTS, records, strict=True))
    assert (np.abs(dense(record.distributions) - union_PV) < (1 + 1e-3) / 65535).all()


def test_a_mixture_says_so_and_drops_what_does_not_follow():
    selection = msgspec.structs.replace(SELECTIONS["top_k"], temperatures=(2.0,), entropy=True)
    made = mixed_identity([identity(selection, "big"), identity(selection, "small")], ["a", "b"], WEIGHTS, 0)
    assert made.teacher.model == "0.3 big + 0.7 small"
    assert made.teacher.architecture == "mixture"
    assert (made.selection.temperatures, made.selection.entropy) == ((), False)
    again = mixed_identity([identity(selection, "big"), identity(selection, "small")], ["a", "b"], (0.5, 0.5), 0)
    assert again.teacher.engine_options != made.teacher.engine_options


def test_sequences_are_matched_by_key_and_equal_ones_in_their_order():
    keys = np.random.default_rng(0).integers(0, 256, (6, 16), np.uint8)
    keys[0, 15] = 0  # numpy's byte strings end at their last byte that is not 0
    theirs = keys[[3, 1, 0, 1, 5]]
    first = keys[[0, 1, 1, 1, 2, 3]]
    assert match_keys([first, theirs])[:, 1].tolist() == [2, 1, 3, -1, -1, 0]
    numbers_SC, num_missing = shared_sequences([first, theirs], ["a", "b"], skip_missing=True)
    assert numbers_SC.tolist() == [[0, 2], [1, 1], [2, 3], [5, 0]]
    assert num_missing == 3
    with pytest.raises(InputError, match=r"4 sequences are in all of the caches, which hold 'a' 6, 'b' 5; --missing skip"):
        shared_sequences([first, theirs], ["a", "b"], skip_missing=False)
    with pytest.raises(InputError, match="no sequence is in all of 'a', 'b'"):
        shared_sequences([first, keys[[4]]], ["a", "b"], skip_missing=True)


def test_what_cannot_be_mixed_is_refused_in_words():
    top_k, threshold = (identity(SELECTIONS[kind]) for kind in ("top_k", "threshold"))
    with pytest.raises(ConfigError, match=r"'a' keeps exact entries \(top_k\) and 'b' unbiased estimates \(threshold\)"):
        mixed_identity([top_k, threshold], ["a", "b"], WEIGHTS, 0)
    other = msgspec.structs.replace(top_k, tokenizer=msgspec.structs.replace(top_k.tokenizer, fingerprint="e" * 64))
    with pytest.raises(MismatchError, match="do not have the same tokens: tokenizer fingerprint"):
        mixed_identity([top_k, other], ["a", "b"], WEIGHTS, 0)
    wider = msgspec.structs.replace(top_k, teacher=msgspec.structs.replace(top_k.teacher, vocab_size=64))
    with pytest.raises(MismatchError, match="teacher's vocabulary 41 and 64"):
        mixed_identity([top_k, wider], ["a", "b"], WEIGHTS, 0)


@pytest.mark.parametrize(
    ("weights", "num_sources", "sentence"),
    [
        ((1.0,), 1, "1 cache was given, expected two or more"),
        ((0.5, 0.5), 3, "2 weights for 3 caches"),
        ((0.5, 0.6), 2, "expected numbers above 0 whose sum is 1"),
        ((1.5, -0.5), 2, "expected numbers above 0 whose sum is 1"),
        ((math.nan, 0.5), 2, "expected numbers above 0 whose sum is 1"),
    ],
)
def test_weights_are_one_for_each_cache_and_sum_to_one(weights, num_sources, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_weights(weights, num_sources)
