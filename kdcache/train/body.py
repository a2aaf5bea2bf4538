"""The parts of a student: its text configuration, the body that makes hidden states, the projection that makes logits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.errors import ConfigError


def text_config(model: PreTrainedModel) -> Any:
    """The part of the configuration that speaks of text: models with eyes or ears keep it below `text_config`."""
    return model.config.get_text_config()


def vocab_size(model: PreTrainedModel) -> int:
    """Ids that the model knows."""
    return int(text_config(model).vocab_size)


def body(model: PreTrainedModel) -> torch.nn.Module:
    """What makes the hidden states: the model without its output projection."""
    base = model.base_model
    if base is not model:
        return base
    # Where a text model was cut out of one with eyes, the base's name leads nowhere (Llama4ForCausalLM).
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, torch.nn.Module) else model.get_decoder()


def hidden_states(model: PreTrainedModel, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """(B, T, H) what the output projection reads, for packed rows.

    Without an attention mask and a cache of keys, transformers starts a new document wherever position_ids do not rise by
    one and masks attention (also in sliding-window layers) to the document; `check_architecture` tests that it did.
    """
    inner = body(model)
    return inner(input_ids=input_ids_BT, use_cache=False, **positions(model, inner, position_ids_BT)).last_hidden_state


def positions(model: PreTrainedModel, called: torch.nn.Module, position_ids_BT: Tensor) -> dict[str, Tensor]:
    """The argument that tells a module of the model where its tokens are; none for modules that take none (alibi, states).

    Rotations in sections (of time, height and width) are told apart from packed documents by a leading row of text positions.
    """
    # The class's forward: a library may have put a wrapper with other arguments into the module itself.
    if "position_ids" not in inspect.signature(getattr(type(called), "forward", called)).parameters:
        return {}
    if _has_sections(model):
        return {"position_ids": position_ids_BT.expand(4, *position_ids_BT.shape)}
    return {"position_ids": position_ids_BT}


def output_projection(model: PreTrainedModel) -> torch.nn.Linear:
    """(V, H) weight and perhaps a bias: what makes logits of hidden states.

    Raises:
        ConfigError: the model has none.
    """
    head: Any = model.get_output_embeddings()
    # The copy that is trained, where peft was told to train and save the projection whole.
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, torch.nn.ModuleDict):
        head = copies[head.active_adapter]
    if hasattr(head, "base_layer"):
        raise ConfigError(
            "the output projection has an adapter of its own (LoRA with lm_head among target_modules), and the fused loss "
            "reads one weight: name lm_head in modules_to_save instead of target_modules, which trains it whole, or leave it"
        )
    if not isinstance(head, torch.nn.Linear):
        raise ConfigError(f"{type(model).__name__} has no linear output projection; expected a causal language model")
    return head


def model_size(model: PreTrainedModel) -> dict[str, int]:
    """`parameters`: of the whole model, shared ones once; `non_embedding`: without the embeddings and output projection."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(weight): weight for module in embeddings if module is not None for weight in module.parameters()}
    total = sum(weight.numel() for weight in model.parameters())
    return {"parameters": total, "non_embedding": total - sum(weight.numel() for weight in tables.values())}


def _has_sections(model: PreTrainedModel) -> bool:
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return "mrope_section" in rope
