"""What is read off a student's layers in its own forward is what the model makes there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from adapter_cases import FOUR_ROWS, first_batches, make_student
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from kdcache.errors import ConfigError
from kdcache.train.body import hidden_states
from kdcache.train.terms.base import Read
from kdcache.train.terms.inner import check_reads, complete, reading

HEADS: list[Read] = [("queries", 1), ("keys", 2), ("values", 2)]


def qwen() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=520, num_key_value_heads=2, head_dim=8, **sizes))


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=520, n_embd=32, n_layer=2, n_head=4))


def read(model: PreTrainedModel, reads: list[Read], ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> dict[Read, Any]:
    check_reads(model, reads)
    with reading(model, reads) as seen:
        hidden_BTH = hidden_states(model, ids_BT, positions_BT)
    return complete(seen, reads, hidden_BTH)


@pytest.mark.parametrize("make", [lambda: make_student(num_hidden_layers=2), qwen, gpt2], ids=["llama", "qwen3", "gpt2"])
def test_layers_are_those_of_output_hidden_states_and_the_last_one_is_before_the_norm(make: Any) -> None:
    model = make().eval()
    ids_1T, positions_1T = torch.arange(7)[None], torch.arange(7)[None]
    found = read(model, [("hidden", layer) for layer in (0, 1, 2, -1)], ids_1T, positions_1T)
    expected = model(input_ids=ids_1T, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        assert torch.equal(found["hidden", layer], expected[layer])
    assert torch.equal(found["hidden", -1], expected[2])
    assert not torch.allclose(found["hidden", 2], expected[2])
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    assert torch.equal(norm(found["hidden", 2]), expected[2])


@pytest.mark.parametrize(("make", "kv_heads"), [(qwen, 2), (gpt2, 4)], ids=["qwen3", "gpt2"])
def test_heads_have_gradients_and_are_what_the_layer_attends_with(make: Any, kv_heads: int) -> None:
    model = make().train()
    ids_1T = torch.arange(7)[None]
    found = read(model, HEADS, ids_1T, ids_1T)
    assert [tuple(found[one].shape) for one in HEADS] == [(1, 7, 4, 8), (1, 7, kv_heads, 8), (1, 7, kv_heads, 8)]
    found["queries", 1].square().sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_attention_of_packed_rows_is_read_without_a_change_of_the_model(small_cache: Path) -> None:
    (batch,) = first_batches(small_cache, FOUR_ROWS, 1)
    model, reads = make_student(num_hidden_layers=2), [("attention", 2)]
    alone = hidden_states(model, batch.input_ids_BT, batch.position_ids_BT)
    check_reads(model, reads)
    with reading(model, reads) as seen:
        with_call = hidden_states(model, batch.input_ids_BT, batch.position_ids_BT)
    assert torch.equal(alone, with_call)
    call = complete(seen, reads, with_call)["attention", 2]
    given_hTT = call.probabilities(0, torch.arange(batch.input_ids_BT.shape[1]))
    segments_T = batch.segment_ids_BT[0]
    across_TT = (segments_T[:, None] != segments_T[None]) & (segments_T[:, None] > 0)
    assert across_TT.any()
    assert not given_hTT[:, across_TT].any(), "no attention crosses documents"
    torch.testing.assert_close(given_hTT[:, segments_T > 0].sum(dim=-1), torch.ones(2, int((segments_T > 0).sum())))


def test_layers_that_there_are_not_are_refused_in_one_sentence() -> None:
    model = make_student()
    with pytest.raises(ConfigError, match="queries of layer 2 of the student, but the student has layers 1 to 1"):
        check_reads(model, [("queries", 2)])
    with pytest.raises(
        ConfigError,
        match="hidden states of layer 2 of the student, but the student has layers 0 to 1, and -1 after the final norm",
    ):
        check_reads(model, [("hidden", 2)])


def test_queries_that_are_not_where_they_are_looked_for_are_refused_in_one_sentence() -> None:
    model = make_student()
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda module, *_: setattr(module, "q_proj", module.hidden[0]))
    attention.hidden, attention.q_proj = [attention.q_proj], torch.nn.Identity()
    with pytest.raises(ConfigError, match="reads queries of layer 1 of the student, which cannot be read"):
        check_reads(model, [("queries", 1)])


def test_states_inside_a_checkpointed_layer_need_the_other_way_of_checkpointing() -> None:
    ids_1T = torch.arange(7)[None]
    for reentrant in (False, True):
        model = make_student().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        if reentrant:
            with pytest.raises(ConfigError, match=r"no gradient: turn gradient checkpointing on with .*use_reentrant': False"):
                read(model, [("queries", 1)], ids_1T, ids_1T)
        else:
            read(model, [("queries", 1)], ids_1T, ids_1T)["queries", 1].sum().backward()
            assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
