"""The promises of `kdcache.teacher.base`, one function each; every backend's tests call all of PROMISES, and `closing` last.

Shape letters: N tokens, P supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from contracts.selection import check_draws
from numpy.typing import NDArray

from kdcache.errors import ConfigError, InputError, TeacherError
from kdcache.format.manifest import SelectionInfo, TeacherIdentity
from kdcache.format.record import Distributions, TokenSequence, sequence_key
from kdcache.format.record_checks import check_distributions
from kdcache.teacher.base import Teacher
from kdcache.teacher.select.reference import select_reference
from kdcache.teacher.select.uniforms import position_states

K = 8


@dataclass(frozen=True)
class TeacherCase:
    """A teacher, and what it should say.

    Attributes:
        dense: (N, V) float64 logprobs of every position, computed some other way.
        max_error_nats: most that a logprob may differ from it.
        reload_identity: the identity of the same teacher loaded once more; None where that costs too much.
    """

    teacher: Teacher
    dense: Callable[[TokenSequence], NDArray[np.float64]]
    max_error_nats: float
    reload_identity: Callable[[], TeacherIdentity] | None = None

    @property
    def vocab_size(self) -> int:
        return self.teacher.identity.vocab_size


def make_sequence(
    ids: Sequence[int] | NDArray[np.integer], supervised: Sequence[bool] | NDArray[np.bool_] | None = None
) -> TokenSequence:
    """A sequence of plain text; every position supervised unless told otherwise."""
    ids_N = np.asarray(ids, np.int32)
    supervised_N = np.ones(len(ids_N), np.bool_) if supervised is None else np.asarray(supervised, np.bool_)
    return TokenSequence(
        input_ids_N=ids_N,
        supervised_N=supervised_N,
        roles_N=np.zeros(len(ids_N), np.uint8),
        turn_starts=np.zeros(1, np.int32),
        source=f"test#{len(ids_N)}",
        key=sequence_key(ids_N, supervised_N, ""),
    )


def random_sequences(case: TeacherCase, lengths: Sequence[int], seed: int = 0) -> list[TokenSequence]:
    """Sequences of uniformly drawn ids."""
    rng = np.random.default_rng((seed, 1))
    return [make_sequence(rng.integers(0, case.vocab_size, length)) for length in lengths]


def top_k(k: int) -> SelectionInfo:
    return SelectionInfo(kind="top_k", params={"k": k})


def score(case: TeacherCase, sequences: Sequence[TokenSequence], k: int = K) -> list[Distributions]:
    return list(case.teacher.score(sequences, top_k(k)))


def largest_error(distributions: Distributions, dense_PV: NDArray[np.float64]) -> float:
    """Of all entries, against the dense logprobs of the same positions."""
    rows_E = np.repeat(np.arange(distributions.num_positions), distributions.num_entries_P)
    return float(np.abs(distributions.logprobs_E - dense_PV[rows_E, distributions.token_ids_E]).max())


def position_t_has_read_tokens_up_to_t(case: TeacherCase) -> None:
    (sequence,) = random_sequences(case, [24])
    (answer,) = score(case, [sequence])
    dense_NV = case.dense(sequence)
    assert largest_error(answer, dense_NV) <= case.max_error_nats
    # The same numbers under a shift by one in either direction are far off, so the line above is a test of alignment.
    for shift in (-1, 1):
        assert largest_error(answer, np.roll(dense_NV, shift, axis=0)) > 100 * case.max_error_nats


def answers_come_in_the_order_given(case: TeacherCase) -> None:
    sequences = random_sequences(case, [3, 40, 1, 17, 64, 2, 40])
    answers = score(case, sequences)
    assert len(answers) == len(sequences)
    for sequence, answer in zip(sequences, answers, strict=True):
        assert answer.num_positions == sequence.num_tokens
        assert largest_error(answer, case.dense(sequence)) <= case.max_error_nats


def every_answer_is_a_well_formed_record(case: TeacherCase) -> None:
    for answer in score(case, random_sequences(case, [1, 2, 30])):
        check_distributions(answer, vocab_size=case.vocab_size)
        assert (answer.num_entries_P == K).all()


def the_support_is_the_k_most_probable(case: TeacherCase) -> None:
    (sequence,) = random_sequences(case, [30])
    (answer,) = score(case, [sequence])
    dense_NV = case.dense(sequence)
    kth_N = np.sort(dense_NV, axis=-1)[:, -K]
    rows_E = np.repeat(np.arange(answer.num_positions), answer.num_entries_P)
    # A token that ties for the last place, up to the engine's numerics, may stand for another.
    assert (dense_NV[rows_E, answer.token_ids_E] >= kth_N[rows_E] - 2 * case.max_error_nats).all()


def logprobs_are_normalised_over_the_whole_vocabulary(case: TeacherCase) -> None:
    (sequence,) = random_sequences(case, [12])
    (whole,), (some,) = score(case, [sequence], case.vocab_size), score(case, [sequence])
    mass_P = np.add.reduceat(np.exp(whole.logprobs_E.astype(np.float64)), whole.offsets_P1[:-1])
    np.testing.assert_allclose(mass_P, 1.0, atol=1e-4)
    np.testing.assert_allclose(whole.tail_mass_P, 0.0, atol=1e-4)
    assert len(whole.outside_target_logprobs) == 0
    # Keeping less changes no number: nothing is renormalised over the support.
    _, whole_PK = whole.padded()
    _, some_PK = some.padded()
    np.testing.assert_allclose(some_PK, whole_PK[:, :K], atol=2 * case.max_error_nats)


def tail_mass_is_what_the_support_leaves(case: TeacherCase) -> None:
    (sequence,) = random_sequences(case, [30])
    (answer,) = score(case, [sequence])
    probabilities_NV = np.exp(case.dense(sequence))
    ids_PK, _ = answer.padded()
    tail_N = 1.0 - np.take_along_axis(probabilities_NV, ids_PK.astype(np.int64), axis=-1).sum(axis=-1)
    np.testing.assert_allclose(answer.tail_mass_P, tail_N, atol=case.max_error_nats + 1e-6)


def target_logprobs_are_kept_inside_and_outside_the_support(case: TeacherCase) -> None:
    (sequence,) = random_sequences(case, [40])
    (answer,) = score(case, [sequence])
    targets_P = sequence.target_ids_P
    logprobs_P = answer.target_logprobs(targets_P)
    expected_P = case.dense(sequence)[np.arange(39), sequence.input_ids_N[1:]]
    np.testing.assert_allclose(logprobs_P[:-1], expected_P, atol=case.max_error_nats)
    assert np.isnan(logprobs_P[-1])
    assert len(answer.outside_target_logprobs) > 0
    # And a target inside: the most probable token follows, at a place where it is known.
    best = int(case.dense(sequence)[9].argmax())
    followed = make_sequence([*sequence.input_ids_N[:10].tolist(), best])
    (answer,) = score(case, [followed])
    assert len(answer.outside_target_logprobs) < 10
    assert answer.target_logprobs(followed.target_ids_P)[9] == pytest.approx(
        case.dense(followed)[9, best], abs=case.max_error_nats
    )


def the_last_position_has_a_record(case: TeacherCase) -> None:
    for sequence in random_sequences(case, [1, 20]):
        num_tokens = sequence.num_tokens
        only_last = make_sequence(sequence.input_ids_N, np.arange(num_tokens) == num_tokens - 1)
        (answer,) = score(case, [only_last])
        assert answer.num_positions == 1
        assert largest_error(answer, case.dense(sequence)[-1:]) <= case.max_error_nats


def a_mask_with_holes_selects_among_the_same_rows(case: TeacherCase) -> None:
    (sequence,) = random_sequences(case, [33])
    mask_N = np.random.default_rng(5).random(33) < 0.4
    mask_N[-1] = False
    holed = make_sequence(sequence.input_ids_N, mask_N)
    (answer,) = score(case, [holed])
    assert answer.num_positions == mask_N.sum()
    assert largest_error(answer, case.dense(sequence)[mask_N]) <= case.max_error_nats
    expected_P = case.dense(sequence)[mask_N, holed.target_ids_P]
    np.testing.assert_allclose(answer.target_logprobs(holed.target_ids_P), expected_P, atol=case.max_error_nats)


def a_sequence_without_supervised_positions_gives_an_empty_record(case: TeacherCase) -> None:
    first, last = random_sequences(case, [10, 7])
    silent = make_sequence([1, 2, 3], [False] * 3)
    answers = score(case, [first, silent, last])
    assert [answer.num_positions for answer in answers] == [10, 0, 7]
    check_distributions(answers[1], vocab_size=case.vocab_size)
    assert score(case, []) == []


def a_sequence_is_scored_the_same_alone_or_beside_others(case: TeacherCase) -> None:
    sequences = random_sequences(case, [25, 60, 5, 44, 1, 12, 61])
    together = score(case, sequences, 4)
    for sequence, beside in zip(sequences, together, strict=True):
        (alone,) = score(case, [sequence], 4)
        np.testing.assert_allclose(alone.logprobs_E, beside.logprobs_E, atol=2 * case.max_error_nats)
        assert largest_error(beside, case.dense(sequence)) <= case.max_error_nats


def an_iterator_dropped_half_way_leaves_the_teacher_usable(case: TeacherCase) -> None:
    sequences = random_sequences(case, [30, 31, 32, 33])
    answers = case.teacher.score(sequences, top_k(K))
    next(answers)
    del answers
    answers_come_in_the_order_given(case)


def the_identity_is_stable_and_complete(case: TeacherCase) -> None:
    identity = case.teacher.identity
    assert identity == case.teacher.identity
    assert msgspec.json.decode(msgspec.json.encode(identity), type=TeacherIdentity) == identity
    assert identity.vocab_size == case.dense(make_sequence([1])).shape[-1]
    assert identity.engine_version
    assert "/" not in identity.model
    if case.reload_identity is not None:
        assert case.reload_identity() == identity


def a_k_above_the_vocabulary_is_refused(case: TeacherCase) -> None:
    (sequence,) = random_sequences(case, [4])
    for k in (case.vocab_size + 1, 0):
        with pytest.raises(ConfigError, match=rf"selection\.k is {k}, .* {case.vocab_size}"):
            case.teacher.score([sequence], top_k(k))
    for kind, params in (("threshold", {"tau": 2.0, "seed": 0}), ("sampled", {"num_draws": 0, "seed": 0}), ("top_q", {"k": 1})):
        with pytest.raises(ConfigError, match=rf"selection: .*'{kind}'"):
            case.teacher.score([sequence], SelectionInfo(kind=kind, params=params))


SELECTIONS = {
    "top_p_k": {"p": 0.5, "k": 40},
    "sampled": {"num_draws": 30, "seed": 5},
    "threshold": {"tau": 0.02, "seed": 5},
    "top_k_sampled": {"k": 4, "num_draws": 20, "seed": 5},
}


def every_selection_that_it_makes_is_the_definition_of_its_distribution(case: TeacherCase) -> None:
    sequence, silent = random_sequences(case, [30])[0], make_sequence([1, 2], [False, False])
    for kind, params in SELECTIONS.items():
        selection = SelectionInfo(kind=kind, params=params, temperatures=(2.0, 0.5), entropy=True)
        try:
            answers = list(case.teacher.score([silent, sequence], selection))
        except ConfigError as error:
            # A backend whose engine gives no more; its own tests say that it is one.
            if "gives only the k most probable tokens" not in str(error):
                raise
            continue
        assert answers[0].num_positions == 0
        check_distributions(answers[0], vocab_size=case.vocab_size)
        check_distributions(answers[1], vocab_size=case.vocab_size)
        _check_definition(case, sequence, selection, answers[1])


def _check_definition(case: TeacherCase, sequence: TokenSequence, selection: SelectionInfo, answer: Distributions) -> None:
    error, dense_PV = case.max_error_nats, case.dense(sequence)
    states_P = position_states(selection.params.get("seed", 0), sequence.key, sequence.positions_P)
    expected = select_reference(dense_PV, sequence.target_ids_P, selection, states_P)
    assert answer.log_z_PL is not None
    assert answer.entropy_P is not None
    np.testing.assert_allclose(answer.log_z_PL, expected.log_z_PL, atol=10 * error)
    np.testing.assert_allclose(answer.entropy_P, expected.entropy_P, atol=10 * error)
    np.testing.assert_allclose(answer.tail_mass_P, expected.tail_mass_P, atol=error + 1e-6)
    np.testing.assert_allclose(
        answer.target_logprobs(sequence.target_ids_P), expected.target_logprobs(sequence.target_ids_P), atol=error
    )
    if expected.num_exact_P is None:
        np.testing.assert_array_equal(answer.num_entries_P, expected.num_entries_P)
    else:
        np.testing.assert_array_equal(answer.num_exact_P, expected.num_exact_P)
        check_draws(answer, dense_PV, selection, states_P, edge=2 * error)


def draws_are_those_of_the_sequence_whatever_is_beside_it(case: TeacherCase) -> None:
    selection = SelectionInfo(kind="threshold", params=SELECTIONS["threshold"])
    sequences = random_sequences(case, [25, 60, 1, 44], seed=3)
    try:
        together = list(case.teacher.score(sequences, selection))
    except ConfigError:
        return
    for sequence, beside in zip(sequences, together, strict=True):
        (alone,) = case.teacher.score([sequence], selection)
        same = len(np.intersect1d(keyed(alone), keyed(beside)))
        assert same >= 0.97 * alone.num_entries  # the rest: points on an edge, up to the engine's numerics


def keyed(answer: Distributions) -> NDArray[np.int64]:
    """One number for each (position, token)."""
    rows_E = np.repeat(np.arange(answer.num_positions), answer.num_entries_P)
    return rows_E * 2**32 + answer.token_ids_E


def a_sequence_longer_than_the_context_is_refused_at_once(case: TeacherCase) -> None:
    limit = case.teacher.identity.context_length
    fits, too_long = random_sequences(case, [limit, limit + 1])
    with pytest.raises(InputError, match=rf"test#{limit + 1}: {limit + 1} tokens, .* at most {limit}"):
        case.teacher.score([fits, too_long], top_k(1))
    (answer,) = score(case, [fits], 1)
    assert answer.num_positions == limit


def an_id_outside_the_vocabulary_is_refused_at_once(case: TeacherCase) -> None:
    for bad in (case.vocab_size, -1):
        with pytest.raises(InputError, match=rf"test#3: token id {bad} is outside the vocabulary of {case.vocab_size}"):
            case.teacher.score([make_sequence([1, bad, 2])], top_k(1))
    with pytest.raises(InputError, match="without tokens"):
        case.teacher.score([make_sequence([])], top_k(1))


def closing(case: TeacherCase) -> None:
    """Closing twice is fine, and a closed teacher says so. Not among PROMISES: it ends the teacher."""
    case.teacher.close()
    case.teacher.close()
    with pytest.raises(TeacherError, match="is closed"):
        case.teacher.score(random_sequences(case, [3]), top_k(1))


PROMISES = (
    position_t_has_read_tokens_up_to_t,
    answers_come_in_the_order_given,
    every_answer_is_a_well_formed_record,
    the_support_is_the_k_most_probable,
    logprobs_are_normalised_over_the_whole_vocabulary,
    tail_mass_is_what_the_support_leaves,
    target_logprobs_are_kept_inside_and_outside_the_support,
    the_last_position_has_a_record,
    a_mask_with_holes_selects_among_the_same_rows,
    a_sequence_without_supervised_positions_gives_an_empty_record,
    a_sequence_is_scored_the_same_alone_or_beside_others,
    an_iterator_dropped_half_way_leaves_the_teacher_usable,
    the_identity_is_stable_and_complete,
    every_selection_that_it_makes_is_the_definition_of_its_distribution,
    draws_are_those_of_the_sequence_whatever_is_beside_it,
    a_k_above_the_vocabulary_is_refused,
    a_sequence_longer_than_the_context_is_refused_at_once,
    an_id_outside_the_vocabulary_is_refused_at_once,
)
