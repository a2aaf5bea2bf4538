"""Hidden states as features: which layers a model has, and what is kept of a layer's vectors. NumPy alone.

The convention is that of `output_hidden_states` in transformers. Layer 0 is the output of the embeddings, layer i that of layer
i, counted from 1. The last one is what the output projection takes, which is after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kdcache.config.capture import FeatureConfig, TeacherConfig
from kdcache.errors import ConfigError
from kdcache.format.manifest import FeatureInfo
from kdcache.format.record import Distributions
from kdcache.teacher.checkpoint import config_fields

LAST = -1
"""In a config: the last layer, whatever its index."""

_SIZE_FIELDS = ("hidden_size", "n_embd", "d_model")
_LAYERS_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class HiddenShape:
    """The hidden states of a model: layers 0 to num_layers, vectors of `size` numbers."""

    num_layers: int
    size: int


@runtime_checkable
class FeatureTeacher(Protocol):
    """A teacher that can say which hidden states it has; its `score` takes features, or refuses them with a reason."""

    @property
    def hidden_shape(self) -> HiddenShape:
        """The hidden states of the loaded model."""
        ...


def resolve_features(asked: Sequence[FeatureConfig], shape: HiddenShape) -> tuple[FeatureInfo, ...]:
    """The features that a config asks for, as a cache will describe them.

    Raises:
        ConfigError: a layer that the model does not have.
    """
    for feature in asked:
        if feature.layer > shape.num_layers:
            raise ConfigError(
                f"features: {feature.full_name!r} is of layer {feature.layer}, but the teacher has layers 0 (the embeddings) "
                f"to {shape.num_layers}; -1 is the last one"
            )
    return tuple(
        FeatureInfo(
            name=feature.full_name,
            layer=shape.num_layers if feature.layer == LAST else feature.layer,
            size=shape.size,
            dtype=feature.dtype,
            pooling=feature.pooling,
        )
        for feature in asked
    )


def stated_shape(config: TeacherConfig) -> HiddenShape | None:
    """What the model's config.json says of its hidden states; None if it cannot be read before the model is loaded."""
    fields = config_fields(config.model, config.revision)
    text: Any = fields.get("text_config")
    overrides: Any = config.engine_options.get("hf_overrides")
    fields = {**fields, **(text if isinstance(text, Mapping) else {}), **config.engine_options}
    fields |= overrides if isinstance(overrides, Mapping) else {}
    size, num_layers = (_first_integer(fields, names) for names in (_SIZE_FIELDS, _LAYERS_FIELDS))
    return None if size is None or num_layers is None else HiddenShape(num_layers, size)


def check_askable(features: Sequence[FeatureInfo], shape: HiddenShape) -> None:
    """Raise ConfigError unless a model of this shape has the features."""
    for feature in features:
        if not 0 <= feature.layer <= shape.num_layers or feature.size != shape.size:
            raise ConfigError(
                f"features: {feature.name!r} is of layer {feature.layer} and size {feature.size}, but the teacher has layers 0 "
                f"to {shape.num_layers} of size {shape.size}"
            )


def no_features(who: str) -> ConfigError:
    """The error for a teacher that is asked for features and has none."""
    return ConfigError(f"features: {who} gives no hidden states; use teacher.backend transformers, or vllm on its worker route")


def layers_of(features: Sequence[FeatureInfo]) -> list[int]:
    """The layers that the features need, each once, ascending."""
    return sorted({feature.layer for feature in features})


def bytes_per_position(features: Sequence[FeatureInfo]) -> int:
    """Bytes of the features with a vector per position, as records hold them: float32."""
    return sum(4 * feature.size for feature in features if feature.pooling == "none")


def pooled(vectors_PH: NDArray[np.float32], pooling: str) -> NDArray[np.float32]:
    """Pool a sequence's vectors: all of them, their mean (summed in float64), or the last one; zeros if there are none."""
    if pooling == "none":
        return vectors_PH
    if len(vectors_PH) == 0:
        return np.zeros((1, vectors_PH.shape[1]), np.float32)
    if pooling == "last":
        return vectors_PH[-1:].copy()
    return vectors_PH.mean(axis=0, dtype=np.float64, keepdims=True).astype(np.float32)


def features_from(
    features: Sequence[FeatureInfo], vectors_of_layer: Callable[[int], NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """A sequence's features, as `Distributions.features` holds them, from its layers' vectors (P, H) float32."""
    return {feature.name: pooled(vectors_of_layer(feature.layer), feature.pooling) for feature in features}


def no_vectors(features: Sequence[FeatureInfo]) -> dict[str, NDArray[np.float32]]:
    """The features of a sequence in which nothing is supervised."""
    return {feature.name: np.zeros((feature.num_vectors(0), feature.size), np.float32) for feature in features}


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
