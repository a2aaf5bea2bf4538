"""A model of its own, with another's weights in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.errors import ConfigError
from kdcache.shown import first_line
from kdcache.teacher.features import find_decoder
from kdcache.train.body import text_config
from kdcache.train.init.shape import config_with_layers


@torch.no_grad()
def built(
    like: PreTrainedModel, config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model of the same class, attention, device and mode of generation, with copies of these weights.

    Args:
        like: in evaluation mode.
        config: of the new model; taken over.
        weights: every one that the new model has.
        dtype: of the new model; None for that of `like`.
    """
    state = torch.get_rng_state()
    try:
        attention = text_config(like)._attn_implementation
        model = type(like)._from_config(config, dtype=dtype or like.dtype, attn_implementation=attention)
    finally:
        torch.set_rng_state(state)  # random weights, which are replaced at once, took numbers from it
    model.load_state_dict(weights, strict=True)
    model.generation_config = like.generation_config
    return model.to(like.device).eval()  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def with_layers(teacher: PreTrainedModel, kept: Sequence[int], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of some of another's layers, with copies of their weights.

    Raises:
        ConfigError: the architecture cannot be built with these layers.
    """
    config = config_with_layers(teacher.config, kept)
    try:
        return built(teacher, config, kept_weights(teacher, kept), dtype)
    except ConfigError:
        raise
    except Exception as error:  # of the model's own code
        raise ConfigError(
            f"student.layers: {type(teacher).__name__} cannot be built with {len(kept)} of its layers: {first_line(error)}"
        ) from error


def kept_weights(teacher: PreTrainedModel, kept: Sequence[int]) -> dict[str, Tensor]:
    """The teacher's own tensors, those of its layers under their new indices; not copies."""
    prefix = layers_prefix(teacher)
    new_index = {layer: new for new, layer in enumerate(kept)}
    weights: dict[str, Tensor] = {}
    for name, tensor in teacher.state_dict().items():
        if not name.startswith(prefix):
            weights[name] = tensor
            continue
        layer, _, rest = name.removeprefix(prefix).partition(".")
        if int(layer) in new_index:
            weights[f"{prefix}{new_index[int(layer)]}.{rest}"] = tensor
    return weights


def layers_prefix(model: Any) -> str:
    """How the names of the weights of the layers begin, as in `model.layers.`.

    Raises:
        ConfigError: the layers are not found.
    """
    layers = layer_modules(model)
    return next(name for name, module in model.named_modules() if module is layers) + "."


def layer_modules(model: Any) -> Any:
    """The list of the model's layers; raises ConfigError where it is not found."""
    found = find_decoder(model, int(text_config(model).num_hidden_layers))
    if found is None:
        raise ConfigError(
            f"student.init: the layers of {type(model).__name__} are not found, so no student can be cut from it; "
            "use init pretrained or random"
        )
    return found[1]
