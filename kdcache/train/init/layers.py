"""Which layers of a teacher a student keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.config.cut import LayersConfig
from kdcache.errors import ConfigError
from kdcache.teacher.hf.activations import angular_distances, block_influence

Statistics = Mapping[str, NDArray[Any]]


def chosen_layers(config: LayersConfig | None, num_layers: int, statistics: Callable[[], Statistics]) -> tuple[int, ...]:
    """The layers that a config keeps, counted from 0, ascending.

    Args:
        config: None keeps all.
        num_layers: of the teacher.
        statistics: gives what the teacher's layers do; asked for only where the choice depends on it.

    Raises:
        ConfigError: the teacher does not have these layers.
    """
    if config is None:
        return tuple(range(num_layers))
    if config.keep is not None:
        return _named(config.keep, num_layers)
    if config.every is not None:
        return spread(num_layers // _at_most("every", config.every, num_layers), num_layers)
    if config.count is not None:
        return spread(_at_most("count", config.count, num_layers), num_layers)
    if config.drop is not None:
        _at_most("drop", config.drop + 1, num_layers, shown=config.drop)
        dropped = least_influence if config.by == "block_influence" else least_angle
        left_out = dropped(statistics(), config.drop)
        return tuple(layer for layer in range(num_layers) if layer not in left_out)
    return _distilbert(num_layers)


def spread(count: int, num_layers: int) -> tuple[int, ...]:
    """Layers spread evenly, the last among them: i -> round((i + 1) L / count) - 1, halves rounded up."""
    return tuple(math.floor((i + 1) * num_layers / count + 0.5) - 1 for i in range(count))


def least_influence(statistics: Statistics, count: int) -> set[int]:
    """The layers of least block influence; of equals, the first."""
    return {int(layer) for layer in np.argsort(block_influence(statistics), kind="stable")[:count]}


def least_angle(statistics: Statistics, count: int) -> set[int]:
    """The neighbouring layers l .. l + count - 1 with the least angle between what enters and what leaves them."""
    angles = angular_distances(statistics)
    starts = range(len(angles) - count)
    best = min(starts, key=lambda layer: angles[layer, layer + count])
    return set(range(best, best + count))


def _distilbert(num_layers: int) -> tuple[int, ...]:
    """Every second layer from the first in the lower half, every second one up to the last in the upper half."""
    if num_layers % 2:
        raise ConfigError(
            f"student.layers.pattern: 'distilbert' halves an even number of layers, and the teacher has {num_layers}; use count"
        )
    half = num_layers // 2
    return tuple(2 * i if 2 * i < half else 2 * i + 1 for i in range(half))


def _named(keep: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    if keep[-1] >= num_layers:
        raise ConfigError(
            f"student.layers.keep names layer {keep[-1]}, but the teacher has {num_layers}: 0 to {num_layers - 1}"
        )
    return keep


def _at_most(name: str, value: int, num_layers: int, shown: int | None = None) -> int:
    if value > num_layers:
        rest = " and one has to stay" if shown is not None else ""
        raise ConfigError(f"student.layers.{name} is {shown or value}, but the teacher has {num_layers} layers{rest}")
    return value
