"""Hidden states of chosen layers of a `transformers` model, taken by hooks while it runs; no other layer's are held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.errors import ConfigError
from kdcache.format.manifest import FeatureInfo
from kdcache.teacher.features import HiddenShape, find_decoder, layers_of

PROBE_TOKENS = 8

LayerVectors = dict[int, NDArray[np.float32]]
"""Layer -> (P, H)."""


def hidden_shape(model: Any) -> HiddenShape:
    """The hidden states that a model has by its config."""
    config = model.config.get_text_config()
    return HiddenShape(int(config.num_hidden_layers), int(config.hidden_size))


def needed_layers(model: Any, features: Sequence[FeatureInfo]) -> list[int]:
    """The layers to watch, ascending.

    Raises:
        ConfigError: a layer before the last, of a model whose layers are not found, or do not give what
            `output_hidden_states` gives on a few tokens, which is the definition.
    """
    layers = layers_of(features)
    last = hidden_shape(model).num_layers
    if any(layer < last for layer in layers):
        _prove(model, [layer for layer in layers if layer < last])
    return layers


@contextmanager
def seen_layers(model: Any, layers: Sequence[int], *, head: bool) -> Iterator[dict[int, Tensor]]:
    """Hold what these layers give in each forward pass, (B, T, H), while the context is open.

    Args:
        model: of transformers.
        layers: 0 for the embeddings, and so on.
        head: whether to watch the last layer, too, as what the output projection takes.
    """
    states: dict[int, Tensor] = {}
    last = hidden_shape(model).num_layers
    handles = [_watch(model, layer, states) for layer in layers if layer < last]
    if head and last in layers:
        handles.append(_before(model.get_output_embeddings(), last, states))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def vectors_at(states: Mapping[int, Tensor], layers: Sequence[int], index_C: Tensor) -> LayerVectors:
    """The vectors at some flat positions of a batch, of each layer, on the host in float32."""
    flat = {layer: states[layer].reshape(-1, states[layer].shape[-1]) for layer in layers}
    return {layer: flat[layer][index_C.to(flat[layer].device)].float().cpu().numpy() for layer in layers}


def joined(parts: Sequence[LayerVectors]) -> LayerVectors:
    """Join the vectors of chunks, in order."""
    return {layer: np.concatenate([part[layer] for part in parts]) for layer in parts[0]} if parts else {}


def _watch(model: Any, layer: int, states: dict[int, Tensor]) -> Any:
    found = find_decoder(model, hidden_shape(model).num_layers)
    if found is None:
        raise ConfigError(
            f"features: the layers of {type(model).__name__} are not found, so only the last one is available; set layer to -1"
        )
    _, modules = found
    if layer == 0:
        return _before(modules[0], 0, states)

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        states[layer] = output if isinstance(output, Tensor) else output[0]

    return modules[layer - 1].register_forward_hook(hook)


def _before(module: nn.Module, layer: int, states: dict[int, Tensor]) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        states[layer] = args[0] if args else kwargs["hidden_states"]

    return module.register_forward_pre_hook(hook, with_kwargs=True)


@torch.inference_mode()
def _prove(model: Any, layers: Sequence[int]) -> None:
    ids_1T = (torch.arange(PROBE_TOKENS, device=model.device) + 1)[None] % model.config.get_text_config().vocab_size
    expected = model(input_ids=ids_1T, use_cache=False, output_hidden_states=True).hidden_states
    with seen_layers(model, layers, head=False) as states:
        model(input_ids=ids_1T, use_cache=False)
    for layer in layers:
        if expected is None or layer not in states or not torch.equal(states[layer], expected[layer]):
            raise ConfigError(
                f"features: what layer {layer} of {type(model).__name__} gives is not what output_hidden_states gives; "
                "set layer to -1, which is available"
            )
