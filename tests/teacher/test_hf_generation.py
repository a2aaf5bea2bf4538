"""Answers by transformers: the promises of every backend that writes, and what its batches must not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from contracts.generation import PROMISES, GenerationCase, make_prompts, write
from dense_forward import dense_forward

from kdcache.config.capture import GenerateConfig, TeacherConfig
from kdcache.errors import TeacherError
from kdcache.teacher import load_teacher, load_tokenizer
from kdcache.teacher.generation import draw_from

pytest.importorskip("transformers")

import torch

from kdcache.teacher.hf.generate import own_end_ids
from kdcache.teacher.select.torch_answers import draw_tokens


def load(folder: Path, **changes: object):
    # Room for a few prompts and their answers, so that there are several batches.
    settings = {"model": str(folder), "backend": "transformers", "tokens_per_forward": 40}
    return load_teacher(TeacherConfig(**(settings | changes)))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def case(tiny_model_dir: Path) -> Iterator[GenerationCase]:
    teacher = load(tiny_model_dir)
    yield GenerationCase(teacher, load_tokenizer(str(tiny_model_dir)), dense_forward(tiny_model_dir), 5e-5)
    teacher.close()


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_the_transformers_teacher_keeps_every_promise(promise: Callable[[GenerationCase], None], case: GenerationCase):
    promise(case)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "min_p": 0.02, "top_k": 12, "top_p": 0.9},
    ],
    ids=str,
)
def test_rows_are_drawn_as_the_definition_draws_each(config):
    rng = np.random.default_rng(3)
    logits_BV, uniform_B = rng.normal(0, 2, (200, 50)), rng.random(200)
    asked = GenerateConfig(**config)
    drawn_B = draw_tokens(torch.from_numpy(logits_BV), asked, torch.from_numpy(uniform_B))
    expected = [draw_from(logits_V, asked, u) for logits_V, u in zip(logits_BV, uniform_B, strict=True)]
    assert drawn_B.tolist() == expected
    assert len(set(expected)) > 3


def test_what_cannot_come_is_never_drawn_and_ties_at_a_border_stay():
    logits_BV = torch.tensor([[-torch.inf, 0.0, -200.0, -torch.inf]] * 3)
    uniform_B = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_tokens(logits_BV, GenerateConfig(), uniform_B).tolist() == [1, 1, 1]
    tied_BV = torch.tensor([[1.0, 2.0, 1.0, 0.0]] * 2)
    for filters in ({"top_k": 2}, {"top_p": 0.7}):
        drawn_B = draw_tokens(tied_BV, GenerateConfig(**filters), torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
        assert drawn_B.tolist() == [0, 2]


def test_a_nan_is_not_drawn_from():
    with pytest.raises(TeacherError, match="gave NaN while writing"):
        draw_tokens(torch.tensor([[0.0, float("nan")]]), GenerateConfig(), torch.zeros(1, dtype=torch.float64))


def test_the_end_tokens_are_the_checkpoints_generation_settings_first(tiny_model_dir: Path):
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.generation_config = GenerationConfig(eos_token_id=[3, 4])
    assert own_end_ids(model) == [3, 4]
    model.generation_config, model.config.eos_token_id = None, 9
    assert own_end_ids(model) == 9


def test_settings_of_the_checkpoint_do_not_reach_the_draws(case: GenerationCase):
    (prompt,) = make_prompts(case, [6])
    (before,) = write(case, [prompt], temperature=0.0, max_tokens=30)
    model = case.teacher._model  # pyright: ignore[reportAttributeAccessIssue]
    model.generation_config.repetition_penalty = 50.0
    try:
        (after,) = write(case, [prompt], temperature=0.0, max_tokens=30)
    finally:
        model.generation_config.repetition_penalty = None
    assert after.token_ids_N.tolist() == before.token_ids_N.tolist()


def test_a_closed_teacher_does_not_write(tiny_model_dir: Path, case: GenerationCase):
    teacher = load(tiny_model_dir)
    teacher.close()
    with pytest.raises(TeacherError, match="is closed"):
        teacher.generate([], GenerateConfig(), case.tokenizer)
