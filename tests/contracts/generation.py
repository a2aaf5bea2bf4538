"""The promises of `kdcache.teacher.generation`, one function each; every backend that writes calls all of PROMISES.

Shape letters: N tokens, A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from contracts.teacher import make_sequence
from numpy.typing import NDArray

from kdcache.config.capture import GenerateConfig
from kdcache.errors import ConfigError, InputError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import TokenSequence
from kdcache.teacher.generation import GeneratingTeacher, Prompt, answer_seed, filtered_probabilities
from kdcache.teacher.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationCase:
    """A teacher, and what it should say.

    Attributes:
        dense: (N, V) float64 logprobs of every position, computed some other way.
        tie_nats: logprobs that are nearer than this may change places by the engine's numerics.
        vocab_size: ids of prompts are below it.
    """

    teacher: GeneratingTeacher
    tokenizer: Tokenizer
    dense: Callable[[TokenSequence], NDArray[np.float64]]
    tie_nats: float
    vocab_size: int = 256


def make_prompts(case: GenerationCase, lengths: Sequence[int], *, seed: int = 0, answers: int = 1) -> list[Prompt]:
    """Prompts of uniformly drawn ids, so many answers to each."""
    rng = np.random.default_rng((seed, 7))
    sequences = [make_sequence(ids := rng.integers(0, case.vocab_size, n), np.zeros(len(ids), bool)) for n in lengths]
    return [Prompt(sequence, answer_seed(0, sequence.key, i)) for sequence in sequences for i in range(answers)]


def write(case: GenerationCase, prompts: Sequence[Prompt], **config: Any):
    return list(case.teacher.generate(prompts, GenerateConfig(**{"max_tokens": 12} | config), case.tokenizer))


def whole(prompt: Prompt, token_ids: Sequence[int] | NDArray[np.integer]) -> TokenSequence:
    return make_sequence([*prompt.sequence.input_ids_N.tolist(), *map(int, token_ids)])


def dense_of_answer(case: GenerationCase, prompt: Prompt, token_ids_N: NDArray[np.int32]) -> NDArray[np.float64]:
    """(A, V) the distributions that the answer's tokens were drawn from, before temperature and filters."""
    return case.dense(whole(prompt, token_ids_N))[prompt.sequence.num_tokens - 1 : -1]


def answers_come_in_the_order_of_the_prompts(case: GenerationCase) -> None:
    prompts = make_prompts(case, [3, 30, 1, 17, 2])
    answers = write(case, prompts, temperature=0.0)
    assert len(answers) == len(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids_N.dtype == np.int32
        dense_AV = dense_of_answer(case, prompt, answer.token_ids_N)
        chosen_A = dense_AV[np.arange(len(dense_AV)), answer.token_ids_N]
        # Greedy: no token is more probable than the one that was taken.
        assert (chosen_A >= dense_AV.max(axis=-1) - case.tie_nats).all()


def an_answer_is_as_long_as_it_may_be_or_ends_with_an_end_token(case: GenerationCase) -> None:
    prompts = make_prompts(case, [5, 9], answers=12)
    for answer in write(case, prompts, max_tokens=40, stop_token_ids=tuple(range(0, case.vocab_size, 16))):
        ends_A = (answer.token_ids_N % 16 == 0) & (answer.token_ids_N < case.vocab_size)
        ends_A |= np.isin(answer.token_ids_N, case.tokenizer.end_ids)
        assert 1 <= len(answer.token_ids_N) <= 40
        assert not ends_A[:-1].any()
        assert answer.finish == ("stop" if ends_A[-1] else "length")
        assert ends_A[-1] or len(answer.token_ids_N) == 40
    answers = write(case, prompts, max_tokens=40, ignore_eos=True)
    assert [(len(answer.token_ids_N), answer.finish) for answer in answers] == [(40, "length")] * len(prompts)


def a_stop_string_ends_an_answer_at_the_token_that_completes_it(case: GenerationCase) -> None:
    prompts = make_prompts(case, [6], answers=6)
    free = write(case, prompts, max_tokens=30, ignore_eos=True)
    for prompt, answer in zip(prompts, free, strict=True):
        text = case.tokenizer.decode([i for i in answer.token_ids_N.tolist() if i < case.tokenizer.identity.vocab_size])
        stop = next(
            text[i : i + 3] for i in range(8, len(text)) if "\ufffd" not in text[i : i + 3] and len(text[i : i + 3]) == 3
        )
        (stopped,) = write(case, [prompt], max_tokens=30, ignore_eos=True, stop=(stop, "never to be seen"))
        length = len(stopped.token_ids_N)
        assert stopped.finish == "stop"
        assert stopped.token_ids_N.tolist() == answer.token_ids_N[:length].tolist()

        def texts(num_tokens: int, ids: NDArray[np.int32] = answer.token_ids_N) -> str:
            known = [i for i in ids[:num_tokens].tolist() if i < case.tokenizer.identity.vocab_size]
            return case.tokenizer.decode(known)

        assert stop in texts(length)
        assert stop not in texts(length - 1)


def the_same_seed_gives_the_same_answer_and_another_another(case: GenerationCase) -> None:
    prompts = make_prompts(case, [4, 11], answers=5)
    first = [answer.token_ids_N.tolist() for answer in write(case, prompts)]
    assert [answer.token_ids_N.tolist() for answer in write(case, prompts)] == first
    assert [answer.token_ids_N.tolist() for answer in write(case, prompts[::-1])] == first[::-1]
    (alone,) = write(case, prompts[7:8])
    assert alone.token_ids_N.tolist() == first[7]
    for start in (0, 5):
        assert len({tuple(ids) for ids in first[start : start + 5]}) == 5


def tokens_are_drawn_among_those_that_the_filters_leave(case: GenerationCase) -> None:
    prompts = make_prompts(case, [8], answers=12)
    for filters in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}, {"temperature": 2.0, "top_k": 20, "top_p": 0.6}):
        config = GenerateConfig(**filters)
        drawn, allowed = set(), set()
        for prompt, answer in zip(prompts, write(case, prompts, max_tokens=6, ignore_eos=True, **filters), strict=True):
            dense_AV = dense_of_answer(case, prompt, answer.token_ids_N)
            for token_id, dense_V in zip(answer.token_ids_N, dense_AV, strict=True):
                kept_V = filtered_probabilities(dense_V, config) > 0
                # A token at the filter's border may lie on its other side in the engine's numerics.
                assert kept_V[token_id] or dense_V[token_id] >= dense_V[kept_V].min() - case.tie_nats
            drawn.add(int(answer.token_ids_N[0]))
            allowed = set(np.flatnonzero(filtered_probabilities(dense_AV[0], config)).tolist())
        assert len(drawn) > 1 or len(allowed) == 1


def tokens_are_drawn_as_often_as_they_are_probable(case: GenerationCase) -> None:
    num_draws = 400
    prompts = make_prompts(case, [6], answers=num_draws)
    for temperature in (1.0, 0.5):
        answers = write(case, prompts, max_tokens=1, temperature=temperature)
        dense_V = dense_of_answer(case, prompts[0], answers[0].token_ids_N)[0]
        expected_V = filtered_probabilities(dense_V, GenerateConfig(temperature=temperature))
        found_V = np.bincount([answer.token_ids_N[0] for answer in answers], minlength=len(dense_V)) / num_draws
        likely_V = expected_V > 0.02
        error_V = np.abs(found_V - expected_V)[likely_V]
        # Five standard deviations of a binomial share; the draws are seeded, so this holds always or never.
        assert (error_V < 5 * np.sqrt(expected_V[likely_V] / num_draws)).all()


def the_distribution_at_each_token_is_the_one_that_it_was_drawn_from(case: GenerationCase) -> None:
    (prompt,) = make_prompts(case, [10])
    (answer,) = write(case, [prompt], temperature=0.0, ignore_eos=True)
    forced = whole(prompt, answer.token_ids_N)
    supervised_N = np.zeros(forced.num_tokens, bool)
    supervised_N[prompt.sequence.num_tokens - 1 : -1] = True
    selection = SelectionInfo(kind="top_k", params={"k": 4})
    (scored,) = case.teacher.score([make_sequence(forced.input_ids_N, supervised_N)], selection)
    top_A = scored.token_ids_E.reshape(-1, 4)[:, 0]
    margins_A = -np.diff(scored.logprobs_E.reshape(-1, 4)[:, :2], axis=-1)[:, 0]
    assert ((top_A == answer.token_ids_N) | (margins_A < case.tie_nats)).all()
    assert (top_A == answer.token_ids_N).mean() > 0.9


def tokens_are_observed_as_they_come(case: GenerationCase) -> None:
    seen: list[int] = []
    prompts = make_prompts(case, [4, 5, 6])
    answers = list(case.teacher.generate(prompts, GenerateConfig(max_tokens=8), case.tokenizer, seen.append))
    assert sum(seen) == sum(len(answer.token_ids_N) for answer in answers)
    assert len(seen) > 1


def what_cannot_be_answered_is_refused_at_once(case: GenerationCase) -> None:
    limit = case.teacher.identity.context_length
    (long,) = make_prompts(case, [limit - 11])
    with pytest.raises(InputError, match=rf"{limit - 11} tokens of prompt and 12 of answer are more than the {limit}"):
        case.teacher.generate([long], GenerateConfig(max_tokens=12), case.tokenizer)
    vocab_size = case.teacher.identity.vocab_size
    bad = Prompt(make_sequence([1, vocab_size], [False, False]), 0)
    with pytest.raises(InputError, match=f"token id {vocab_size} is outside the vocabulary"):
        case.teacher.generate([bad], GenerateConfig(max_tokens=2), case.tokenizer)
    with pytest.raises(ConfigError, match=rf"stop_token_ids: {vocab_size} is outside"):
        case.teacher.generate([], GenerateConfig(stop_token_ids=(vocab_size,)), case.tokenizer)
    assert list(case.teacher.generate([], GenerateConfig(), case.tokenizer)) == []
    (fits,) = make_prompts(case, [limit - 12])
    (answer,) = write(case, [fits], ignore_eos=True)
    assert len(answer.token_ids_N) == 12


PROMISES = (
    answers_come_in_the_order_of_the_prompts,
    an_answer_is_as_long_as_it_may_be_or_ends_with_an_end_token,
    a_stop_string_ends_an_answer_at_the_token_that_completes_it,
    the_same_seed_gives_the_same_answer_and_another_another,
    tokens_are_drawn_among_those_that_the_filters_leave,
    tokens_are_drawn_as_often_as_they_are_probable,
    the_distribution_at_each_token_is_the_one_that_it_was_drawn_from,
    tokens_are_observed_as_they_come,
    what_cannot_be_answered_is_refused_at_once,
)
