"""The configuration of a model with some of another's layers.

What a configuration says of single layers comes in four forms, told apart by name and value, not by architecture. Whether all
of it was found is asked of the finished student (`proof`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from kdcache.errors import ConfigError
from kdcache.shown import first_line

_FIRST_LAYERS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "num_hash_layers")
"""Fields that say how many layers from the first are of one kind."""

_LAST_LAYERS = ("num_kv_shared_layers",)
"""Fields that say how many layers up to the last are of one kind."""

_OF_TOKENS = ("token_id", "token_ids", "architectures")
"""How the names of fields end whose lists are never about layers."""


def config_with_layers(config: Any, kept: Sequence[int]) -> Any:
    """A copy of a configuration for these layers only.

    Args:
        config: of transformers; what speaks of text may lie below `text_config`.
        kept: the layers, counted from 0, ascending.

    Raises:
        ConfigError: the configuration cannot describe them.
    """
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    num_layers = int(text.num_hidden_layers)
    if len(kept) == num_layers:
        return changed
    fields = text.to_dict()
    try:
        for name in fields:
            value = getattr(text, name, None)
            subset = _subset(name, value, kept, num_layers)
            if subset != value:
                setattr(text, name, subset)
        text.num_hidden_layers = len(kept)
        type(config).from_dict(changed.to_dict())
    except Exception as error:  # whatever a configuration class checks
        raise ConfigError(
            f"student.layers: {type(text).__name__} cannot describe layers {', '.join(map(str, kept))} of {num_layers}: "
            f"{first_line(error)}"
        ) from error
    return changed


def _subset(name: str, value: Any, kept: Sequence[int], num_layers: int) -> Any:
    """What a field says of the layers that are kept, renumbered; the value itself where it says nothing of single layers."""
    if name.endswith(_OF_TOKENS) or isinstance(value, bool):
        return value
    if name in _FIRST_LAYERS and isinstance(value, int):
        return sum(layer < value for layer in kept)
    if name in _LAST_LAYERS and isinstance(value, int):
        return sum(layer >= num_layers - value for layer in kept)
    if isinstance(value, list | tuple) and _are_indices(name, value, num_layers):
        return type(value)(new for new, layer in enumerate(kept) if layer in value)
    if isinstance(value, list | tuple) and len(value) == num_layers:
        return type(value)(value[layer] for layer in kept)
    if isinstance(value, dict) and _are_keys(name, value, num_layers):
        width = len(next(iter(value)))
        by_layer = {int(key): entry for key, entry in value.items()}
        return {f"{new:0{width}d}": by_layer[layer] for new, layer in enumerate(kept) if layer in by_layer}
    return value


def _are_indices(name: str, value: Sequence[Any], num_layers: int) -> bool:
    """Whether a list names layers by number (`moe_layers`, `mlp_only_layers`), instead of saying something of each."""
    if not value or not all(type(entry) is int for entry in value) or not any(part in name for part in ("layer", "idx", "ind")):
        return False
    is_ascending = all(a < b for a, b in pairwise(value))
    return is_ascending and value[0] >= 0 and value[-1] < num_layers and (len(value) < num_layers or num_layers > 2)


def _are_keys(name: str, value: dict[Any, Any], num_layers: int) -> bool:
    return "layer" in name and bool(value) and all(isinstance(k, str) and k.isdigit() and int(k) < num_layers for k in value)
