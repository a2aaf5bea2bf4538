"""Students that scale or cap their logits, or have more ids than the cache: the fused loss is that of the model's own logits.

Shape letters: B rows, T tokens per row, P supervised positions, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import ONE_LAYER, OPTIONS, first_batches, make_student
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from kdcache.config.load import convert_config
from kdcache.config.train import LossConfig, TrainConfig
from kdcache.loader.loader import Loader
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.chunks import Head
from kdcache.loss.prepare import LossSettings
from kdcache.loss.sparse_kd import sparse_kd_loss
from kdcache.train.adapters import StudentLoss
from kdcache.train.evaluation.heldout import HeldoutSequence
from kdcache.train.evaluation.scores import heldout_nats_per_token
from kdcache.train.packed import check_architecture, logits_head
from kdcache.train.step import student_loss

VOCAB_SIZE = ONE_LAYER["vocab_size"]
SMALL: dict[str, Any] = ONE_LAYER | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[Any, Any, Head]] = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=3.0), Head(softcap=3.0)),
    "cohere": (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.25), Head(logit_scale=0.25)),
    "granite": (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=4.0), Head(logit_scale=0.25)),
}


def make(name: str) -> PreTrainedModel:
    """With weights that make logits of a few nats: where they are small, a cap does nothing."""
    torch.manual_seed(0)
    kind, config, _ = MODELS[name]
    model = kind(config).train()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def own_logits(model: PreTrainedModel, batch: TorchBatch) -> Tensor:
    """(P, V)"""
    ids_BT, positions_BT = batch.input_ids_BT.long(), batch.position_ids_BT.long()
    return model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits.flatten(0, 1)[batch.flat_positions_P]


def loss_of_logits(logits_PV: Tensor, batch: TorchBatch) -> Tensor:
    return sparse_kd_loss(logits_PV, batch.teacher, settings=LossSettings(backend="torch"))


def train_config(**loss: Any) -> TrainConfig:
    student = {"model": "unused"}
    return convert_config({"cache": "unused", "out": "unused", "steps": 1, "student": student, "loss": loss}, TrainConfig)


def with_gradients(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 * float(other.abs().max()) + 1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_models_own_logits(small_cache: Path, name: str) -> None:
    model, (batch,) = make(name), first_batches(small_cache, OPTIONS, 1)
    check_architecture(model)
    assert logits_head(model) == MODELS[name][2]
    wanted = with_gradients(model, loss_of_logits(own_logits(model, batch), batch))
    for backend in ("numba", "torch"):
        assert_close(with_gradients(model, student_loss(model, batch, train_config(backend=backend))), wanted)
    with Loader(small_cache, OPTIONS) as loader:
        loss_of = StudentLoss(model, loader)
    assert_close(with_gradients(model, loss_of(model, batch)), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_the_heldout_measure_is_that_of_the_models_own_logits(name: str) -> None:
    model, ids_N = make(name).eval(), torch.arange(40) * 7 % VOCAB_SIZE
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(model(input_ids=ids_N[None]).logits[0, :-1], ids_N[1:])
    sequence = HeldoutSequence(ids_N.numpy(), num_bytes=100, text=0)
    assert heldout_nats_per_token(model, [sequence], chunk_positions=16) == pytest.approx(float(wanted), rel=1e-5)


def test_ids_that_the_cache_does_not_have_are_left_out_or_trained_as_asked(small_cache: Path) -> None:
    model, (batch,) = make_student(vocab_size=VOCAB_SIZE + 24), first_batches(small_cache, OPTIONS, 1)
    logits_PV, padding = own_logits(model, batch), slice(VOCAB_SIZE, None)
    wanted = {False: loss_of_logits(logits_PV[:, :VOCAB_SIZE], batch), True: loss_of_logits(logits_PV, batch)}
    for trained, expected in wanted.items():
        with Loader(small_cache, OPTIONS) as loader:
            adapted = StudentLoss(model, loader, LossConfig(train_padding=trained))(model, batch)
        for loss in (student_loss(model, batch, train_config(train_padding=trained)), adapted):
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
            (gradient_VH,) = torch.autograd.grad(loss, model.lm_head.weight)
            assert bool(gradient_VH[padding].any()) == trained
            assert gradient_VH[:VOCAB_SIZE].any()


def test_float32_logits_are_nearer_to_the_loss_without_rounding(small_cache: Path) -> None:
    model, (batch,) = make("granite"), first_batches(small_cache, OPTIONS, 1)
    with Loader(small_cache, OPTIONS) as loader:
        losses = [StudentLoss(model, loader, LossConfig(float32_logits=wanted)) for wanted in (False, True)]
    hidden_BTH = torch.randn((*batch.input_ids_BT.shape, 32), generator=torch.Generator().manual_seed(0)).bfloat16()
    head = losses[0].head
    found = [float(loss.loss(hidden_BTH, head, batch, dtype=torch.bfloat16).detach()) for loss in losses]
    rounded = torch.nn.Linear(32, VOCAB_SIZE, bias=False)
    rounded.weight.data = head.weight.detach().bfloat16().double()
    exact = float(losses[0].loss(hidden_BTH.double(), rounded, batch, dtype=torch.float64).detach())
    assert abs(found[1] - exact) < abs(found[0] - exact) / 10
