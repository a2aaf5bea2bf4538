"""A teacher's answer for a text is the one that it gives alone, with an attention that does what the config asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contracts.teacher import make_sequence, top_k

from kdcache.config.capture import GenerateConfig, TeacherConfig
from kdcache.errors import ConfigError, TeacherError
from kdcache.format.manifest import FeatureInfo
from kdcache.format.record import Distributions, TokenSequence
from kdcache.teacher import load_teacher, load_tokenizer
from kdcache.teacher.generation import Prompt

pytest.importorskip("transformers")

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from kdcache.teacher.hf.attention import attention_gap
from kdcache.teacher.hf.rotary import mend_rotary

LONG = 32
"""Tokens beyond which the rope-scaled models take other factors."""

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": LONG,
    "factor": 4.0,
    "partial_rotary_factor": 1.0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"original_max_position_embeddings": LONG, "rope_parameters": LONGROPE}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}),
    "soft cap": ("gemma2", {"head_dim": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 1, "sliding_window": 24}),
    "sinks": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "sliding_window": 24}),
    "experts": ("mixtral", {"num_local_experts": 4, "sliding_window": 24}),
}
DECIDED = {
    "longrope": ("sdpa", "per text"),
    "dynamic": ("sdpa", None),
    "soft cap": ("eager", None),
    "sinks": ("eager", None),
    "experts": ("sdpa", None),
}


def build(folder: Path, kind: str, **fields: Any) -> Path:
    """A model of two layers whose attention matters: weights are three times what they are made as."""
    plain: dict[str, Any] = {
        "vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3,
        "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(plain | fields)), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: build(root / name, kind, **fields) for name, (kind, fields) in MODELS.items()}


def teacher_of(folder: Path, **changes: Any) -> Any:
    settings = {"model": str(folder), "backend": "transformers", "dtype": "float32", "tokens_per_forward": 1000}
    return load_teacher(TeacherConfig(**(settings | changes)))


def texts(lengths: Sequence[int] = (20, 100, LONG - 1, LONG, LONG + 1, 2, 128)) -> list[TokenSequence]:
    rng = np.random.default_rng(1)
    return [make_sequence(rng.integers(4, 260, length)) for length in lengths]


def off(folder: Path, sequences: Sequence[TokenSequence], answers: Sequence[Distributions], attention: str = "eager") -> float:
    """Greatest difference in nats from a forward of transformers over each text alone, by a model that has seen no other."""
    worst = 0.0
    for sequence, answer in zip(sequences, answers, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
        with torch.no_grad():
            logits_1NV = model(input_ids=torch.from_numpy(sequence.input_ids_N.astype(np.int64))[None], use_cache=False).logits
        ids_PK, logprobs_PK = answer.padded()
        expected_PK = torch.log_softmax(logits_1NV[0].double(), dim=-1).gather(1, torch.from_numpy(ids_PK.astype(np.int64)))
        worst = max(worst, float((expected_PK - torch.from_numpy(logprobs_PK)).abs().max()))
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_an_answer_in_a_batch_is_that_of_the_text_alone_with_eager_attention(name: str, folders: dict[str, Path]):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    teacher = teacher_of(folders[name])
    assert torch.equal(torch.get_rng_state(), before)
    options = teacher.identity.engine_options
    assert (options["attn_implementation"], options.get("rotary_factors")) == DECIDED[name]
    assert "batches" not in options
    for _ in range(2):  # what is kept of long texts must not show in the next
        assert off(folders[name], texts(), list(teacher.score(texts(), top_k(8)))) < 1e-5
    teacher.close()


def test_the_cases_bite(folders: dict[str, Path]):
    """Without the mends the numbers above are far off: sdpa lacks the cap, and transformers takes factors from the longest."""
    teacher = teacher_of(folders["soft cap"])
    assert off(folders["soft cap"], texts([60]), list(teacher.score(texts([60]), top_k(8))), "sdpa") > 0.1
    teacher.close()
    model = AutoModelForCausalLM.from_pretrained(folders["longrope"], dtype=torch.float32).eval()
    ids_BT = torch.arange(200).reshape(2, 100)
    with torch.no_grad():
        alone, beside = (model(input_ids=ids_XT, use_cache=False).logits[0, :20] for ids_XT in (ids_BT[:1, :20], ids_BT))
    assert (alone - beside).abs().max() > 0.1


def test_a_named_attention_that_lacks_something_is_refused_and_any_other_is_kept(folders: dict[str, Path]):
    with pytest.raises(ConfigError, match=r"attn_implementation is 'sdpa', which ignores part of what the config of Gemma2"):
        teacher_of(folders["soft cap"], engine_options={"attn_implementation": "sdpa"}, dtype="bfloat16")
    for name, attention in (("soft cap", "eager"), ("experts", "eager"), ("experts", "sdpa")):
        teacher = teacher_of(folders[name], engine_options={"attn_implementation": attention})
        assert teacher.identity.engine_options["attn_implementation"] == attention
        teacher.close()


def with_hook(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """Every model that is loaded has a first layer whose output is changed."""
    from kdcache.teacher.hf import load as _hf_load

    load = _hf_load._load

    def hooked(*given: Any) -> Any:
        model: Any = load(*given)
        model.model.layers[0].register_forward_hook(lambda layer, _, hidden_BTH: change(layer, hidden_BTH))
        return model

    monkeypatch.setattr(_hf_load, "_load", hooked)


@pytest.mark.parametrize(
    ("sharing", "change"),
    [
        # Statistics of the batch; and what only padding brings in.
        ("alone", lambda _, hidden_BTH: hidden_BTH + hidden_BTH[:, :1].mean(dim=0, keepdim=True)),
        ("equal", lambda _, hidden_BTH: hidden_BTH * (1 + hidden_BTH.shape[1] / 16)),
    ],
)
def test_what_is_taken_from_the_batch_is_found_and_mended(
    sharing: str, change: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with_hook(monkeypatch, change)
    with caplog.at_level("WARNING", "kdcache"):
        teacher = teacher_of(folders["experts"])
    assert "reading texts of different lengths together changes an answer" in caplog.text
    assert teacher.identity.engine_options["batches"] == sharing
    sequences = texts([20, 7, 20, 60])
    together = list(teacher.score(sequences, top_k(8)))
    for sequence, answer in zip(sequences, together, strict=True):
        (alone,) = teacher.score([sequence], top_k(8))
        assert np.array_equal(alone.token_ids_E, answer.token_ids_E)
        np.testing.assert_allclose(alone.logprobs_E, answer.logprobs_E, atol=1e-5)
    teacher.close()


def test_what_follows_from_far_positions_is_found_in_a_model_too_large_for_long_texts(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    from kdcache.teacher.hf import load as _hf_load
    from kdcache.teacher.hf import proof as _hf_proof

    load, greatest = _hf_load._load, []

    def hooked(*given: Any) -> Any:
        model: Any = load(*given)
        model.model.rotary_emb.register_forward_pre_hook(
            lambda _, args, kwargs: greatest.append(int([*args, *kwargs.values()][1].max())), with_kwargs=True
        )
        model.model.layers[0].register_forward_hook(lambda _, __, hidden_BTH: hidden_BTH * (1 + (greatest[-1] > 100)))
        return model

    monkeypatch.setattr(_hf_load, "_load", hooked)
    monkeypatch.setitem(_hf_proof._LONGEST, "cpu", 12)
    teacher = teacher_of(folders["experts"])
    assert teacher.identity.engine_options["batches"] == "equal"
    teacher.close()


class Keeper:
    """Adds what it saw of the text before."""

    kept: Any = 0.0

    def __call__(self, _: Any, hidden_BTH: torch.Tensor) -> torch.Tensor:
        kept, self.kept = self.kept, hidden_BTH[:1, :1]
        return hidden_BTH + kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda _, hidden_BTH: hidden_BTH + torch.randn_like(hidden_BTH),
            "other numbers for the same text when asked again",
        ),
        (Keeper(), "other numbers for the same text when asked again"),
        (lambda _, hidden_BTH: hidden_BTH + hidden_BTH.mean(dim=1, keepdim=True), "reads tokens that come later"),
        (
            lambda _, hidden_BTH: hidden_BTH + torch.randn_like(hidden_BTH) * (hidden_BTH.shape[1] > 20),
            "other numbers for the same text when asked again",
        ),
        (
            lambda _, hidden_BTH: hidden_BTH + hidden_BTH.mean(dim=1, keepdim=True) * (hidden_BTH.shape[1] > 20),
            "reads tokens that come later",
        ),
    ],
)
def test_what_no_batch_can_mend_is_refused(
    change: Any, message: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    with_hook(monkeypatch, change)
    before = torch.get_rng_state()
    with pytest.raises(TeacherError, match=message):
        teacher_of(folders["experts"])
    assert torch.equal(torch.get_rng_state(), before)


def test_two_attentions_of_which_nobody_knows_the_right_one_are_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def change(layer: Any, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return hidden_BTH * (0.5 if layer.self_attn.config._attn_implementation == "eager" else torch.arange(64) / 64)

    with_hook(monkeypatch, change)
    with pytest.raises(ConfigError, match=r"other numbers with 'sdpa' attention than with 'eager'"):
        teacher_of(folders["experts"])
    with caplog.at_level("WARNING", "kdcache"):
        teacher_of(folders["experts"], engine_options={"attn_implementation": "sdpa"}).close()
    assert "sdpa and eager attention differ" in caplog.text


class ChosenWhenBuilt(LlamaForCausalLM):
    """Attention is chosen for good when the model is built, as in code from before transformers' attention interface."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.factor = 0.5 if config._attn_implementation == "eager" else 1.0
        self.model.layers[0].register_forward_hook(lambda _, __, hidden_BTH: hidden_BTH * (1 + self.factor * torch.arange(64)))

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False


def test_a_model_that_chose_its_attention_when_it_was_built_is_compared_with_a_copy(folders: dict[str, Path]):
    model = ChosenWhenBuilt.from_pretrained(folders["dynamic"], dtype=torch.float32).eval()
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    gap = attention_gap(model)
    assert gap.whole > 0.01 > gap.layers
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == before
    model.factor = 0.5
    assert attention_gap(model).whole == 0


def test_features_of_a_batch_are_those_of_each_text_alone(folders: dict[str, Path]):
    teacher = teacher_of(folders["longrope"])
    asked = [FeatureInfo(name="early", layer=1, size=64)]
    for sequence, answer in zip(texts(), list(teacher.score(texts(), top_k(8), asked)), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folders["longrope"], dtype=torch.float32).eval()
        ids_1N = torch.from_numpy(sequence.input_ids_N.astype(np.int64))[None]
        with torch.no_grad():
            expected = model(input_ids=ids_1N, use_cache=False, output_hidden_states=True).hidden_states[1][0]
        np.testing.assert_allclose(answer.features["early"], expected, atol=1e-5)
    teacher.close()


def test_answers_are_written_as_if_each_prompt_were_alone(folders: dict[str, Path]):
    """Also where a row grows beyond the length at which the factors change, and its cached keys with it."""
    teacher = teacher_of(folders["longrope"])
    prompts = [Prompt(sequence=s, seed=i) for i, s in enumerate(texts([5, LONG - 4, LONG + 8]))]
    config, tokenizer = GenerateConfig(max_tokens=10, temperature=0), load_tokenizer("fake")
    together = [answer.token_ids_N.tolist() for answer in teacher.generate(prompts, config, tokenizer)]
    for prompt, answer in zip(prompts, together, strict=True):
        ids = prompt.sequence.input_ids_N.tolist()
        for token_id in answer:
            model = AutoModelForCausalLM.from_pretrained(folders["longrope"], dtype=torch.float32).eval()
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token_id
            ids.append(token_id)
    teacher.close()


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_each_document_of_a_packed_row_has_the_factors_that_it_has_alone(name: str, folders: dict[str, Path]):
    lengths = [20, 150, 7, 300, 20]

    def factors(rotary: Any, positions: torch.Tensor) -> torch.Tensor:
        return torch.cat(rotary(torch.zeros(*positions.shape, 64), positions))

    model: Any = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    assert mend_rotary(model).depends_on_length
    assert mend_rotary(model) is mend_rotary(model)
    packed_1T = torch.cat([torch.arange(length) for length in lengths])[None]
    found = factors(model.model.rotary_emb, packed_1T).split(lengths, dim=1)
    for part, length in zip(found, lengths, strict=True):
        fresh: Any = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
        torch.testing.assert_close(part, factors(fresh.model.rotary_emb, torch.arange(length)[None]), rtol=0, atol=1e-6)
