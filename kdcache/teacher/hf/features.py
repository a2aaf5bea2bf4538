"""Inner states of a `transformers` model, taken by hooks while it runs; only those of the layers that are wanted are held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.errors import ConfigError
from kdcache.format.feature_positions import feature_positions
from kdcache.format.manifest import FeatureInfo
from kdcache.format.record import TokenSequence, distances_key
from kdcache.teacher.features import ATTENTION, HEADS, HIDDEN, LAST, Source, find_decoder, pooled, source_of, sources_of
from kdcache.teacher.hf.attention_calls import AttentionCall, prove_calls, seen_calls
from kdcache.teacher.hf.heads import model_shape, prove_heads, seen_heads

PROBE_TOKENS = 8

_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm")
"""What models call the norm after their last layer."""

Vectors = dict[str, NDArray[Any]]
"""Feature -> (F, W), as `Distributions.features` has them before they are pooled."""


class Seen(NamedTuple):
    """What is held of a forward pass: source -> (B, T, W), and layer -> the call of its attention function."""

    states: dict[Source, Tensor]
    calls: Mapping[int, AttentionCall]


def needed_sources(model: Any, features: Sequence[FeatureInfo]) -> list[Source]:
    """What to watch for these features, proven on a few tokens.

    Raises:
        ConfigError: a source that the model does not show, or that is not what it is taken for.
    """
    sources = sources_of(features)
    ids_1T = (torch.arange(PROBE_TOKENS, device=model.device) + 1)[None] % model.config.get_text_config().vocab_size
    if inner := [layer for kind, layer in sources if kind == HIDDEN and layer != LAST]:
        _prove_hidden(model, inner, ids_1T)
    if heads := [source for source in sources if source[0] in HEADS]:
        prove_heads(model, heads, ids_1T)
    if layers := [layer for kind, layer in sources if kind == ATTENTION]:
        prove_calls(model, layers, ids_1T)
    return sources


@contextmanager
def seen_sources(model: Any, sources: Sequence[Source], *, head: bool) -> Iterator[Seen]:
    """Hold these states of each forward pass, while the context is open.

    Args:
        model: of transformers.
        sources: kinds and layers.
        head: whether to watch what the output projection takes, too, if it is wanted.
    """
    states: dict[Source, Tensor] = {}
    with ExitStack() as stack:
        for kind, layer in sources:
            if kind == HIDDEN and layer != LAST:
                stack.callback(_watch(model, layer, states).remove)
            elif kind == HIDDEN and head:
                stack.callback(_before(model.get_output_embeddings(), LAST, states).remove)
        heads = stack.enter_context(seen_heads(model, [source for source in sources if source[0] in HEADS]))
        calls = stack.enter_context(seen_calls(model, [layer for kind, layer in sources if kind == ATTENTION]))
        yield Seen(_Joined(states, heads), calls)


class _Joined(dict[Source, Tensor]):
    """Two dicts as one, which are filled in later."""

    def __init__(self, first: dict[Source, Tensor], second: dict[Source, Tensor]) -> None:
        super().__init__()
        self._parts = (first, second)

    def __missing__(self, source: Source) -> Tensor:
        first, second = self._parts
        return first[source] if source in first else second[source].flatten(2)


def vectors_at(seen: Seen, features: Sequence[FeatureInfo], b: int, index_F: Sequence[NDArray[np.int64]]) -> Vectors:
    """The vectors of each feature at some positions of one text of a forward pass, on the host in float32.

    Args:
        seen: what the forward pass showed.
        features: in order.
        b: which text of the batch.
        index_F: for each feature, indices into the tokens of the forward pass.
    """
    found: Vectors = {}
    for feature, here in zip(features, index_F, strict=True):
        if feature.kind == ATTENTION:
            call = seen.calls[feature.layer]
            chosen = torch.from_numpy(here).to(call.query_BhTd.device)
            values, distances = call.top_keys(b, chosen, feature.top_keys or 1)
            found[feature.name], found[distances_key(feature)] = values.cpu().numpy(), distances.cpu().numpy()
            continue
        state_TW = seen.states[source_of(feature)][b]
        found[feature.name] = state_TW[torch.from_numpy(here).to(state_TW.device)].float().cpu().numpy()
    return found


def positions_of(features: Sequence[FeatureInfo], sequence: TokenSequence) -> list[NDArray[np.int64]]:
    """The positions of each feature in a sequence."""
    return [feature_positions(feature, sequence.supervised_N) for feature in features]


def joined(parts: Sequence[Vectors]) -> Vectors:
    """Join the vectors of chunks, in order."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def stored(vectors: Vectors, features: Sequence[FeatureInfo]) -> Vectors:
    """Pool the vectors that are to be pooled."""
    poolings = {feature.name: feature.pooling for feature in features}
    return {name: pooled(values, poolings.get(name, "none")) for name, values in vectors.items()}


def _watch(model: Any, layer: int, states: dict[Source, Tensor]) -> Any:
    _, modules = _decoder(model)
    if layer == 0:
        return _before(modules[0], 0, states)

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        states[HIDDEN, layer] = output if isinstance(output, Tensor) else output[0]

    return modules[layer - 1].register_forward_hook(hook)


def _decoder(model: Any) -> tuple[Any, Any]:
    found = find_decoder(model, model_shape(model).num_layers)
    if found is None:
        raise ConfigError(
            f"features: the layers of {type(model).__name__} are not found, so only the last one is available; set layer to -1"
        )
    return found


def _before(module: nn.Module, layer: int, states: dict[Source, Tensor]) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        states[HIDDEN, layer] = args[0] if args else kwargs["hidden_states"]

    return module.register_forward_pre_hook(hook, with_kwargs=True)


@torch.inference_mode()
def _prove_hidden(model: Any, layers: Sequence[int], ids_1T: Tensor) -> None:
    """Compare with `output_hidden_states`, bit for bit; its last one is after the final norm, so ours goes through that."""
    expected = model(input_ids=ids_1T, use_cache=False, output_hidden_states=True).hidden_states
    last = model_shape(model).num_layers
    with seen_sources(model, [(HIDDEN, layer) for layer in layers], head=False) as seen:
        model(input_ids=ids_1T, use_cache=False)
        for layer in layers:
            found = _normed(model, seen.states[HIDDEN, layer]) if layer == last else seen.states[HIDDEN, layer]
            if expected is None or not torch.equal(found, expected[layer]):
                what = "after the final norm is" if layer == last else "gives is"
                raise ConfigError(
                    f"features: what layer {layer} of {type(model).__name__} {what} not what output_hidden_states gives; "
                    "set layer to -1, which is available"
                )


def final_norm(model: Any) -> Any:
    """The norm after the last layer; None if it is not found."""
    found = find_decoder(model, model_shape(model).num_layers)
    return None if found is None else next((getattr(found[0], name) for name in _NORMS if hasattr(found[0], name)), None)


def _normed(model: Any, state: Tensor) -> Tensor:
    norm = final_norm(model)
    if norm is None:
        raise ConfigError(
            f"features: the final norm of {type(model).__name__} is not found, so its last layer before that cannot be proven; "
            "set layer to -1, which is after the norm"
        )
    return norm(state)
