"""Which channels, neurons and heads a student keeps, and the weights cut to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.config.cut import WidthConfig
from kdcache.errors import ConfigError
from kdcache.teacher.hf.activations import importance
from kdcache.teacher.hf.axes import Axes, Axis, Size
from kdcache.train.init.layers import Statistics

Order = Literal["together", "apart"]
"""How what belongs to one head (or neuron) lies along an axis with several numbers of it: next to each other, or in parts, one
after another, each with some of every head."""

ORDERS = tuple(product(("together", "apart"), ("apart", "together")))
"""(of heads, of neurons), the likeliest first; which one a model has is found by the proof."""

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Kept:
    """What stays, as indices into the teacher's; None for a size that is not cut.

    Attributes:
        channels: of the hidden states, ascending.
        neurons: layer -> ascending.
        heads: layer -> heads of queries, group by group.
        groups: layer -> heads of keys and values.
    """

    channels: Indices | None = None
    neurons: tuple[Indices, ...] | None = None
    heads: tuple[Indices, ...] | None = None
    groups: tuple[Indices, ...] | None = None

    def counts(self) -> dict[Size, int]:
        """How many stay in each layer, of the sizes that are cut."""
        per_layer: dict[Size, tuple[Indices, ...] | None]
        per_layer = {"neurons": self.neurons, "heads": self.heads, "key_value_heads": self.groups}
        counts: dict[Size, int] = {} if self.channels is None else {"hidden": len(self.channels)}
        counts.update({size: len(indices[0]) for size, indices in per_layer.items() if indices is not None})
        return counts


def chosen_width(config: WidthConfig, axes: Axes, statistics: Statistics, layers: tuple[int, ...]) -> Kept:
    """What a config keeps, by importance.

    Args:
        config: the sizes asked for.
        axes: of the teacher.
        statistics: of the teacher.
        layers: those that are kept.

    Raises:
        ConfigError: a size that the teacher does not have, or that does not divide.
    """
    num_heads, num_groups = head_counts(config, axes)
    channels: Indices | None = None
    neurons: tuple[Indices, ...] | None = None
    heads: tuple[Indices, ...] | None = None
    groups: tuple[Indices, ...] | None = None
    if config.hidden_size is not None:
        _check_size("hidden_size", config.hidden_size, axes.hidden)
        channels = _best(_importance(statistics, "channels").sum(axis=0), config.hidden_size)
    if config.intermediate_size is not None:
        _check_size("intermediate_size", config.intermediate_size, axes.neurons)
        per_layer = _importance(statistics, "neurons")[list(layers)]
        neurons = tuple(_best(scores, config.intermediate_size) for scores in per_layer)
    if (num_heads, num_groups) != (axes.heads, axes.key_value_heads):
        per_layer = _importance(statistics, "attention")[list(layers)].reshape(len(layers), axes.heads, -1)
        # A head's importance is the L2 norm over its channels.
        pairs = [_best_heads(squares, num_heads, num_groups, axes.key_value_heads) for squares in (per_layer**2).sum(axis=-1)]
        heads, groups = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
    return Kept(channels, neurons, heads, groups)


def _importance(statistics: Statistics, name: str) -> NDArray[np.float64]:
    if name not in statistics:
        raise ConfigError(
            f"student.width: the statistics say nothing of the teacher's {name}, which were not found in this "
            "architecture; cut another size, or layers"
        )
    return importance(statistics, name)


def head_counts(config: WidthConfig, axes: Axes) -> tuple[int, int]:
    """(heads of queries, heads of keys and values) of the student; raises ConfigError where they do not divide."""
    per_group = axes.heads // axes.key_value_heads
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads is None and groups is None:
        return axes.heads, axes.key_value_heads
    if groups is not None:
        _check_size("num_key_value_heads", groups, axes.key_value_heads)
        heads = groups * per_group if heads is None else heads
        _check_size("num_attention_heads", heads, axes.heads)
        if heads % groups or heads // groups > per_group:
            allowed = ", ".join(str(groups * n) for n in range(1, per_group + 1))
            raise ConfigError(
                f"student.width.num_attention_heads is {heads} with {groups} heads of keys and values, of which each serves at "
                f"most {per_group}, and all as many; expected one of {allowed}"
            )
        return heads, groups
    assert heads is not None
    _check_size("num_attention_heads", heads, axes.heads)
    if heads % per_group:
        near = sorted({max(heads - heads % per_group, per_group), heads - heads % per_group + per_group})
        raise ConfigError(
            f"student.width.num_attention_heads is {heads}, but {per_group} heads share keys and values, so it must be a "
            f"multiple of {per_group}: {' or '.join(map(str, near))}; with num_key_value_heads too, groups may become smaller"
        )
    return heads, heads // per_group


def _check_size(name: str, asked: int, there: int) -> None:
    if asked > there:
        is_there = f"the teacher has {there}" if there else "the teacher's configuration names no such size"
        raise ConfigError(f"student.width.{name} is {asked}, but {is_there}")


def _best(scores: NDArray[np.float64], count: int) -> Indices:
    """The indices of the highest scores, ascending; of equals, the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _best_heads(squares: NDArray[np.float64], num_heads: int, num_groups: int, had_groups: int) -> tuple[Indices, Indices]:
    """The most active groups, and in each of them its most active heads."""
    by_group = squares.reshape(had_groups, -1)
    groups = _best(np.sqrt(by_group.sum(axis=1)), num_groups)
    per_group, had_per_group = num_heads // num_groups, by_group.shape[1]
    heads = [group * had_per_group + _best(np.sqrt(by_group[group]), per_group) for group in groups]
    return np.concatenate(heads), groups


def shuffled(kept: Kept, axes: Axes, num_layers: int) -> Kept:
    """The sizes that are cut, with everything kept in another order: what must not change what a model says."""
    rng = np.random.default_rng(20261128)
    per_group = axes.heads // axes.key_value_heads
    groups = tuple(rng.permutation(axes.key_value_heads) for _ in range(num_layers))
    heads = tuple(np.concatenate([g * per_group + rng.permutation(per_group) for g in order]) for order in groups)
    return Kept(
        None if kept.channels is None else rng.permutation(axes.hidden),
        None if kept.neurons is None else tuple(rng.permutation(axes.neurons) for _ in range(num_layers)),
        None if kept.heads is None else heads,
        None if kept.heads is None else groups,
    )


@dataclass(frozen=True)
class Cutter:
    """Cuts weights to what is kept.

    Attributes:
        axes: of the model whose weights they are.
        kept: what stays; its layers are those of the model.
        prefix: how the names of the layers' weights begin.
        order_of_heads, order_of_neurons: see `Order`.
    """

    axes: Axes
    kept: Kept
    prefix: str
    order_of_heads: Order
    order_of_neurons: Order

    def cut(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights, each cut along all of its axes."""
        return {name: self._cut_one(name, tensor) for name, tensor in weights.items()}

    def _cut_one(self, name: str, tensor: Tensor) -> Tensor:
        for dim, axis in enumerate(self.axes.of_weight[name]):
            indices = self._indices(name, axis, tensor.shape[dim])
            if indices is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(indices).to(tensor.device))
        return tensor

    def _indices(self, name: str, axis: Axis, length: int) -> Indices | None:
        kept, layer = self.kept, self._layer(name)
        if axis.is_hidden:
            return kept.channels
        if kept.neurons is not None and axis.is_neurons and layer is not None:
            return _spans(kept.neurons[layer], self.axes.neurons, axis.neurons, axis.neurons, self.order_of_neurons)
        if kept.heads is not None and kept.groups is not None and axis.is_heads and layer is not None:
            return self._head_indices(kept.heads[layer], kept.groups[layer], axis, length)
        return None

    def _layer(self, name: str) -> int | None:
        return int(name.removeprefix(self.prefix).partition(".")[0]) if name.startswith(self.prefix) else None

    def _head_indices(self, heads: Indices, groups: Indices, axis: Axis, length: int) -> Indices:
        axes, order = self.axes, self.order_of_heads
        if not axis.key_value_heads:
            return _spans(heads, axes.heads, axis.heads, _num_parts(axis.heads, axes.head_dim), order)
        if not axis.heads:
            parts = _num_parts(axis.key_value_heads, axes.head_dim)
            return _spans(groups, axes.key_value_heads, axis.key_value_heads, parts, order)
        if order == "apart":  # all queries, then all keys, then all values
            queries = _spans(heads, axes.heads, axis.heads, _num_parts(axis.heads, axes.head_dim), order)
            parts = _num_parts(axis.key_value_heads, axes.head_dim)
            others = _spans(groups, axes.key_value_heads, axis.key_value_heads, parts, order)
            return np.concatenate([queries, axes.heads * axis.heads + others])
        # Group by group: its queries, then its keys and values.
        per_group = axes.heads // axes.key_value_heads
        block = length // axes.key_value_heads
        spans = []
        for group in groups:
            own = heads[heads // per_group == group] % per_group
            inside = np.concatenate([_spans(own, per_group, axis.heads, 1, order), np.arange(per_group * axis.heads, block)])
            spans.append(group * block + inside)
        return np.concatenate(spans)


def _num_parts(width: int, head_dim: int) -> int:
    return width // head_dim if width % head_dim == 0 else 1


def _spans(kept: Indices, count: int, width: int, parts: int, order: Order) -> Indices:
    """Where the numbers of some of `count` things lie, `width` for each: together, or in `parts` one after another."""
    if order == "together":
        return (kept[:, None] * width + np.arange(width)).ravel()
    inner = width // parts
    starts = np.arange(parts)[:, None] * (count * inner)
    return (starts[..., None] + kept[:, None] * inner + np.arange(inner)).ravel()
