"""Drawing, ends and seeds, without a model; and the fake teacher's answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from contracts.generation import PROMISES, GenerationCase
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.config.capture import GenerateConfig
from kdcache.config.teacher import FakeConfig, TeacherConfig
from kdcache.errors import TeacherError
from kdcache.teacher import load_tokenizer
from kdcache.teacher.fake import END_ID, FakeTeacher
from kdcache.teacher.generation import Ending, answer_seed, draw_from, end_tokens, filtered_probabilities

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])


def ending(**config) -> Ending:
    asked = GenerateConfig(**config)
    tokenizer = load_tokenizer("fake")
    return Ending(asked, tokenizer, end_tokens(asked, tokenizer.end_ids))


@pytest.fixture
def case() -> GenerationCase:
    teacher = FakeTeacher(TeacherConfig(model="fake", backend="fake", fake=FakeConfig(vocab_size=300, context_length=100)))
    return GenerationCase(teacher, load_tokenizer("fake"), teacher.dense_logprobs, 1e-6)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_the_fake_teacher_keeps_every_promise(promise: Callable[[GenerationCase], None], case: GenerationCase):
    promise(case)


def test_a_closed_teacher_says_so(case: GenerationCase):
    case.teacher.close()
    with pytest.raises(TeacherError, match="is closed"):
        case.teacher.generate([], GenerateConfig(), case.tokenizer)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.7}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"min_p": 0.25}, [1, 2, 3, 4]),
        ({"min_p": 0.26}, [1, 3, 4]),
        # Of the three that top_k leaves, the first two have 0.7 / 0.85 of the mass.
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),
        ({"min_p": 1.0, "top_p": 0.9}, [1]),
        # Flatter: the three most probable have less of the mass.
        ({"temperature": 100.0, "top_p": 0.61}, [1, 2, 3, 4]),
    ],
)
def test_filters_keep_what_their_definitions_say(filters, kept):
    filtered = filtered_probabilities(np.log(PROBABILITIES), GenerateConfig(**filters))
    assert np.flatnonzero(filtered).tolist() == kept
    assert filtered.sum() == pytest.approx(1.0)
    if "temperature" not in filters:
        np.testing.assert_allclose(filtered[kept], PROBABILITIES[kept] / PROBABILITIES[kept].sum())


def test_a_temperature_sharpens_before_the_filters_look():
    filtered = filtered_probabilities(np.log(PROBABILITIES), GenerateConfig(temperature=0.5))
    np.testing.assert_allclose(filtered, PROBABILITIES**2 / (PROBABILITIES**2).sum())
    assert draw_from(np.log(PROBABILITIES), GenerateConfig(temperature=0.0), 0.99) == 1


def test_a_draw_is_the_inverse_of_the_cumulative_distribution():
    draws = [draw_from(np.log(PROBABILITIES), GenerateConfig(), u) for u in (0.0, 0.049, 0.051, 0.449, 0.451, 0.9999999)]
    assert draws == [0, 0, 1, 1, 2, 4]
    only = np.array([-np.inf, 0.0, -np.inf])
    assert {draw_from(only, GenerateConfig(), u) for u in (0.0, 0.5, 1 - 2**-53)} == {1}


def test_seeds_follow_the_seed_the_prompt_and_the_answers_number():
    seeds = {answer_seed(seed, key, n) for seed in (0, 1) for key in (b"a" * 16, b"b" * 16) for n in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert answer_seed(0, b"a" * 16, 0) == 2784434020520657701


def test_an_answer_ends_by_a_token_by_a_text_or_by_its_length():
    byte = ending(max_tokens=6, stop=("lo w",), stop_token_ids=(33,))
    hello = list(b"hello world")
    assert [byte.finish(hello[: n + 1]) for n in range(5)] == [""] * 5
    assert byte.finish(hello[:6]) == "length"
    assert byte.finish([*b"hel", END_ID]) == byte.finish([*b"hel", 33]) == "stop"
    longer = ending(max_tokens=60, stop=("lo w",))
    assert [n for n in range(1, 12) if longer.finish(hello[:n])] == [7]
    assert longer.cut([*hello, 1, 2]).token_ids_N.tolist() == hello[:7]
    assert (longer.cut(hello[:5]).finish, longer.cut(hello).finish) == ("length", "stop")
    assert ending(max_tokens=60, ignore_eos=True).finish([END_ID]) == ""


def test_a_stop_text_that_an_answer_began_with_stops_it_once_and_ids_without_text_are_no_text():
    text = ending(max_tokens=99, stop=("ab",))
    assert text.finish(list(b"ab")) == "stop"
    assert text.finish([97, 299, 98]) == "stop"  # 299 is an id of the model alone
    # A character of several bytes counts when it is whole.
    accent = ending(max_tokens=99, stop=("\u00e9",))
    assert [accent.finish(list("x\u00e9".encode())[:n]) for n in (1, 2, 3)] == ["", "", "stop"]


def test_a_stop_text_is_found_however_far_into_an_answer():
    text = list(b"x" * 50 + b"END")
    assert [ending(max_tokens=99, stop=("END",)).finish(text[:n]) for n in (52, 53)] == ["", "stop"]


@settings(deadline=None, max_examples=200)
@given(
    token_ids=st.lists(st.sampled_from([*b"aab\xc3\xa9", END_ID, 299]), min_size=1, max_size=24),
    stop=st.lists(st.sampled_from(["a", "ab", "aba", "\u00e9", "bb\u00e9", "a<end>"]), max_size=2),
)
def test_cutting_a_whole_answer_finds_the_end_that_looking_at_each_token_finds(token_ids, stop):
    rule = ending(max_tokens=20, stop=tuple(stop), stop_token_ids=(299,))
    cut = rule.cut(token_ids)
    first = next((length for length in range(1, len(token_ids) + 1) if rule.finish(token_ids[:length])), len(token_ids))
    assert cut.token_ids_N.tolist() == token_ids[:first]
    assert cut.finish == (rule.finish(token_ids[:first]) or "length")
