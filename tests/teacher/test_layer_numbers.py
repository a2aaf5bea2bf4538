"""Layers mean one thing on every engine: 0 the embeddings, i after layer i, L before the final norm, -1 after it.

Four conventions exist. transformers' `output_hidden_states[L]` is after the final norm; vLLM's `aux_hidden_state_layers` L, and
speculators' `target_layer_ids` L, are before it; kdcache has both, as L and -1.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contracts.teacher import make_sequence, top_k
from model_families import FAMILIES, build_family

from kdcache.config.capture import FeatureConfig
from kdcache.config.teacher import TeacherConfig, VllmConfig
from kdcache.errors import ConfigError
from kdcache.format.output_projection import OutputProjection
from kdcache.format.record import TokenSequence
from kdcache.teacher import load_teacher
from kdcache.teacher.features import resolve_features

pytest.importorskip("transformers")

NUM_LAYERS = 3
HIDDEN = [FeatureConfig(layer=layer) for layer in (*range(NUM_LAYERS + 1), -1)]
HEADS = [FeatureConfig(layer=layer, kind=kind) for layer in (1, NUM_LAYERS) for kind in ("queries", "keys", "values")]
ATTENTION = [FeatureConfig(layer=layer, kind="attention", top_keys=40) for layer in (1, 2, NUM_LAYERS)]
PARTS = [
    FeatureConfig(layer=1, positions="all", stride=3, offset=1, name="strided"),
    FeatureConfig(layer=2, positions="all", pooling="mean", name="all_mean"),
    FeatureConfig(layer=-1, positions="all", max_positions=5, name="five"),
    FeatureConfig(layer=3, kind="keys", positions="all", pooling="last", name="last_keys"),
]


def sequences() -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    texts = [make_sequence(rng.integers(1, 60, n), rng.random(n) < 0.5) for n in (40, 9, 33, 24)]
    return [*texts, make_sequence(rng.integers(1, 60, 12), np.zeros(12, np.bool_))]


def load(folder: Path, backend: str, **changes: Any) -> Any:
    return load_teacher(
        TeacherConfig(
            model=str(folder),
            backend=backend,
            dtype="float32",
            tokens_per_forward=64,
            chunk_positions=24,
            vllm=VllmConfig(route="worker" if backend == "vllm" else "auto"),
            **changes,
        )
    )


@cache
def definition(folder: Path) -> Any:
    """A function of a sequence that gives every layer's residual stream, and what stands around each layer's attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def states(sequence: TokenSequence) -> dict[str, np.ndarray]:
        seen: dict[str, Any] = {}
        hooks = [model.model.norm.register_forward_pre_hook(lambda _m, args: seen.__setitem__("before", args[0]))]
        for number, layer in enumerate(model.model.layers, start=1):
            for kind, names in {"queries": ("q_norm", "q_proj"), "keys": ("k_norm", "k_proj"), "values": ("v_proj",)}.items():
                module = next((getattr(layer.self_attn, n) for n in names if hasattr(layer.self_attn, n)), None)
                if module is not None:
                    hooks.append(
                        module.register_forward_hook(lambda _m, _a, out, key=f"{kind}_{number}": seen.__setitem__(key, out))
                    )
        ids = torch.from_numpy(sequence.input_ids_N.astype(np.int64))[None]
        with torch.inference_mode():
            output = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
        for hook in hooks:
            hook.remove()
        found = {f"hidden_{i}": state[0] for i, state in enumerate(output.hidden_states[:-1])}
        found |= {f"hidden_{NUM_LAYERS}": seen.pop("before")[0], "hidden_last": output.hidden_states[-1][0]}
        found |= {f"attention_{i}": maps[0] for i, maps in enumerate(output.attentions, start=1)}
        for key, value in seen.items():  # (1, N, W), or a norm's (1, N, heads, d) or (1, heads, N, d)
            state = value[0] if value.dim() == 3 or value.shape[1] == sequence.num_tokens else value[0].transpose(0, 1)
            found[key] = state.reshape(sequence.num_tokens, -1)
        return {name: value.numpy() for name, value in found.items()}

    return states


def check_hidden(teacher: Any, folder: Path, error: float = 1e-4) -> None:
    features = resolve_features(HIDDEN, teacher.hidden_shape)
    assert [feature.layer for feature in features] == [0, 1, 2, 3, -1]
    for sequence, answer in zip(sequences(), teacher.score(sequences(), top_k(4), features), strict=True):
        expected, here = definition(folder)(sequence), sequence.supervised_N
        for feature in features:
            np.testing.assert_allclose(answer.features[feature.name], expected[feature.name][here], atol=error)
        if here.any():  # the two that were once taken for one another are far apart
            assert np.abs(answer.features["hidden_3"] - answer.features["hidden_last"]).max() > 0.1


def check_parts_and_heads(teacher: Any, folder: Path, error: float = 1e-4) -> None:
    features = resolve_features([*HEADS, *PARTS], teacher.hidden_shape)
    for sequence, answer in zip(sequences(), teacher.score(sequences(), top_k(4), features), strict=True):
        expected, here = definition(folder)(sequence), sequence.supervised_N
        for feature in features[: len(HEADS)]:
            np.testing.assert_allclose(answer.features[feature.name], expected[feature.name][here], atol=error)
        num_tokens = sequence.num_tokens
        np.testing.assert_allclose(answer.features["strided"], expected["hidden_1"][1::3], atol=error)
        np.testing.assert_allclose(answer.features["all_mean"][0], expected["hidden_2"].mean(axis=0), atol=error)
        five = np.arange(5) * num_tokens // 5
        np.testing.assert_allclose(answer.features["five"], expected["hidden_last"][five], atol=error)
        np.testing.assert_allclose(answer.features["last_keys"][0], expected["keys_3"][-1], atol=error)


def check_attention(teacher: Any, folder: Path, error: float = 1e-5) -> None:
    features = resolve_features(ATTENTION, teacher.hidden_shape)
    for sequence, answer in zip(sequences(), teacher.score(sequences(), top_k(4), features), strict=True):
        positions = np.flatnonzero(sequence.supervised_N)
        for feature in features:
            maps_hPN = definition(folder)(sequence)[feature.name][:, positions]
            values = answer.features[feature.name].reshape(len(positions), 4, 40)
            distances = answer.features[f"{feature.name}:distance"].reshape(values.shape)
            assert (np.diff(values, axis=-1) <= 0).all()
            kept = values > 0
            back = positions[:, None, None] - distances
            found = np.zeros(maps_hPN.transpose(1, 0, 2).shape, np.float32)
            p, h, _ = np.nonzero(kept)
            found[p, h, back[kept]] = values[kept]
            np.testing.assert_allclose(found, maps_hPN.transpose(1, 0, 2), atol=error)
            assert not distances[~kept].any()


@pytest.mark.parametrize("family", [*FAMILIES])
def test_transformers_gives_what_the_table_says(family: str, tmp_path: Path):
    folder = build_family(tmp_path, family)
    teacher = load(folder, "transformers")
    check_hidden(teacher, folder)
    check_attention(teacher, folder)
    if family != "Phi3":  # its one projection is compared with the definition of a Llama below
        check_parts_and_heads(teacher, folder)


def test_queries_keys_and_values_of_one_fused_projection_are_its_columns(tmp_path: Path):
    teacher = load(build_family(tmp_path, "Phi3"), "transformers")
    features = resolve_features(HEADS[:3], teacher.hidden_shape)
    attention = teacher._model.model.layers[0].self_attn
    seen: list[Any] = []
    handle = attention.qkv_proj.register_forward_hook(lambda _m, _a, out: seen.append(out[0].numpy()))
    (sequence, *_) = sequences()
    (answer,) = teacher.score([sequence], top_k(4), features)
    handle.remove()
    columns = np.split(seen[-1][sequence.supervised_N], [64, 96], axis=1)
    for feature, expected in zip(features, columns, strict=True):
        np.testing.assert_array_equal(answer.features[feature.name], expected)


def test_one_most_probable_key_of_many_positions_needs_no_whole_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from kdcache.teacher.hf import attention_calls

    folder = build_family(tmp_path, "Llama")
    teacher = load(folder, "transformers")
    (feature,) = resolve_features([FeatureConfig(layer=2, kind="attention", top_keys=3)], teacher.hidden_shape)
    whole = [answer.features for answer in teacher.score(sequences(), top_k(4), [feature])]
    most: list[int] = []
    make = attention_calls.AttentionCall.probabilities
    monkeypatch.setattr(attention_calls, "_MOST_SCORES", 4 * 40 * 3)
    monkeypatch.setattr(
        attention_calls.AttentionCall, "probabilities", lambda *given: (most.append(len(given[2])), make(*given))[1]
    )
    parts = [answer.features for answer in teacher.score(sequences(), top_k(4), [feature])]
    assert max(most[1:]) <= 6
    for one, other in zip(whole, parts, strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], other[name], atol=1e-6)


def test_states_that_are_not_what_the_attention_gets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from kdcache.teacher.hf import heads

    teacher = load(build_family(tmp_path, "Llama"), "transformers")
    monkeypatch.setitem(heads._PROJECTIONS, "keys", ("v_proj",))
    with pytest.raises(ConfigError, match="what looks like the keys of layer 1 of LlamaForCausalLM is not what its attention"):
        teacher.score([], top_k(4), resolve_features([FeatureConfig(layer=1, kind="keys")], teacher.hidden_shape))
    monkeypatch.setattr(heads, "_FUSED", ())
    monkeypatch.setitem(heads._PROJECTIONS, "values", ("none",))
    with pytest.raises(ConfigError, match="the values of layer 1 of LlamaForCausalLM are not where kdcache looks"):
        teacher.score([], top_k(4), resolve_features([FeatureConfig(layer=1, kind="values")], teacher.hidden_shape))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3Text"])
def test_vllm_gives_what_the_table_says(family: str, tmp_path: Path):
    pytest.importorskip("vllm")
    folder = build_family(tmp_path, family)
    teacher = load(folder, "vllm")
    try:
        check_hidden(teacher, folder)
        check_parts_and_heads(teacher, folder)
        check_projection(teacher)
        with pytest.raises(ConfigError, match="vLLM, whose fused kernels show no channels, gives no activation_statistics"):
            teacher.activation_statistics([])
        attention = resolve_features(ATTENTION[:1], teacher.hidden_shape)
        with pytest.raises(ConfigError, match=r"it makes no attention maps; use teacher\.backend transformers"):
            teacher.score([], top_k(4), attention)
    finally:
        teacher.close()


@pytest.mark.vllm
@pytest.mark.slow
def test_a_compiled_model_of_vllm_hands_its_layers_out_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # traced, and run without a C++ compiler
    folder = build_family(tmp_path, "Llama")
    teacher = load(folder, "vllm", engine_options={"enforce_eager": False})
    try:
        check_hidden(teacher, folder)
        assert teacher._handed == (0, 1, 2, 3)
        assert teacher.identity.engine_options["enforce_eager"] is False
        model = teacher._llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model
        assert model.do_not_compile is False
        with pytest.raises(ConfigError, match=r"a compiled model does not show queries, keys and values; set teacher\."):
            teacher.score([], top_k(4), resolve_features(HEADS, teacher.hidden_shape))
    finally:
        teacher.close()


def check_projection(teacher: Any, error: float = 1e-4) -> None:
    """What the sidecar holds makes the logits of layer -1, and its norm makes layer -1 of layer L."""
    found = teacher.output_projection()
    projection = OutputProjection.from_arrays(found.arrays())
    features = resolve_features([FeatureConfig(layer=-1), FeatureConfig(layer=NUM_LAYERS)], teacher.hidden_shape)
    sequence = sequences()[0]
    (answer,) = teacher.score([sequence], top_k(8), features)
    last_PH, before_PH = answer.features["hidden_last"], answer.features["hidden_3"]
    logits_PV = projection.logits(last_PH).astype(np.float64)
    logprobs_PV = logits_PV - np.log(np.exp(logits_PV).sum(axis=-1, keepdims=True))
    ids_PK, logprobs_PK = answer.padded()
    np.testing.assert_allclose(np.take_along_axis(logprobs_PV, ids_PK, axis=-1), logprobs_PK, atol=error)
    assert projection.norm is not None
    np.testing.assert_allclose(projection.norm(before_PH), last_PH, atol=error)
    assert projection.weight_VH.shape == (60, 64)


SCALED = {"Llama": {}, "Qwen3": {}, "Gemma2": {"final_logit_softcapping": 5.0}, "Cohere": {"logit_scale": 0.25}}


@pytest.mark.parametrize("family", [*SCALED])
def test_the_output_projection_of_transformers_makes_its_logits(family: str, tmp_path: Path):
    teacher = load(build_family(tmp_path, family, **SCALED[family]), "transformers")
    check_projection(teacher)
    found = teacher.output_projection()
    assert (found.logit_scale, found.softcap) == {"Gemma2": (1.0, 5.0), "Cohere": (0.25, None)}.get(family, (1.0, None))
    assert found.is_tied == (family != "Llama")


def test_bfloat16_weights_travel_as_their_bits(tmp_path: Path):
    import torch

    teacher = load_teacher(TeacherConfig(model=str(build_family(tmp_path, "Qwen3")), backend="transformers", dtype="bfloat16"))
    found: OutputProjection = teacher.output_projection()  # type: ignore[attr-defined]
    weight: Any = teacher._model.lm_head.weight  # type: ignore[attr-defined]
    assert found.bfloat16_names == ("weight",)
    assert torch.equal(torch.from_numpy(found.weight_VH.view(np.int16)).view(torch.bfloat16), weight)


def test_a_head_that_is_not_one_projection_is_refused(tmp_path: Path):
    teacher = load(build_family(tmp_path, "Gemma2", final_logit_softcapping=5.0), "transformers")
    forward = type(teacher._model).forward

    def other(*given: Any, **named: Any) -> Any:
        output = forward(teacher._model, *given, **named)
        output.logits = output.logits * 1.5
        return output

    teacher._model.forward = other
    with pytest.raises(ConfigError, match=r"the logits of Gemma2ForCausalLM are not its output projection"):
        teacher.output_projection()


def test_bytes_of_features_count_whole_vectors_before_a_projection_and_a_stride(tmp_path: Path):
    from kdcache.config.features import ProjectionConfig
    from kdcache.teacher.fake import FAKE_HIDDEN
    from kdcache.teacher.features import bytes_per_position, no_vectors

    asked = [
        FeatureConfig(layer=-1),  # 16 numbers
        FeatureConfig(layer=1, projection=ProjectionConfig(kind="pca", size=4)),  # 16 until they are projected
        FeatureConfig(layer=2, positions="all", stride=4),  # a quarter of 16
        FeatureConfig(layer=2, pooling="mean"),  # one per sequence: nothing
        FeatureConfig(layer=1, kind="keys"),  # 2 heads of 4
        FeatureConfig(layer=1, kind="attention", top_keys=3),  # 4 heads, 3 keys
    ]
    features = resolve_features(asked, FAKE_HIDDEN)
    assert bytes_per_position(features) == 4 * (16 + 16 + 4 + 0 + 8 + 12)
    assert [feature.size for feature in features] == [16, 4, 16, 16, 8, 12]
    nothing = no_vectors(features)
    assert nothing["attention_1:distance"].shape == (0, 12)
    assert nothing["hidden_2_mean"].shape == (1, 16)
    with pytest.raises(ConfigError, match=r"a projection to 16 numbers, but its vectors have 16; set projection\.size below"):
        resolve_features([FeatureConfig(layer=1, projection=ProjectionConfig(kind="random", size=16))], FAKE_HIDDEN)
    with pytest.raises(ConfigError, match="does not give one number of heads for all layers; use kind hidden"):
        resolve_features([FeatureConfig(layer=1, kind="keys")], type(FAKE_HIDDEN)(4, 16))
