"""The vLLM teacher with the real engine, in float32: the same promises as the others, to float32 accuracy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agreement import measure_agreement
from contracts.teacher import PROMISES, TeacherCase, closing, random_sequences, score
from dense_forward import dense_forward

from kdcache.config.capture import TeacherConfig
from kdcache.errors import TeacherError
from kdcache.teacher import load_teacher

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

MULTIPROCESSING_BEFORE = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")


@pytest.fixture(scope="module")
def case(tiny_model_dir: Path) -> Iterator[TeacherCase]:
    # 128 tokens per step, so that sequences are split over steps.
    teacher = load_teacher(TeacherConfig(model=str(tiny_model_dir), backend="vllm", tokens_per_forward=128))
    yield TeacherCase(teacher, dense_forward(tiny_model_dir), 5e-5)
    teacher.close()


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_the_vllm_teacher_keeps_every_promise(promise: Callable[[TeacherCase], None], case: TeacherCase):
    promise(case)


def test_float32_vllm_gives_the_float64_forward(case: TeacherCase):
    agreement = measure_agreement(case, random_sequences(case, [255, 100, 31, 1, 2, 64]), 32)
    print(f"vLLM float32 against a float64 forward: {agreement}")
    assert agreement.max_error_nats < 5e-5
    assert agreement.mean_error_nats < 5e-6
    assert agreement.top_k_share > 0.999


def test_its_identity_says_which_engine(case: TeacherCase):
    identity = case.teacher.identity
    assert (identity.engine, identity.model, identity.architecture) == ("vllm", "tiny-llama", "LlamaForCausalLM")
    # dtype auto is the checkpoint's; vLLM's own auto would have made bfloat16 of it.
    assert (identity.dtype, identity.vocab_size, identity.context_length) == ("float32", 520, 255)
    assert identity.weights_digest is not None
    assert "kv_cache_memory_bytes" not in identity.engine_options


def test_starting_an_engine_leaves_no_marks_on_the_process(case: TeacherCase):
    import torch

    assert "LD_PRELOAD" not in os.environ or "tcmalloc" not in os.environ["LD_PRELOAD"]
    assert os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == MULTIPROCESSING_BEFORE
    torch.set_num_threads(torch.get_num_threads())
    assert torch.set_num_threads.__name__ == "set_num_threads"
    weight = torch.ones(2, requires_grad=True)
    weight.sum().backward()
    assert weight.grad is not None


def test_answers_are_the_same_whatever_is_in_flight(case: TeacherCase):
    # More than one group of four steps.
    sequences = random_sequences(case, [97] * 20, seed=3)
    for sequence, answer in zip(sequences, score(case, sequences, 3), strict=True):
        (alone,) = score(case, [sequence], 3)
        assert abs(answer.logprobs_E - alone.logprobs_E).max() < 1e-4


def test_closing_twice_is_fine_and_another_engine_can_start(case: TeacherCase, tiny_model_dir: Path):
    closing(case)
    with pytest.raises(TeacherError, match="does not load with vLLM: Unknown quantization method"):
        load_teacher(TeacherConfig(model=str(tiny_model_dir), backend="vllm", quantization="none-such"))
    # A fresh one, in bfloat16: its error is the format's, not ours.
    teacher = load_teacher(TeacherConfig(model=str(tiny_model_dir), backend="vllm", dtype="bfloat16"))
    half = TeacherCase(teacher, case.dense, 0.5)
    assert teacher.identity.dtype == "bfloat16"
    agreement = measure_agreement(half, random_sequences(half, [255, 100, 31, 1, 2, 64]), 32)
    print(f"vLLM bfloat16 against a float64 forward: {agreement}")
    assert agreement.max_error_nats < 0.5
    assert agreement.mean_error_nats < 0.05
    assert agreement.top_k_share > 0.95
    closing(half)
