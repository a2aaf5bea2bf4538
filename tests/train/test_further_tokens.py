"""Heads of further tokens: the positions they learn from, their loss by its definition, and that the model keeps them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

pytest.importorskip("transformers")

from adapter_cases import OPTIONS, first_batches
from safetensors.torch import load_file
from train_caches import train_config

from kdcache.config.load import convert_config
from kdcache.config.train import LossConfig
from kdcache.errors import LossError
from kdcache.loader.cache import open_cache
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.fused import Projection
from kdcache.loss.prepare import LossSettings
from kdcache.loss.sparse_kd import sparse_kd_loss
from kdcache.train.terms.base import Setting, StudentStates
from kdcache.train.terms.further_tokens import FurtherTokens, positions_ahead
from kdcache.train.trainer import train

HIDDEN = 6


@pytest.fixture(scope="module")
def batch(small_cache: Path) -> TorchBatch:
    return first_batches(small_cache, OPTIONS, 1)[0]


def setting(cache: Path, batch: TorchBatch) -> Setting:
    manifest = open_cache(cache).manifest
    return Setting(
        manifest=manifest, sidecar=lambda name: {}, pooled_features=lambda name: None, hidden_size=HIDDEN,  # pyright: ignore[reportArgumentType]
        num_layers=1, num_heads=1, num_kv_heads=1, head_dim=HIDDEN,
        vocab_size=manifest.identity.teacher.vocab_size, num_sequences=1, seed=0, device=torch.device("cpu"),
    )  # fmt: skip


def states(cache: Path, batch: TorchBatch, seed: int = 0) -> StudentStates:
    random = torch.Generator().manual_seed(seed)
    size = open_cache(cache).manifest.identity.teacher.vocab_size
    weight_VH = torch.randn(size, HIDDEN, generator=random).requires_grad_()
    hidden_PH = torch.randn(len(batch.flat_positions_P), HIDDEN, generator=random).requires_grad_()
    return StudentStates(hidden_PH, Projection(weight_VH))


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_a_position_is_paired_with_one_of_its_own_sequence(batch: TorchBatch, ahead: int) -> None:
    """The definition: slot by slot, over the rows."""
    slots, segments = batch.flat_positions_P.tolist(), batch.segment_ids_BT.flatten().tolist()
    num_slots = batch.segment_ids_BT.shape[1]
    expected = [
        (p, slots.index(slot + ahead))
        for p, slot in enumerate(slots)
        if slot + ahead in slots
        and slot // num_slots == (slot + ahead) // num_slots
        and segments[slot] == segments[slot + ahead]
    ]
    here, there = positions_ahead(batch, ahead)
    assert list(zip(here.tolist(), there.tolist(), strict=True)) == expected
    assert expected


def test_the_loss_is_that_of_later_rows_position_by_position(small_cache: Path, batch: TorchBatch) -> None:
    term, student = FurtherTokens(num_heads=2, decay=0.5), states(small_cache, batch)
    term.set_up(setting(small_cache, batch))
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    weights_P = torch.rand(len(batch.flat_positions_P), generator=torch.Generator().manual_seed(4))
    total, count = torch.zeros(()), 0.0
    for ahead, head in enumerate(term.heads, start=1):
        for p, later in zip(*(found.tolist() for found in positions_ahead(batch, ahead)), strict=True):
            hidden = student.hidden_PH[p] + torch.nn.functional.silu(head(student.hidden_PH[p]))
            logits_PV = (student.projection.weight_VH @ hidden)[None]
            settings = LossSettings(reduction="sum", backend="torch")
            loss = sparse_kd_loss(logits_PV, batch.teacher.slice(later, later + 1), settings=settings)
            total = total + 0.5**ahead * weights_P[later] * loss
            count += 0.5**ahead * float(weights_P[later])
    mine = term(student, batch, weights_P)
    torch.testing.assert_close(mine, total, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(float(term.count(batch, weights_P)), count, rtol=1e-5, atol=1e-5)
    wanted = [student.hidden_PH, student.projection.weight_VH, *term.parameters()]
    for ours, theirs in zip(torch.autograd.grad(mine, wanted), torch.autograd.grad(total, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_heads_alone_can_be_trained(small_cache: Path, batch: TorchBatch) -> None:
    term, student = FurtherTokens(train_student=False), states(small_cache, batch)
    term.set_up(setting(small_cache, batch))
    loss = term(student, batch, batch.weights_P)
    slopes = torch.autograd.grad(loss, [student.hidden_PH, student.projection.weight_VH], allow_unused=True)
    assert all(slope is None or not slope.any() for slope in slopes)
    assert all(slope.any() for slope in torch.autograd.grad(term(student, batch, batch.weights_P), list(term.parameters())))


def test_a_batch_without_positions_gives_nothing(small_cache: Path, batch: TorchBatch) -> None:
    term, student = FurtherTokens(), states(small_cache, batch)
    term.set_up(setting(small_cache, batch))
    empty = replace(
        batch, flat_positions_P=batch.flat_positions_P[:0], weights_P=batch.weights_P[:0], teacher=batch.teacher.slice(0, 0)
    )
    nothing = replace(student, hidden_PH=student.hidden_PH[:0])
    assert term(nothing, empty, empty.weights_P).item() == 0
    assert float(term.count(empty, empty.weights_P)) == 0


def test_the_heads_are_kept_with_the_model(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = train_config(small_cache, tiny_model_dir, tmp_path / "run", steps=2)
    loss = convert_config({"terms": [{"term": "further_tokens", "options": {"num_heads": 2}}]}, LossConfig)
    model = train(msgspec.structs.replace(config, loss=loss), show_progress=False).model
    heads = load_file(model / "further_tokens.safetensors")
    assert set(heads) == {f"heads.{j}.{name}" for j in range(2) for name in ("weight", "bias")}
    assert all(tensor.any() for tensor in heads.values())


def test_wrong_options_are_named(small_cache: Path) -> None:
    with pytest.raises(ValueError, match="num_heads is 0"):
        FurtherTokens(num_heads=0)
    with pytest.raises(LossError, match="forward_kll"):
        FurtherTokens(divergence="forward_kll")
