"""Students with adapters of peft: also where the output projection itself is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import OPTIONS, first_batches, make_student
from test_student_heads import assert_close, loss_of_logits, with_gradients

from kdcache.errors import ConfigError
from kdcache.loader.loader import Loader
from kdcache.train.adapters import StudentLoss

peft = pytest.importorskip("peft")


def adapted(**options: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(make_student(), peft.LoraConfig(r=4, init_lora_weights=False, **options))


@pytest.mark.parametrize("saved", [None, ["lm_head"], ["lm_head", "embed_tokens"]])
def test_loss_and_gradients_are_those_of_the_models_own_logits(small_cache: Path, saved: list[str] | None) -> None:
    model, (batch,) = adapted(target_modules=["q_proj"], modules_to_save=saved), first_batches(small_cache, OPTIONS, 1)
    ids_BT, positions_BT = batch.input_ids_BT.long(), batch.position_ids_BT.long()
    logits = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
    wanted = with_gradients(model, loss_of_logits(logits.flatten(0, 1)[batch.flat_positions_P], batch))
    with Loader(str(small_cache), OPTIONS) as loader:
        found = with_gradients(model, StudentLoss(model, loader)(model, batch))
    assert_close(found, wanted)
    is_trained = any("lm_head" in name and p.grad is not None for name, p in model.named_parameters())
    assert is_trained == (saved is not None)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_an_adapter_on_the_projection_is_refused_with_what_to_do(small_cache: Path, options: dict[str, Any]) -> None:
    model = adapted(target_modules=["q_proj", "lm_head"], **options)
    with (
        Loader(str(small_cache), OPTIONS) as loader,
        pytest.raises(ConfigError, match="name lm_head in modules_to_save instead of target_modules"),
    ):
        StudentLoss(model, loader)
