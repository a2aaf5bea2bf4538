"""Students whose text configuration lies below `text_config`, and students without sdpa or packing.

Shape letters: P supervised positions, V vocabulary.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import ONE_LAYER, OPTIONS, first_batches
from test_student_heads import assert_close, loss_of_logits, train_config, with_gradients
from train_caches import train_config as run_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments

from kdcache.config.capture import TeacherConfig
from kdcache.errors import ConfigError, MismatchError
from kdcache.loader.loader import Loader
from kdcache.teacher import load_teacher
from kdcache.teacher.hf.load import language_model_class
from kdcache.train.adapters import KDTrainer, StudentLoss
from kdcache.train.body import positions
from kdcache.train.evaluation.evaluate import EvaluateConfig, evaluate
from kdcache.train.packed import check_architecture
from kdcache.train.step import student_loss
from kdcache.train.trainer import train

TEXT: dict[str, Any] = ONE_LAYER | {
    "head_dim": 16,
    "sliding_window": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EYES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES |= {"image_size": 28, "patch_size": 14}
SECTIONS = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
LLAMA4_EYES = EYES | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
NESTED: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT, "vision_config": EYES},
    "llama4": {
        "text_config": TEXT | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 64},
        "vision_config": LLAMA4_EYES,
    },
    "qwen2_vl": {
        "text_config": TEXT | {"rope_parameters": SECTIONS},
        "vision_config": {"embed_dim": 16, "hidden_size": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2},
    },
}


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **NESTED[kind])
    return language_model_class(config).from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()


@pytest.mark.parametrize("kind", NESTED)
def test_loss_and_gradients_are_those_of_the_models_own_logits(small_cache: Path, kind: str) -> None:
    model, (batch,) = make(kind), first_batches(small_cache, OPTIONS, 1)
    check_architecture(model)
    where = positions(model, model, batch.position_ids_BT.long())
    logits = model(input_ids=batch.input_ids_BT.long(), use_cache=False, **where).logits
    wanted = with_gradients(model, loss_of_logits(logits.flatten(0, 1)[batch.flat_positions_P], batch))
    assert_close(with_gradients(model, student_loss(model, batch, train_config())), wanted)
    with Loader(str(small_cache), OPTIONS) as loader:
        assert_close(with_gradients(model, StudentLoss(model, loader)(model, batch)), wanted)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl"])
def test_they_are_trained_evaluated_and_asked(
    small_cache: Path, tiny_model_dir: Path, heldout: Path, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "student"
    make(kind).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    student = {"model": str(folder), "init": "pretrained"}
    measured = {"data": str(heldout), "window": 32, "max_tokens": 60}
    train(run_config(small_cache, folder, tmp_path / "run", student=student, heldout=measured, steps=2), show_progress=False)
    options = EvaluateConfig(
        teacher=str(folder), students={"kd": str(tmp_path / "run")}, data=str(heldout), out=str(tmp_path), max_tokens=60
    )
    assert evaluate(options).results["models"]["kd"]["kl"]["value"] > 0
    with closing(load_teacher(TeacherConfig(model=str(folder), backend="transformers", dtype="float32"))) as teacher:
        assert teacher.identity.vocab_size == TEXT["vocab_size"]
        assert teacher.identity.context_length == TEXT["max_position_embeddings"]
    # New weights of another size: the override is found below text_config.
    smaller = {"model": str(folder), "overrides": {"intermediate_size": 24}}
    model = train(run_config(small_cache, folder, tmp_path / "small", student=smaller, steps=1), show_progress=False).model
    assert AutoConfig.from_pretrained(model).get_text_config().intermediate_size == 24
    arguments = TrainingArguments(str(tmp_path / "hf"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = KDTrainer(make(kind), arguments, cache=str(small_cache), loader=OPTIONS)
    trainer.train()
    trainer.close()


def test_too_small_a_vocabulary_or_context_below_text_config_is_refused(
    small_cache: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    make("gemma3").save_pretrained(tmp_path)
    for overrides, message in (
        ({"vocab_size": 500}, "vocabulary of 500"),
        ({"max_position_embeddings": 8}, "max_position_embeddings is 8"),
        ({"hiden_size": 8}, r"overrides.hiden_size: .* did you mean 'hidden_size'"),
    ):
        student = {"model": str(tmp_path), "tokenizer": str(tiny_model_dir), "overrides": overrides}
        with pytest.raises((MismatchError, ConfigError), match=message):
            train(run_config(small_cache, tiny_model_dir, tmp_path / "run", student=student), show_progress=False)


def test_a_student_without_sdpa_or_packing_trains_as_the_advice_says(
    small_cache: Path, tiny_model_dir: Path, heldout: Path, tmp_path: Path
) -> None:
    config = AutoConfig.for_model("bloom", vocab_size=520, hidden_size=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    student = {"model": str(tmp_path / "bloom"), "init": "pretrained", "tokenizer": str(tiny_model_dir)}
    loader = {"seq_len": 64, "batch_rows": 2, "num_threads": 1}

    def run(student: dict[str, Any], **loader_changes: Any) -> None:
        changes = {"student": student, "loader": loader | loader_changes, "steps": 1}
        train(run_config(small_cache, tiny_model_dir, tmp_path / "run", **changes), show_progress=False)

    with pytest.raises(ConfigError, match=r"student.attention asks for; set it to eager"):
        run(student | {"attention": "sdpa"})
    with pytest.raises(ConfigError, match=r"set loader.packing to none"):
        run(student)
    run(student, packing="none")
    options = EvaluateConfig(
        teacher=str(tiny_model_dir), students={"kd": str(tmp_path / "run")}, data=str(heldout), out=str(tmp_path), max_tokens=60
    )
    assert evaluate(options).results["models"]["kd"]["kl"]["value"] > 0


def test_a_model_that_cannot_read_text_alone_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PaliGemma's mask of images and text fails in its own code."""
    model = make("gemma3")

    def fail(*_: Any, **__: Any) -> Any:
        raise AttributeError("'dict' object has no attribute 'ndim'")

    monkeypatch.setattr(model.model.language_model, "forward", fail)
    with pytest.raises(
        ConfigError, match=r"cannot be run on text alone \(AttributeError: 'dict' object has no attribute 'ndim'"
    ):
        check_architecture(model)
