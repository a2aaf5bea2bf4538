"""A teacher's inner states as features: which ones a model has, and what is kept of them. NumPy alone.

A *source* is what a feature is taken from: a kind and a layer.

- `hidden`: layer 0 is the output of the embeddings, layer i the residual stream after layer i, counted from 1. The last one, L,
  is BEFORE the final norm; -1 (LAST) is what the output projection takes, AFTER it. `output_hidden_states` of transformers
  gives the latter as its number L; `aux_hidden_state_layers` of vLLM gives the former.
- `queries`, `keys`, `values` of layer i are inside layer i: after a norm of queries or keys, before the rotary embedding, head
  after head. Keys and values have the key-value heads, which are not repeated.
- `attention` of layer i: of each head the most probable keys of a position, by the model's own softmax over all keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kdcache.config.features import FeatureConfig
from kdcache.config.teacher import TeacherConfig
from kdcache.errors import ConfigError
from kdcache.format.identity import ProjectionInfo
from kdcache.format.manifest import FeatureInfo
from kdcache.format.record import Distributions, TokenSequence, distances_key
from kdcache.teacher.checkpoint import config_fields

LAST = -1
"""Of hidden states, the layer after the final norm; in a config, also the last layer of the other kinds."""

HIDDEN, ATTENTION = "hidden", "attention"
HEADS = ("queries", "keys", "values")

SMALLEST_PROBABILITY = 2.0**-24
"""Of attention: float16, in which it is stored, has no smaller one. Keys below are left out."""

Source = tuple[str, int]
"""Kind and layer."""

_SIZE_FIELDS = ("hidden_size", "n_embd", "d_model")
_LAYERS_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS_FIELDS = ("num_attention_heads", "n_head", "num_heads")


@dataclass(frozen=True)
class HiddenShape:
    """The inner states of a model.

    Attributes:
        num_layers: L; layers are counted from 1.
        size: numbers of a hidden state.
        num_heads: query heads; None where the model does not say, or its layers differ.
        num_kv_heads: of keys and values.
        head_dim: numbers per head.
    """

    num_layers: int
    size: int
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None

    def heads_of(self, kind: str) -> int | None:
        """How many heads states of this kind have; None for hidden states, and where it is not known."""
        if kind == HIDDEN:
            return None
        return self.num_kv_heads if kind in ("keys", "values") else self.num_heads


@runtime_checkable
class FeatureTeacher(Protocol):
    """A teacher that can say which inner states it has; its `score` takes features, or refuses them with a reason."""

    @property
    def hidden_shape(self) -> HiddenShape:
        """The inner states of the loaded model."""
        ...


def resolve_features(asked: Sequence[FeatureConfig], shape: HiddenShape) -> tuple[FeatureInfo, ...]:
    """The features that a config asks for, as a cache will describe them.

    Raises:
        ConfigError: a layer or heads that the model does not have, or a projection that makes nothing smaller.
    """
    return tuple(_resolved(feature, shape) for feature in asked)


def _resolved(feature: FeatureConfig, shape: HiddenShape) -> FeatureInfo:
    if feature.layer > shape.num_layers:
        raise ConfigError(
            f"features: {feature.full_name!r} is of layer {feature.layer}, but the teacher has layers "
            f"{_layers_in_words(feature.kind, shape)}"
        )
    heads, size, top_keys = shape.heads_of(feature.kind), shape.size, None
    if feature.kind != HIDDEN:
        if heads is None or shape.head_dim is None:
            raise ConfigError(
                f"features: {feature.full_name!r} is of kind {feature.kind!r}, but the model's config does not give one number "
                "of heads for all layers; use kind hidden"
            )
        top_keys = feature.num_keys if feature.kind == ATTENTION else None
        size = heads * (shape.head_dim if top_keys is None else top_keys)
    projection = None
    if feature.projection is not None:
        if feature.projection.size >= size:
            raise ConfigError(
                f"features: {feature.full_name!r} has a projection to {feature.projection.size} numbers, but its vectors have "
                f"{size}; set projection.size below that, or leave the projection out"
            )
        projection = ProjectionInfo(kind=feature.projection.kind, full_size=size, seed=feature.projection.seed)
        size = feature.projection.size
    return FeatureInfo(
        name=feature.full_name,
        layer=shape.num_layers if feature.layer == LAST and feature.kind != HIDDEN else feature.layer,
        size=size,
        dtype=feature.dtype,
        pooling=feature.pooling,
        kind=feature.kind,
        positions=feature.positions,
        stride=feature.stride,
        offset=feature.offset,
        max_positions=feature.max_positions,
        scale=feature.scale,
        projection=projection,
        num_heads=heads,
        head_dim=None if heads is None or top_keys is not None else shape.head_dim,
        top_keys=top_keys,
        num_layers=shape.num_layers,
    )


def _layers_in_words(kind: str, shape: HiddenShape) -> str:
    if kind != HIDDEN:
        return f"1 to {shape.num_layers} (-1 is the last one)"
    return (
        f"0 (the embeddings) to {shape.num_layers} (before the final norm); -1 is after the final norm, where the output "
        "projection takes it"
    )


def stated_shape(config: TeacherConfig) -> HiddenShape | None:
    """What the model's config.json says of its inner states; None if it cannot be read before the model is loaded."""
    fields = config_fields(config.model, config.revision)
    text: Any = fields.get("text_config")
    overrides: Any = config.engine_options.get("hf_overrides")
    fields = {**fields, **(text if isinstance(text, Mapping) else {}), **config.engine_options}
    fields |= overrides if isinstance(overrides, Mapping) else {}
    return shape_of_fields(fields)


def shape_of_fields(fields: Mapping[str, Any]) -> HiddenShape | None:
    """The inner states of a model whose config has these fields; None where they do not tell."""
    size, num_layers, heads = (_first_integer(fields, names) for names in (_SIZE_FIELDS, _LAYERS_FIELDS, _HEADS_FIELDS))
    if size is None or num_layers is None:
        return None
    head_dim = _first_integer(fields, ("head_dim",)) or (size // heads if heads else None)
    kv_heads = heads if fields.get("num_key_value_heads") is None else _first_integer(fields, ("num_key_value_heads",))
    if heads is None or kv_heads is None or head_dim is None:
        return HiddenShape(num_layers, size)
    return HiddenShape(num_layers, size, heads, kv_heads, head_dim)


def check_askable(features: Sequence[FeatureInfo], shape: HiddenShape) -> None:
    """Raise ConfigError unless a model of this shape has the features."""
    for feature in features:
        heads = shape.heads_of(feature.kind)
        expected = shape.size if heads is None else heads * (feature.top_keys or shape.head_dim or 0)
        first = LAST if feature.kind == HIDDEN else 1
        if not first <= feature.layer <= shape.num_layers or feature.full_size != expected:
            raise ConfigError(
                f"features: {feature.name!r} is of layer {feature.layer} and size {feature.full_size}, but the teacher has "
                f"layers {_layers_in_words(feature.kind, shape)} of size {expected}"
            )


def no_features(who: str) -> ConfigError:
    """The error for a teacher that is asked for features and has none."""
    return ConfigError(f"features: {who} gives no hidden states; use teacher.backend transformers, or vllm on its worker route")


def source_of(feature: FeatureInfo) -> Source:
    """What a feature is taken from."""
    return feature.kind, feature.layer


def sources_of(features: Sequence[FeatureInfo]) -> list[Source]:
    """What the features are taken from, each once, in order."""
    return sorted({source_of(feature) for feature in features})


def bytes_per_position(features: Sequence[FeatureInfo]) -> int:
    """Bytes of the features with a vector per position, as records hold them before a projection: float32, the most at once."""
    return sum(-(-4 * feature.full_size // feature.stride) for feature in features if feature.pooling == "none")


def reads_all(features: Sequence[FeatureInfo]) -> bool:
    """Whether a feature is wanted where nothing is supervised, too."""
    return any(feature.positions == "all" for feature in features)


def is_read(sequence: TokenSequence, features: Sequence[FeatureInfo]) -> bool:
    """Whether the teacher must read a sequence; otherwise the answer is known to be empty."""
    return bool(sequence.supervised_N.any()) or reads_all(features)


def pooled(vectors_PH: NDArray[np.float32], pooling: str) -> NDArray[np.float32]:
    """Pool a sequence's vectors: all of them, their mean (summed in float64), or the last one; zeros if there are none."""
    if pooling == "none":
        return vectors_PH
    if len(vectors_PH) == 0:
        return np.zeros((1, vectors_PH.shape[1]), np.float32)
    if pooling == "last":
        return vectors_PH[-1:].copy()
    return vectors_PH.mean(axis=0, dtype=np.float64, keepdims=True).astype(np.float32)


def top_keys(maps_hFN: NDArray[np.floating], positions_F: NDArray[np.int64], top: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The most probable keys of each head at some positions, from whole maps.

    Returns:
        (F, heads x top) float32 probabilities, falling, 0 where there are fewer keys; and int32, how far back each key is.
    """
    keys_hFk = np.argsort(-maps_hFN, axis=-1, kind="stable")[..., :top]
    values_hFk = np.take_along_axis(maps_hFN, keys_hFk, axis=-1)
    values_hFk = np.where(values_hFk < SMALLEST_PROBABILITY, 0.0, values_hFk)
    distances_hFk = np.where(values_hFk > 0, positions_F[None, :, None] - keys_hFk, 0)
    missing = ((0, 0), (0, 0), (0, top - keys_hFk.shape[-1]))
    both = (np.pad(each, missing).transpose(1, 0, 2).reshape(len(positions_F), -1) for each in (values_hFk, distances_hFk))
    values, distances = both
    return values.astype(np.float32), distances.astype(np.int32)


def no_vectors(features: Sequence[FeatureInfo]) -> dict[str, NDArray[Any]]:
    """The features of a sequence in which nothing is supervised, where none is wanted at all positions."""
    found: dict[str, NDArray[Any]] = {}
    for feature in features:
        found[feature.name] = np.zeros((0 if feature.pooling == "none" else 1, feature.full_size), np.float32)
        if feature.kind == ATTENTION:
            found[distances_key(feature)] = np.zeros((0, feature.full_size), np.int32)
    return found


def with_no_vectors(distributions: Distributions, features: Sequence[FeatureInfo]) -> Distributions:
    """Add the features to the answer for a sequence in which nothing is supervised."""
    return replace(distributions, features=no_vectors(features)) if features else distributions


def find_decoder(model: Any, num_layers: int) -> tuple[Any, Any] | None:
    """The module that holds a model's decoder layers, and the list of them; None if there is none, or several.

    It is the list of that length nearest to the root: there may be others inside the layers, of experts.
    """
    candidates = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if type(module).__name__ == "ModuleList" and len(module) == num_layers
    ]
    depth = min((depth for depth, _, _ in candidates), default=0)
    nearest = [(name, module) for at, name, module in candidates if at == depth]
    if len(nearest) != 1:
        return None
    name, layers = nearest[0]
    return model.get_submodule(name.rpartition(".")[0]), layers


def _first_integer(fields: Mapping[str, Any], names: Sequence[str]) -> int | None:
    return next((fields[name] for name in names if isinstance(fields.get(name), int)), None)
