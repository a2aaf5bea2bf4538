"""Answers by vLLM with the real engine, in float32: the same promises, and its own word on what it drew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from contracts.generation import PROMISES, GenerationCase, make_prompts, whole, write
from contracts.teacher import make_sequence, top_k
from dense_forward import dense_forward

from kdcache.config.capture import GenerateConfig, TeacherConfig
from kdcache.errors import ConfigError, TeacherError
from kdcache.teacher import load_teacher, load_tokenizer
from kdcache.teacher.generation import Ending, end_tokens

pytest.importorskip("vllm")

from kdcache.teacher.vllm.generate import groups_read_whole, sampling_params

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def case(tiny_model_dir: Path) -> Iterator[GenerationCase]:
    teacher = load_teacher(TeacherConfig(model=str(tiny_model_dir), backend="vllm", tokens_per_forward=250))
    yield GenerationCase(teacher, load_tokenizer(str(tiny_model_dir)), dense_forward(tiny_model_dir), 5e-5)
    teacher.close()


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_the_vllm_teacher_keeps_every_promise(promise: Callable[[GenerationCase], None], case: GenerationCase):
    promise(case)


def test_the_captured_logprob_of_each_token_is_the_one_that_the_engine_drew_it_by(case: GenerationCase):
    prompts = make_prompts(case, [5, 12], answers=3)
    config = GenerateConfig(max_tokens=16, temperature=0.8, top_p=0.95)
    answers = list(case.teacher.generate(prompts, config, case.tokenizer))
    ending = Ending(config, case.tokenizer, end_tokens(config, case.tokenizer.end_ids))
    params = [sampling_params(prompt, ending, sees_text=False) for prompt in prompts]
    for param in params:
        param.logprobs = 0  # of the drawn token, before temperature and filters
    requests = [{"prompt_token_ids": prompt.sequence.input_ids_N.tolist()} for prompt in prompts]
    outputs = case.teacher._engine.generate(requests, params, use_tqdm=False)  # pyright: ignore[reportAttributeAccessIssue]
    for prompt, answer, output in zip(prompts, answers, outputs, strict=True):
        said = output.outputs[0]
        assert answer.token_ids_N.tolist() == list(said.token_ids)
        forced = whole(prompt, answer.token_ids_N)
        supervised_N = np.zeros(forced.num_tokens, bool)
        supervised_N[prompt.sequence.num_tokens - 1 : -1] = True
        forced = make_sequence(forced.input_ids_N, supervised_N)
        (captured,) = case.teacher.score([forced], top_k(4))
        theirs = [row[token_id].logprob for row, token_id in zip(said.logprobs, said.token_ids, strict=True)]
        np.testing.assert_allclose(captured.target_logprobs(forced.target_ids_P), theirs, atol=5e-5)


def test_an_end_token_that_only_the_checkpoint_names_ends_an_answer(case: GenerationCase):
    # "</s>" is the tiny checkpoint's; a tokenizer without an end token leaves it to the engine to know.
    class Endless:
        end_ids = ()
        identity, decode = case.tokenizer.identity, case.tokenizer.decode

    (end,) = case.tokenizer.end_ids
    prompts = make_prompts(case, [7], answers=60)
    answers = write(replace(case, tokenizer=Endless()), prompts, max_tokens=60, temperature=1.6)
    ended = [answer for answer in answers if answer.finish == "stop"]
    assert ended
    assert all(answer.token_ids_N[-1] == end for answer in ended)


def test_stop_strings_cut_the_same_answers_where_the_engine_cannot_look_for_them(case: GenerationCase, caplog):
    prompts = make_prompts(case, [6], answers=8)
    asked = {"max_tokens": 24, "stop": ("e", "a")}
    answers = write(case, prompts, **asked)
    assert {answer.finish for answer in answers} == {"stop"}

    class Plain:  # without the tokenizer of transformers that an engine could take
        end_ids, identity, decode = case.tokenizer.end_ids, case.tokenizer.identity, case.tokenizer.decode
        underlying = None

    later = write(replace(case, tokenizer=Plain()), prompts, **asked)
    assert "answers run to generate.max_tokens and are cut afterwards" in caplog.text
    assert [(a.token_ids_N.tolist(), a.finish) for a in later] == [(a.token_ids_N.tolist(), a.finish) for a in answers]


def test_writing_and_scoring_take_turns(case: GenerationCase):
    prompts = make_prompts(case, [6, 3])
    first = write(case, prompts)
    scored = list(case.teacher.score([whole(prompts[0], first[0].token_ids_N)], top_k(3)))
    assert scored[0].num_positions == 6 + len(first[0].token_ids_N)
    assert [a.token_ids_N.tolist() for a in write(case, prompts)] == [a.token_ids_N.tolist() for a in first]


def test_on_a_cpu_prompts_are_read_whole(case: GenerationCase):
    prompts = make_prompts(case, [100, 149, 1, 3, 90, 90, 90])
    # 250 tokens in a step, 500 of cache: by the prompts, then by the answers, then by the rest.
    groups = groups_read_whole(prompts, 10, 250)
    assert [[prompt.sequence.num_tokens for prompt in group] for group in groups] == [[100], [149, 1, 3, 90], [90, 90]]
    groups = groups_read_whole(prompts, 150, 250)
    assert [len(group) for group in groups] == [1, 2, 2, 2]
    assert [len(group) for group in groups_read_whole(prompts[2:3] * 600, 1, 10**6)] == [256, 256, 88]
    assert list(groups_read_whole([], 10, 250)) == []


def test_a_prompt_that_cannot_be_read_whole_is_refused_with_what_to_do(case: GenerationCase):
    scheduler = case.teacher._engine.llm_engine.vllm_config.scheduler_config  # pyright: ignore[reportAttributeAccessIssue]
    (prompt,) = make_prompts(case, [60])
    scheduler.long_prefill_token_threshold = 50  # the engine's own scheduler has its copy
    try:
        with pytest.raises(ConfigError, match=r"a prompt has 60 tokens, and vLLM .* reads 50 at once"):
            case.teacher.generate([prompt], GenerateConfig(max_tokens=9), case.tokenizer)
        case.teacher.generate([prompt], GenerateConfig(max_tokens=9, temperature=0.0), case.tokenizer)
    finally:
        scheduler.long_prefill_token_threshold = 0


def test_a_closed_teacher_does_not_write(case: GenerationCase):
    case.teacher.close()
    with pytest.raises(TeacherError, match="is closed"):
        case.teacher.generate([], GenerateConfig(), case.tokenizer)
