"""Queries, keys and values of chosen layers of a `transformers` model, before the rotary embedding, taken while it runs.

They are what the layer's projections give, or a norm of queries or keys after them (Qwen 3, Gemma 3), with gradients where the
model has them. It is not known in general that a module called `q_proj` makes the queries: `prove_heads` compares a few with
what the attention function is called with, where only the rotary embedding is between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdcache.errors import ConfigError
from kdcache.teacher.features import HiddenShape, Source, find_decoder, shape_of_fields
from kdcache.teacher.hf.attention_calls import seen_calls

_PROJECTIONS = {"queries": ("q_proj", "wq", "q_lin"), "keys": ("k_proj", "wk", "k_lin"), "values": ("v_proj", "wv", "v_lin")}
_NORMS = {
    "queries": ("q_norm", "q_layernorm", "query_layernorm"), "keys": ("k_norm", "k_layernorm", "key_layernorm"), "values": (),
}  # fmt: skip
_FUSED = ("qkv_proj", "c_attn")
"""What models call one projection that gives queries, keys and values, one after another."""

_PARALLEL = 0.999
"""The least cosine of what must be one vector up to a factor, in the proof: half precision rounds."""


class Tap(NamedTuple):
    """Where states come out of a module: all of its output, or the columns from `start` to `stop`."""

    module: nn.Module
    start: int | None
    stop: int | None


def model_shape(model: Any) -> HiddenShape:
    """The inner states that a model has by its config.

    Raises:
        ConfigError: its config says neither how many layers it has nor how wide they are.
    """
    config = model.config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    shape = shape_of_fields({**config.to_dict(), **{name: getattr(config, name, None) for name in names}})
    if shape is None:
        raise ConfigError(f"features: the config of {type(model).__name__} does not say how many layers of which size it has")
    return shape


@contextmanager
def seen_heads(model: Any, wanted: Iterable[Source]) -> Iterator[dict[Source, Tensor]]:
    """Hold the queries, keys or values of some layers in each forward pass, while the context is open.

    Args:
        model: of transformers.
        wanted: kind (queries, keys, values) and layer, counted from 1.

    Yields:
        A dict that each forward pass fills in: source -> (B, T, heads, numbers per head).

    Raises:
        ConfigError: what gives them is not found in a layer.
    """
    shape = model_shape(model)
    states: dict[Source, Tensor] = {}
    with ExitStack() as stack:
        for source in wanted:
            tap = find_tap(model, source, shape)
            handle = tap.module.register_forward_hook(_hook(states, source, tap, shape))
            stack.callback(handle.remove)
        yield states


def find_tap(model: Any, source: Source, shape: HiddenShape) -> Tap:
    """The module that gives the queries, keys or values of a layer, and which of its columns.

    Raises:
        ConfigError: it is not found.
    """
    kind, layer = source
    found = find_decoder(model, shape.num_layers)
    parts = {} if found is None else {name.rpartition(".")[2]: part for name, part in found[1][layer - 1].named_modules()}
    projection = next((parts[name] for name in _PROJECTIONS[kind] if name in parts), None)
    norm = next((parts[name] for name in _NORMS[kind] if _acts(parts.get(name))), None)
    if projection is not None:
        return Tap(projection if norm is None else norm, None, None)
    fused = next((parts[name] for name in _FUSED if name in parts), None)
    if fused is None or norm is not None or not (shape.num_heads and shape.num_kv_heads and shape.head_dim):
        raise ConfigError(
            f"features: the {kind} of layer {layer} of {type(model).__name__} are not where kdcache looks for them; "
            "use kind hidden"
        )
    first, other = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    start, stop = {"queries": (0, first), "keys": (first, first + other), "values": (first + other, first + 2 * other)}[kind]
    return Tap(fused, start, stop)


@torch.no_grad()
def prove_heads(model: Any, wanted: Iterable[Source], ids_1T: Tensor) -> None:
    """Compare with what the attention function gets on a few tokens: rotated by nothing at the first, and never longer.

    Raises:
        ConfigError: they differ, or the model does not call transformers' attention functions.
    """
    wanted = list(wanted)
    with seen_heads(model, wanted) as states, seen_calls(model, sorted({layer for _, layer in wanted})) as calls:
        model(input_ids=ids_1T, use_cache=False)
    for kind, layer in wanted:
        if layer not in calls or (kind, layer) not in states:
            raise ConfigError(
                f"features: {type(model).__name__} does not show the {kind} of layer {layer}: it has an attention of its own; "
                "use kind hidden"
            )
        taken_Thd = states[kind, layer][0].float()
        given_Thd = calls[layer].tensor_of(kind)[0].transpose(0, 1).float()
        if not (taken_Thd.shape == given_Thd.shape and _is_same_unrotated(taken_Thd, given_Thd, kind)):
            raise ConfigError(
                f"features: what looks like the {kind} of layer {layer} of {type(model).__name__} is not what its attention "
                "gets; use kind hidden"
            )


def _is_same_unrotated(taken_Thd: Tensor, given_Thd: Tensor, kind: str) -> bool:
    if kind == "values":
        return bool(torch.equal(taken_Thd, given_Thd))
    first = torch.nn.functional.cosine_similarity(taken_Thd[0], given_Thd[0], dim=-1)
    lengths_Th = given_Thd.norm(dim=-1) / taken_Thd.norm(dim=-1).clamp_min(1e-30)
    spread = lengths_Th / lengths_Th.mean() - 1
    return bool((first > _PARALLEL).all() and (spread.abs() < 1 - _PARALLEL + 0.02).all())


def _hook(states: dict[Source, Tensor], source: Source, tap: Tap, shape: HiddenShape) -> Any:
    heads = shape.heads_of(source[0])

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        given: Tensor = output if isinstance(output, Tensor) else output[0]
        if given.dim() == 4:  # a norm of each head; some models have turned them round before
            states[source] = given if given.shape[2] == heads else given.transpose(1, 2)
            return
        given = given[..., tap.start : tap.stop]
        states[source] = given.unflatten(-1, (heads or 1, -1))

    return hook


def _acts(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)
