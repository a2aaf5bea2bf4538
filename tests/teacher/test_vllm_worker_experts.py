"""The worker route with another kind of model: a mixture of experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from contracts.teacher import TeacherCase, random_sequences, score, top_k
from dense_forward import dense_forward

from kdcache.config.teacher import TeacherConfig, VllmConfig
from kdcache.teacher import load_teacher

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_experts_give_what_transformers_gives(tmp_path: Path):
    folder = write_mixture(tmp_path / "tiny-mixtral")
    transformers = load_teacher(TeacherConfig(model=str(folder), backend="transformers"))
    teacher = load_teacher(
        TeacherConfig(
            model=str(folder), backend="vllm", vllm=VllmConfig(route="worker"), tokens_per_forward=64, chunk_positions=24
        )
    )
    case = TeacherCase(teacher, dense_forward(folder), 5e-5)
    sequences = random_sequences(case, [100, 3, 40, 1])
    for ours, theirs in zip(score(case, sequences, 32), transformers.score(sequences, top_k(32)), strict=True):
        np.testing.assert_allclose(ours.padded()[1], theirs.padded()[1], atol=5e-5)
        assert (ours.token_ids_E == theirs.token_ids_E).mean() > 0.98
        assert ours.logprobs_E.max() > -4  # of 520 ids: not a flat distribution, which any model would give
    teacher.close()
    transformers.close()


def write_mixture(folder: Path) -> Path:
    """A Mixtral of two layers with four experts, of which each token takes two."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=520, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=256, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.15, dtype="float32",
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder
