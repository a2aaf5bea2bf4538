"""StudentLoss: the loss through a whole model's forward is the loss of its parts; what it cannot do is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import OPTIONS, first_batches, make_student
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM

from kdcache import half_precision
from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError, LossError, MismatchError
from kdcache.loader.loader import Loader
from kdcache.loss.fused import Projection
from kdcache.loss.prepare import LossSettings
from kdcache.loss.sparse_kd import sparse_kd_loss
from kdcache.train.adapters import StudentLoss
from kdcache.train.terms import divergence


def loss_of(cache: Path, model: nn.Module, **config: Any) -> StudentLoss:
    with Loader(cache, OPTIONS) as loader:
        return StudentLoss(model, loader, LossConfig(**config))


@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_the_loss_and_its_gradients_are_those_of_the_logits(small_cache: Path, tail: str) -> None:
    model, (batch,) = make_student(), first_batches(small_cache, OPTIONS, 1)
    logits = model(input_ids=batch.input_ids_BT.long(), position_ids=batch.position_ids_BT.long(), use_cache=False).logits
    settings = LossSettings(tail=tail, backend="torch")
    wanted = sparse_kd_loss(logits.flatten(0, 1)[batch.flat_positions_P], batch.teacher, settings=settings)
    wanted.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss = loss_of(small_cache, model, tail=tail)(model, batch)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    for ours, theirs in zip([p.grad for p in model.parameters()], gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert "forward" not in vars(model.lm_head), "the model is as it was"


class Shapes(TorchDispatchMode):
    """The shapes of all that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)}
        return result


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_logits_of_all_positions_never_exist(small_cache: Path, backend: str) -> None:
    model, (batch,) = make_student(), first_batches(small_cache, OPTIONS, 1)
    ours = loss_of(small_cache, model, backend=backend, chunk_positions=16)
    with Shapes() as shapes:
        ours(model, batch).backward()
    rows = [shape[:-1] for shape in shapes.seen if shape and shape[-1] == 520]
    assert len(batch.flat_positions_P) > 64
    assert max(torch.Size(shape).numel() for shape in rows) <= 32 < 64, "the transposed weight has 32 rows"


def test_the_loss_of_emulated_half_precision_is_taken_in_float32_and_the_layers_are_warned_of_once(
    small_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under autocast with the float32 weights themselves, so no half copy of the projection is made."""
    monkeypatch.setattr(half_precision, "float32_gain", lambda dtype: 50.0)
    half_precision._warn.cache_clear()
    model, (batch,) = make_student(), first_batches(small_cache, OPTIONS, 1)
    ours, asked = loss_of(small_cache, model), []
    real = divergence.fused_sparse_kd_loss

    def noted(hidden_PH: torch.Tensor, projection: Projection, *rest: Any, **more: Any) -> torch.Tensor:
        asked.append((hidden_PH.dtype, projection.weight_VH is model.lm_head.weight))
        return real(hidden_PH, projection, *rest, **more)

    monkeypatch.setattr(divergence, "fused_sparse_kd_loss", noted)
    single = ours(model, batch).item()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = ours(model, batch)
        loss.backward()
    assert asked == [(torch.float32, True)] * 3
    assert model.lm_head.weight.grad is not None
    assert loss.item() == pytest.approx(single, rel=1e-2)
    (message,) = (record.getMessage() for record in caplog.records if "emulates" in record.getMessage())
    assert "only emulates bfloat16" in message
    assert "a student in float32, without autocast, runs that much faster" in message


def test_students_that_would_be_trained_wrongly_are_refused(small_cache: Path) -> None:
    gemma: dict[str, Any] = {"num_hidden_layers": 1, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    capped = Gemma2ForCausalLM(Gemma2Config(vocab_size=520, hidden_size=32, intermediate_size=48, **gemma))
    capped.config.logits_scaling = 2.0  # of which its forward knows nothing
    with pytest.raises(ConfigError, match="the loss knows nothing else"):
        loss_of(small_cache, capped)
    with pytest.raises(MismatchError, match=r"vocabulary of 511 cannot hold the 512 token ids .* resize_token_embeddings"):
        loss_of(small_cache, make_student(vocab_size=511))
    with pytest.raises(LossError):
        loss_of(small_cache, make_student(), divergence="tail_aware_kl")


def test_a_model_that_passes_its_projection_by_is_refused(small_cache: Path) -> None:
    model, (batch,) = make_student(), first_batches(small_cache, OPTIONS, 1)
    ours = loss_of(small_cache, model)
    model.forward = lambda **_: {"logits": torch.zeros(2, 64, 520)}
    with pytest.raises(ConfigError, match="without calling its output projection as a module"):
        ours(model, batch)
