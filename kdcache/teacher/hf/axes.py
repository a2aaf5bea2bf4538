"""Which axes of a model's weights are hidden channels, neurons of the feed-forward network, or attention heads.

Nothing is read from names of weights: the model is built again without memory, with one size of its configuration changed at a
time, and the axes that change are that size's. What lies along an axis in which order is left to whoever slices it, and proves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from kdcache.errors import ConfigError

Size = Literal["hidden", "neurons", "heads", "key_value_heads"]

FIELDS: Mapping[Size, tuple[str, ...]] = {
    "hidden": ("hidden_size",),
    "neurons": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "heads": ("num_attention_heads",),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads"),
}
"""The fields of configurations that hold a size; the first that changes a shape counts."""

ODD = -1
"""Of an axis that becomes shorter with a size, or longer by a part of a number for each unit of it."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Axis:
    """One axis of a weight, by the size that it follows.

    Attributes:
        hidden, neurons, heads, key_value_heads: how many numbers along the axis each one of these brings; ODD where that is no
            whole number.
    """

    hidden: int = 0
    neurons: int = 0
    heads: int = 0
    key_value_heads: int = 0

    @property
    def is_hidden(self) -> bool:
        """One number per hidden channel."""
        return self == Axis(hidden=1)

    @property
    def is_neurons(self) -> bool:
        """One or more numbers per neuron."""
        return self.neurons > 0 and self == Axis(neurons=self.neurons)

    @property
    def is_heads(self) -> bool:
        """Numbers of attention heads, of keys and values, or of both."""
        return (
            min(self.heads, self.key_value_heads) >= 0
            and self.heads + self.key_value_heads > 0
            and not (self.hidden or self.neurons)
        )

    @property
    def is_fixed(self) -> bool:
        """As long for every size."""
        return self == Axis()


@dataclass(frozen=True)
class Axes:
    """The sizes of a model, and what its weights' axes follow.

    Attributes:
        hidden, neurons, heads, key_value_heads, head_dim: the sizes; 0 for one that the configuration does not name.
        of_weight: weight -> one Axis per dimension.
        are_heads_apart: whether the number of heads can change by itself; elsewhere the heads are always as wide, together, as
            the hidden states, and their axes count as hidden ones.
        fields: size -> the configuration's field of it, or None.
    """

    hidden: int
    neurons: int
    heads: int
    key_value_heads: int
    head_dim: int
    of_weight: Mapping[str, tuple[Axis, ...]]
    are_heads_apart: bool
    fields: Mapping[Size, str | None]


def axes_of(model: Any) -> Axes:
    """Find the axes of a model of transformers; takes a second or so for a deep one.

    Raises:
        ConfigError: the model cannot be built again with other sizes.
    """
    probe = _Probe(model)
    hidden, heads, groups = (probe.size(size) for size in ("hidden", "heads", "key_value_heads"))
    base, more = probe.shapes(), probe.shapes(heads=2 * heads)
    neurons, with_neurons = probe.neurons(base)  # first, since then it is stated and no longer follows the hidden size
    slopes = {"hidden": _slopes(base, probe.shapes(hidden=2 * hidden), hidden), "heads": _slopes(base, more, heads)}
    if neurons:
        slopes["neurons"] = _slopes(base, with_neurons, neurons)
    if groups:  # with twice the heads, so that more groups divide them
        slopes["key_value_heads"] = _slopes(more, probe.shapes(heads=2 * heads, key_value_heads=2 * groups), groups)
    of_weight = {
        name: tuple(Axis(**{size: per_axis[name][at] for size, per_axis in slopes.items()}) for at in range(len(shape)))
        for name, shape in base.items()
    }
    are_heads_apart = more != base and all(slope >= 0 for per_axis in slopes["heads"].values() for slope in per_axis)
    return Axes(hidden, neurons, heads, groups or heads, probe.head_dim, of_weight, are_heads_apart, probe.fields)


def _slopes(before: Shapes, after: Shapes, step: int) -> dict[str, tuple[int, ...]]:
    """How much longer each axis became per unit of the size; `ODD` for a part of a number."""
    return {name: tuple(_slope(b - a, step) for a, b in zip(shape, after[name], strict=True)) for name, shape in before.items()}


def _slope(longer: int, step: int) -> int:
    return longer // step if longer >= 0 and longer % step == 0 else ODD


class _Probe:
    """Builds a model without memory, with some sizes changed and the size of a head kept."""

    def __init__(self, model: Any) -> None:
        self._class, self._config = type(model), model.config
        text = model.config.get_text_config()
        self.fields: dict[Size, str | None] = {
            size: next((field for field in names if hasattr(text, field)), None) for size, names in FIELDS.items()
        }
        self.head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        self._sizes = {
            size: int(getattr(text, f, None) or 0) if f else 0 for size, f in self.fields.items() if size != "neurons"
        }

    def _stated(self, field: str | None) -> int:
        return int(getattr(self._config.get_text_config(), field, None) or 0) if field else 0

    def size(self, size: Size) -> int:
        """What the configuration says; 0 where it does not name this size."""
        return self._sizes[size]

    def neurons(self, base: Shapes) -> tuple[int, Shapes]:
        """How many neurons a layer has, and the shapes with twice as many; (0, base) where no field says it."""
        text = self._config.get_text_config()
        for field in FIELDS["neurons"]:
            # Where it is not set (n_inner of GPT-2), it is four times the hidden size.
            value = getattr(text, field, None) or 4 * text.hidden_size
            if hasattr(text, field) and isinstance(value, int):
                self.fields["neurons"] = field
                doubled = self.shapes(neurons=2 * value)
                if doubled != base:
                    self._sizes["neurons"] = value
                    return value, doubled
        self.fields["neurons"] = None
        return 0, base

    def shapes(self, **sizes: int) -> Shapes:
        """The weights' shapes with these sizes."""
        stated = {str(field): (self._sizes | sizes).get(size, 0) for size, field in self.fields.items() if field}
        config = resized(self._config, self.head_dim, stated)
        try:
            with torch.device("meta"):
                model = self._class(config)
        except Exception as error:  # of the model's own code
            raise ConfigError(f"{self._class.__name__} cannot be built with other sizes: {error}") from error
        return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def resized(config: Any, head_dim: int | None, fields: Mapping[str, int]) -> Any:
    """A copy of a configuration with other sizes; the size of a head is stated instead of derived, unless it is None."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if head_dim is not None:
        with suppress(AttributeError):  # a property, always derived (Falcon)
            text.head_dim = head_dim
    for field, value in fields.items():
        if value:
            setattr(text, field, value)
    return config


def input_axis(module: nn.Module, axes: tuple[Axis, ...]) -> tuple[Axis, Axis] | None:
    """(what a projection reads, what it gives); None for a module that is not a projection.

    `nn.Linear` holds (output, input), transformers' `Conv1D` (input, output).
    """
    if len(axes) != 2 or isinstance(module, nn.Embedding):
        return None
    return (axes[0], axes[1]) if type(module).__name__ == "Conv1D" else (axes[1], axes[0])
