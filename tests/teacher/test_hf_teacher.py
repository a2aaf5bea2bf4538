from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from contracts.teacher import PROMISES, TeacherCase, closing, make_sequence, random_sequences, score
from dense_forward import dense_forward

from kdcache.config.teacher import TeacherConfig, VllmConfig
from kdcache.errors import ConfigError, TeacherError
from kdcache.teacher import load_teacher
from kdcache.teacher.hf.load import refuse_vllm_settings

pytest.importorskip("transformers")

from tiny_model import build_tiny_model


def config(folder: Path | str, **changes: object) -> TeacherConfig:
    # Small batches and chunks, so that both are crossed.
    settings = {"model": str(folder), "backend": "transformers", "tokens_per_forward": 100, "chunk_positions": 7}
    return TeacherConfig(**(settings | changes))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def case(tiny_model_dir: Path) -> Iterator[TeacherCase]:
    teacher = load_teacher(config(tiny_model_dir))
    yield TeacherCase(
        teacher,
        dense_forward(tiny_model_dir),
        5e-5,
        lambda: load_teacher(config(tiny_model_dir, tokens_per_forward=50)).identity,
    )
    teacher.close()


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_the_transformers_teacher_keeps_every_promise(promise: Callable[[TeacherCase], None], case: TeacherCase):
    promise(case)


def test_closing_twice_is_fine_and_a_closed_teacher_says_so(tiny_model_dir: Path):
    closing(TeacherCase(load_teacher(config(tiny_model_dir)), dense_forward(tiny_model_dir), 1e-4))


def test_its_identity_names_the_weights(case: TeacherCase, tmp_path: Path):
    identity = case.teacher.identity
    assert (identity.model, identity.architecture, identity.dtype) == ("tiny-llama", "LlamaForCausalLM", "float32")
    assert (identity.vocab_size, identity.context_length, identity.revision) == (520, 256, None)
    other = load_teacher(config(build_tiny_model(tmp_path / "tiny-llama", seed=1))).identity
    assert other.weights_digest != identity.weights_digest


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_the_float64_forward(tiny_model_dir: Path, dtype: str):
    teacher = load_teacher(config(tiny_model_dir, dtype=dtype))
    case = TeacherCase(teacher, dense_forward(tiny_model_dir), 0.4)
    assert teacher.identity.dtype == dtype
    for sequence in (sequences := random_sequences(case, [50, 20])):
        dense_NV = case.dense(sequence)
        (answer,) = score(case, [sequence])
        rows_E = np.repeat(np.arange(answer.num_positions), answer.num_entries_P)
        errors = np.abs(answer.logprobs_E - dense_NV[rows_E, answer.token_ids_E])
        assert errors.max() < 0.4
        assert errors.mean() < 0.03
    assert len(score(case, sequences)) == 2


def test_logits_that_are_more_than_a_projection_are_scored_step_by_step(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = build_soft_capped_model(tmp_path / "gemma")
    with caplog.at_level("INFO", "kdcache"):
        teacher = load_teacher(config(folder))
    assert "scoring one sequence at a time" in caplog.text
    case = TeacherCase(teacher, dense_forward(folder), 5e-5)
    sequences = random_sequences(case, [1, 30, 7, 8])
    holed = make_sequence(np.arange(30), np.arange(30) % 9 == 8)
    for sequence, answer in zip([*sequences, holed], score(case, [*sequences, holed]), strict=True):
        dense_PV = case.dense(sequence)[sequence.supervised_N]
        rows_E = np.repeat(np.arange(answer.num_positions), answer.num_entries_P)
        np.testing.assert_allclose(answer.logprobs_E, dense_PV[rows_E, answer.token_ids_E], atol=5e-5)
    logits_std = dense_forward(folder)(sequences[1]).std()
    assert logits_std > 1.0  # the cap of 3.0 bites: without it this test would not notice


def build_soft_capped_model(folder: Path) -> Path:
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    gemma = Gemma2Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        sliding_window=16,
        final_logit_softcapping=3.0,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(gemma)
    with torch.no_grad():
        torch.nn.init.normal_(model.lm_head.weight, 0.0, 0.5)
    model.save_pretrained(folder)
    return folder


def test_a_path_that_leads_nowhere_is_one_sentence(tmp_path: Path):
    for model in (str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(TeacherError, match="no such folder"):
            load_teacher(config(model))
    with pytest.raises(TeacherError, match=r"no config\.json"):
        load_teacher(config(tmp_path))


def test_a_damaged_checkpoint_is_one_sentence(tiny_model_dir: Path, tmp_path: Path):
    broken = copy_model(tiny_model_dir, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(TeacherError, match="does not load with transformers: ") as caught:
        load_teacher(config(broken))
    assert "\n" not in str(caught.value)


def test_weights_that_the_checkpoint_lacks_are_refused_and_not_made_up(tiny_model_dir: Path, tmp_path: Path):
    deeper = copy_model(tiny_model_dir, tmp_path / "deeper")
    fields = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 3}))
    with pytest.raises(TeacherError, match=r"missing or of another shape: model\.layers\.2"):
        load_teacher(config(deeper))


def test_settings_of_vllm_are_refused(tiny_model_dir: Path):
    two = config(tiny_model_dir, backend="auto", vllm=VllmConfig(tensor_parallel_size=2))
    with pytest.raises(ConfigError, match=r"teacher\.vllm\.tensor_parallel_size is 2"):
        refuse_vllm_settings(two)
    with pytest.raises(ConfigError, match=r"teacher\.quantization is 'awq'"):
        load_teacher(config(tiny_model_dir, quantization="awq"))


def copy_model(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder
