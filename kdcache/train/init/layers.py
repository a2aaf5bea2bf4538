"""Which layers of a teacher a student keeps."""

from __future__ import annotations

import math

from kdcache.config.cut import LayersConfig
from kdcache.errors import ConfigError


def chosen_layers(config: LayersConfig | None, num_layers: int) -> tuple[int, ...]:
    """The layers that a config keeps, counted from 0, ascending.

    Args:
        config: None keeps all.
        num_layers: of the teacher.

    Raises:
        ConfigError: the teacher does not have these layers.
    """
    if config is None:
        return tuple(range(num_layers))
    if config.keep is not None:
        return _named(config.keep, num_layers)
    if config.every is not None:
        return _spread(num_layers // _at_most("every", config.every, num_layers), num_layers)
    if config.count is not None:
        return _spread(_at_most("count", config.count, num_layers), num_layers)
    return _distilbert(num_layers)


def _spread(count: int, num_layers: int) -> tuple[int, ...]:
    """Layers spread evenly, the last among them: i -> round((i + 1) L / count) - 1, halves rounded up."""
    return tuple(math.floor((i + 1) * num_layers / count + 0.5) - 1 for i in range(count))


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


def _at_most(name: str, value: int, num_layers: int) -> int:
    if value > num_layers:
        raise ConfigError(f"student.layers.{name} is {value}, but the teacher has {num_layers} layers")
    return value
