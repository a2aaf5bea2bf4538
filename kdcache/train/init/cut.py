"""A student made of some of its teacher's layers, with copies of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.config.cut import LayersConfig
from kdcache.errors import ConfigError
from kdcache.shown import first_line
from kdcache.teacher.features import find_decoder
from kdcache.train.body import text_config
from kdcache.train.init.layers import chosen_layers
from kdcache.train.init.proof import prove_layers
from kdcache.train.init.shape import config_with_layers


def cut_student(teacher: PreTrainedModel, layers: LayersConfig | None) -> PreTrainedModel:
    """The student: a model of its own, in the teacher's dtype, in evaluation mode.

    Args:
        teacher: in evaluation mode; it is not changed.
        layers: which of its layers are kept; None for all.

    Raises:
        ConfigError: the teacher does not have these layers, or what they make is not the teacher with the others skipped.
    """
    kept = chosen_layers(layers, int(text_config(teacher).num_hidden_layers))
    student = _with_layers(teacher, kept)
    prove_layers(teacher, student, kept)
    return student


@torch.no_grad()
def _with_layers(teacher: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    config = config_with_layers(teacher.config, kept)
    attention = text_config(teacher)._attn_implementation
    generator = torch.get_rng_state()
    try:
        student = type(teacher)._from_config(config, dtype=teacher.dtype, attn_implementation=attention)
        student.load_state_dict(kept_weights(teacher, kept), strict=True)
    except Exception as error:  # of the model's own code
        raise ConfigError(
            f"student.layers: {type(teacher).__name__} cannot be built with {len(kept)} of its layers: {first_line(error)}"
        ) from error
    finally:
        torch.set_rng_state(generator)  # the random weights that were just replaced took numbers from it
    student.generation_config = teacher.generation_config
    return student.to(teacher.device).eval()  # pyright: ignore[reportArgumentType]


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
