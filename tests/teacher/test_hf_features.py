"""Hidden states by transformers: those of `output_hidden_states`, at supervised positions, whatever the batches."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contracts.teacher import TeacherCase, make_sequence, random_sequences, top_k
from dense_forward import dense_forward

from kdcache.config.capture import FeatureConfig, TeacherConfig
from kdcache.errors import ConfigError
from kdcache.format.record import TokenSequence
from kdcache.teacher import load_teacher
from kdcache.teacher.features import resolve_features

pytest.importorskip("transformers")

LAYERS = [FeatureConfig(layer=layer) for layer in (0, 1, 2, -1)]
"""Of a model of two layers: 2 is before the final norm, -1 after it."""
POOLED = [FeatureConfig(layer=1, pooling="mean"), FeatureConfig(layer=-1, pooling="last", dtype="int8")]


def load(folder: Path, **changes: Any) -> Any:
    return load_teacher(
        TeacherConfig(
            **{"model": str(folder), "backend": "transformers", "tokens_per_forward": 100, "chunk_positions": 7, **changes}
        )
    )


def masked_sequences(case: TeacherCase, longest: int) -> list[TokenSequence]:
    """Whole ones, some with holes, and one with nothing supervised."""
    rng = np.random.default_rng(3)
    whole = random_sequences(case, [longest, 20, 1, 33], seed=4)
    holed = [make_sequence(s.input_ids_N, rng.random(s.num_tokens) < 0.4) for s in whole if s.num_tokens > 2]
    return [*whole, *holed, make_sequence(whole[1].input_ids_N, np.zeros(20, np.bool_))]


@cache
def reference_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def expected_states(folder: Path, sequence: TokenSequence) -> dict[int, np.ndarray]:
    """Layer -> (N, H), by the definition: one sequence, one pass, everything held; the last before the final norm, -1 after."""
    import torch

    model = reference_model(folder)
    before: list[Any] = []
    norm = model.base_model.ln_f if hasattr(model.base_model, "ln_f") else model.base_model.norm
    handle = norm.register_forward_pre_hook(lambda _module, args: before.append(args[0]))
    with torch.inference_mode():
        states = model(input_ids=torch.from_numpy(sequence.input_ids_N.astype(np.int64))[None], output_hidden_states=True)
    handle.remove()
    *inner, last = (state[0].numpy() for state in states.hidden_states)
    return {**dict(enumerate(inner)), len(inner): before[0][0].numpy(), -1: last}


def check_features(found: dict[str, np.ndarray], states: dict[int, np.ndarray], sequence: TokenSequence, error: float) -> None:
    rows = {layer: state[sequence.supervised_N] for layer, state in states.items()}
    for layer in (0, 1, 2):
        np.testing.assert_allclose(found[f"hidden_{layer}"], rows[layer], atol=error)
    np.testing.assert_allclose(found["hidden_last"], rows[-1], atol=error)
    zeros = np.zeros((1, rows[0].shape[1]), np.float32)
    expected = (rows[1].mean(axis=0, keepdims=True), rows[-1][-1:]) if len(rows[0]) else (zeros, zeros)
    np.testing.assert_allclose(found["hidden_1_mean"], expected[0], atol=error)
    np.testing.assert_allclose(found["hidden_last_last"], expected[1], atol=error)


def test_features_are_what_output_hidden_states_gives(tiny_model_dir: Path):
    teacher = load(tiny_model_dir)
    case = TeacherCase(teacher, dense_forward(tiny_model_dir), 5e-5)
    sequences, features = masked_sequences(case, 90), resolve_features([*LAYERS, *POOLED], teacher.hidden_shape)
    answers = list(teacher.score(sequences, top_k(4), features))
    plain = list(teacher.score(sequences, top_k(4)))
    for sequence, answer, without in zip(sequences, answers, plain, strict=True):
        check_features(dict(answer.features), expected_states(tiny_model_dir, sequence), sequence, 2e-5)
        np.testing.assert_allclose(answer.logprobs_E, without.logprobs_E, atol=1e-6)
        assert not without.features
    hooks = [hook for m in teacher._model.modules() for hook in [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]]
    assert not [hook for hook in hooks if hook.__module__.startswith("kdcache")]


def test_a_model_that_is_scored_step_by_step_gives_the_same(tmp_path: Path):
    from test_hf_teacher import build_soft_capped_model

    folder = build_soft_capped_model(tmp_path / "gemma")
    teacher = load(folder)
    case = TeacherCase(teacher, dense_forward(folder), 5e-5)
    features = resolve_features([*LAYERS, *POOLED], teacher.hidden_shape)
    sequences = masked_sequences(case, 40)
    for sequence, answer in zip(sequences, teacher.score(sequences, top_k(4), features), strict=True):
        check_features(dict(answer.features), expected_states(folder, sequence), sequence, 5e-5)


def test_a_layer_that_is_not_there_or_cannot_be_seen_is_refused(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    teacher = load(tiny_model_dir)
    with pytest.raises(ConfigError, match=r"layer 3, but the teacher has layers 0 .* to 2 .*-1 is after the final norm"):
        resolve_features([FeatureConfig(layer=3)], teacher.hidden_shape)
    (inner, last) = resolve_features([FeatureConfig(layer=1), FeatureConfig(layer=-1)], teacher.hidden_shape)
    monkeypatch.setattr("kdcache.teacher.hf.features.find_decoder", lambda *_: None)
    with pytest.raises(ConfigError, match="the layers of LlamaForCausalLM are not found"):
        teacher.score([], top_k(4), [inner])
    teacher.score([], top_k(4), [last])


def test_layers_that_are_not_those_of_the_definition_are_noticed(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    from kdcache.teacher.hf import features as _hf_features

    teacher = load(tiny_model_dir)
    find = _hf_features.find_decoder
    monkeypatch.setattr(_hf_features, "find_decoder", lambda *given: (None, list(find(*given)[1])[::-1]))
    with pytest.raises(ConfigError, match="what layer 1 of LlamaForCausalLM gives is not what output_hidden_states gives"):
        teacher.score([], top_k(4), resolve_features([FeatureConfig(layer=1)], teacher.hidden_shape))
