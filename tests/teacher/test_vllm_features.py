"""Hidden states from vLLM's worker are those of float32 transformers: each layer, pooled or not, over steps and chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contracts.teacher import TeacherCase, top_k
from dense_forward import dense_forward
from test_hf_features import LAYERS, POOLED, check_features, expected_states, masked_sequences

from kdcache.config.capture import FeatureConfig
from kdcache.config.teacher import TeacherConfig, VllmConfig
from kdcache.errors import ConfigError
from kdcache.teacher import load_teacher
from kdcache.teacher.features import resolve_features

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def teacher(tiny_model_dir: Path) -> Iterator[Any]:
    # 64 tokens per step and chunks of 24 positions: most sequences are split over steps, most steps over chunks.
    teacher = load_teacher(
        TeacherConfig(
            model=str(tiny_model_dir),
            backend="vllm",
            vllm=VllmConfig(route="worker"),
            dtype="float32",
            tokens_per_forward=64,
            chunk_positions=24,
        )
    )
    yield teacher
    teacher.close()


def test_features_are_those_of_transformers_for_each_layer_pooled_or_not(teacher: Any, tiny_model_dir: Path):
    case = TeacherCase(teacher, dense_forward(tiny_model_dir), 5e-5)
    sequences, features = masked_sequences(case, 250), resolve_features([*LAYERS, *POOLED], teacher.hidden_shape)
    answers = list(teacher.score(sequences, top_k(4), features))
    for sequence, answer in zip(sequences, answers, strict=True):
        check_features(dict(answer.features), expected_states(tiny_model_dir, sequence), sequence, 1e-4)
    # Nothing is asked: nothing is given, and the numbers are the same.
    for answer, plain in zip(answers, teacher.score(sequences, top_k(4)), strict=True):
        assert not plain.features
        np.testing.assert_allclose(answer.logprobs_E, plain.logprobs_E, atol=2e-5)
    (nothing,) = teacher.score(sequences[-1:], top_k(4), features)
    assert nothing.features["hidden_0"].shape == (0, 64)


def test_layers_that_cannot_be_seen_rightly_are_refused_in_words_and_the_last_one_is_not(
    teacher: Any, monkeypatch: pytest.MonkeyPatch
):
    from kdcache.teacher.vllm import layers as internals

    (inner, last) = resolve_features([FeatureConfig(layer=1), FeatureConfig(layer=-1)], teacher.hidden_shape)
    worker = teacher._llm.llm_engine.model_executor.driver_worker.worker
    monkeypatch.setattr(teacher, "_shown", frozenset())
    monkeypatch.setattr(worker.kdcache_capture, "seen", None)
    with monkeypatch.context() as patch:
        patch.setattr(worker.model_config, "enforce_eager", False)
        patch.setattr(teacher, "_hand_out", lambda _layers: None)  # which would start a compiled model
        with pytest.raises(ConfigError, match=r"'hidden_1': a compiled model.*set teacher.engine_options.enforce_eager"):
            teacher.score([], top_k(4), [inner])
        patch.setattr(worker, "kdcache_layers", "LlamaForCausalLM hands out no inner states", raising=False)
        with pytest.raises(ConfigError, match=r"'hidden_1': LlamaForCausalLM hands out no inner states; set teacher\."):
            teacher.score([], top_k(4), [inner])
        teacher.score([], top_k(4), [last])
    with monkeypatch.context() as patch:
        patch.setattr(internals, "find_decoder", lambda *_: None)
        with pytest.raises(ConfigError, match="the layers of LlamaForCausalLM are not where kdcache looks"):
            teacher.score([], top_k(4), [inner])
    with monkeypatch.context() as patch:
        # The other way round: then the last layer to run is not the one whose state the norm takes.
        find = internals.find_decoder
        patch.setattr(
            internals, "find_decoder", lambda *given: (lambda parent, layers: (parent, list(layers)[::-1]))(*find(*given))
        )
        with pytest.raises(ConfigError, match="what its last layer gives is not what the final norm takes"):
            teacher.score([], top_k(4), [inner])
    monkeypatch.setattr(worker.kdcache_capture, "seen", None)
    teacher.score([], top_k(4), [inner])
    assert teacher._shown == {("hidden", 1)}


@pytest.mark.slow
def test_a_model_whose_layers_give_one_tensor_and_have_other_names(tmp_path: Path):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=64, n_layer=2, n_head=2, n_positions=64)).save_pretrained(tmp_path)
    teacher: Any = load_teacher(
        TeacherConfig(
            model=str(tmp_path), backend="vllm", vllm=VllmConfig(route="worker"), dtype="float32", tokens_per_forward=32
        )
    )
    case = TeacherCase(teacher, dense_forward(tmp_path), 5e-5)
    sequences, features = masked_sequences(case, 50), resolve_features([*LAYERS, *POOLED], teacher.hidden_shape)
    answers = list(teacher.score(sequences, top_k(4), features))
    teacher.close()
    for sequence, answer in zip(sequences, answers, strict=True):
        check_features(dict(answer.features), expected_states(tmp_path, sequence), sequence, 1e-4)
