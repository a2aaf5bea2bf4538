from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_caches import load_teacher_model
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from kdcache.errors import ConfigError
from kdcache.loss.chunks import Head
from kdcache.train.packed import (
    check_architecture,
    has_head,
    hidden_states,
    keeps_documents_apart,
    logits_head,
    output_projection,
)

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> PreTrainedModel:
    return load_teacher_model(tiny_model_dir)


def _packed(*documents: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [token for document in documents for token in document]
    positions = [position for document in documents for position in range(len(document))]
    padding = [0] * (length - len(ids))
    return torch.tensor([ids + padding]), torch.tensor([positions + padding])


@torch.no_grad()
def test_each_document_of_a_packed_row_is_as_it_is_alone(model: PreTrainedModel) -> None:
    documents = [[5, 9, 300, 4], [7], [8, 8, 2], [100, 3]]
    packed = hidden_states(model, *_packed(*documents, length=16))[0]
    start = 0
    for document in documents:
        alone = hidden_states(model, *_packed(document, length=len(document)))[0]
        torch.testing.assert_close(packed[start : start + len(document)], alone, rtol=1e-5, atol=1e-5)
        start += len(document)


@torch.no_grad()
def test_another_document_in_the_row_changes_no_bit_of_its_neighbour(model: PreTrainedModel) -> None:
    one = hidden_states(model, *_packed([5, 9, 300, 4], [8, 8, 2], length=12))[0]
    other = hidden_states(model, *_packed([6, 1, 30, 40], [8, 8, 2], length=12))[0]
    assert not torch.equal(one[:4], other[:4])
    assert torch.equal(one[4:7], other[4:7])


@torch.no_grad()
def test_inside_a_document_attention_is_causal(model: PreTrainedModel) -> None:
    one = hidden_states(model, *_packed([5, 9, 300, 4], length=4))[0]
    other = hidden_states(model, *_packed([5, 9, 300, 77], length=4))[0]
    assert torch.equal(one[:3], other[:3])
    assert not torch.equal(one[3], other[3])


@torch.no_grad()
def test_sliding_windows_stay_inside_documents_too() -> None:
    torch.manual_seed(0)
    assert keeps_documents_apart(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=3)).eval())


def test_a_model_that_mixes_documents_is_refused(model: PreTrainedModel) -> None:
    class Mixing:
        """Adds up the embeddings of all tokens before, whatever the position ids say."""

        config, device, training = model.config, model.device, False
        named_parameters = named_buffers = modules = staticmethod(lambda: ())

        @staticmethod
        def base_model(*, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(last_hidden_state=model.get_input_embeddings()(input_ids).cumsum(dim=1))

        def eval(self) -> None: ...

    assert not keeps_documents_apart(Mixing())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="Mixing lets packed documents see each other"):
        check_architecture(Mixing())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("cap", [None, 30.0])
def test_a_soft_cap_is_seen_even_where_logits_are_small(cap: float | None) -> None:
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=cap)).eval()
    assert logits_head(capped) == Head(softcap=cap)
    assert has_head(capped, Head(softcap=cap))
    assert not has_head(capped, Head(softcap=30.0 if cap is None else None))
    check_architecture(capped)


def test_logits_made_in_a_way_that_the_configuration_does_not_say_are_refused() -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=None))
    model.config.logit_scale = 0.5
    with pytest.raises(ConfigError, match="the logits of Gemma2ForCausalLM are not its output projection"):
        check_architecture(model)


def test_looking_at_the_head_changes_no_bit_of_it(model: PreTrainedModel) -> None:
    before = output_projection(model).weight.clone()
    assert has_head(model, Head())
    assert torch.equal(output_projection(model).weight, before)
