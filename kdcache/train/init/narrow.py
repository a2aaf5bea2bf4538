"""A model with some of another's channels, neurons and heads.

Where the numbers of a head or a neuron lie along a fused axis is not known beforehand. It is found by a proof: everything that
is to be cut is put into another order, and the model must say the same as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.config.cut import WidthConfig
from kdcache.errors import ConfigError
from kdcache.shown import first_line
from kdcache.teacher.hf.axes import Axes, axes_of, resized
from kdcache.train.init.build import built, layer_modules, layers_prefix, with_layers
from kdcache.train.init.embedding import mend_embedding_scale
from kdcache.train.init.proof import probe_ids
from kdcache.train.init.width import ORDERS, Cutter, Kept, Order, shuffled

_TOLERANCE = 1e-3
"""Largest difference of a logit, relative to the largest, that another order of summation may make in float32."""


def check_cuttable(width: WidthConfig, axes: Axes, model: PreTrainedModel) -> None:
    """Refuse what cannot be cut in this architecture, in a sentence that says why."""
    name = type(model).__name__
    asks_heads = width.num_attention_heads is not None or width.num_key_value_heads is not None
    if (asks_heads or width.hidden_size is not None) and not axes.are_heads_apart:
        asked = "num_attention_heads" if asks_heads else "hidden_size"
        raise ConfigError(
            f"student.width.{asked}: in {name} the heads are, together, always as wide as the hidden states, so neither can be "
            "cut; cut intermediate_size or layers"
        )
    for weight, per_dim in axes.of_weight.items():
        for axis in per_dim:
            if width.hidden_size is not None and axis.hidden and not axis.is_hidden:
                raise _unknown("hidden_size", weight, name)
            if asks_heads and (axis.heads or axis.key_value_heads) and not axis.is_heads:
                raise _unknown("num_attention_heads", weight, name)
            if width.intermediate_size is not None and axis.neurons and not axis.is_neurons:
                raise _unknown("intermediate_size", weight, name)
    if width.intermediate_size is not None:
        _refuse_experts(axes, name)


def _unknown(field: str, weight: str, name: str) -> ConfigError:
    return ConfigError(
        f"student.width.{field}: the weight {weight} of {name} follows this size in a way that is not known here; cut another "
        "size, or layers"
    )


def _refuse_experts(axes: Axes, name: str) -> None:
    """Experts see different tokens, so their neurons cannot be compared by one measurement."""
    for weight, per_dim in axes.of_weight.items():
        if any(axis.neurons for axis in per_dim) and (len(per_dim) > 2 or ".experts." in weight):
            raise ConfigError(
                f"student.width.intermediate_size: the neurons of {name} lie in experts ({weight}), which are not cut here; "
                "cut hidden_size, heads or layers"
            )


@torch.no_grad()
def narrowed(model: PreTrainedModel, axes: Axes, kept: Kept) -> PreTrainedModel:
    """A model of its own with what is kept.

    Args:
        model: in evaluation mode.
        axes: of its weights.
        kept: what stays of it.

    Raises:
        ConfigError: it is not known where the numbers of heads or neurons lie, or the architecture does not run in this size.
    """
    orders = proven_orders(model, kept)
    cutter = Cutter(axes, kept, layers_prefix(model), *orders)
    student = _cut(model, axes, cutter)
    if kept.channels is not None and len(kept.channels) < axes.hidden:
        mend_embedding_scale(model, student, kept.channels)
    return student


def _cut(model: PreTrainedModel, axes: Axes, cutter: Cutter) -> PreTrainedModel:
    kept = cutter.kept
    fields = {field: count for size, count in kept.counts().items() if (field := axes.fields[size])}
    is_head_stated = kept.channels is not None or kept.heads is not None
    config = resized(model.config, axes.head_dim if is_head_stated else None, fields)
    try:
        student = built(model, config, cutter.cut(model.state_dict()))
        student(input_ids=probe_ids(student), use_cache=False)
    except Exception as error:  # of the model's own code
        sizes_shown = ", ".join(f"{name} {value}" for name, value in fields.items())
        raise ConfigError(
            f"student.width: {type(model).__name__} does not run with {sizes_shown}: {first_line(error)}"
        ) from error
    return student


@torch.no_grad()
def proven_orders(model: PreTrainedModel, kept: Kept) -> tuple[Order, Order]:
    """How the numbers of heads and of neurons lie along fused axes: with which order of them a reordered model says the same.

    One layer of each kind is looked at, in float32.

    Raises:
        ConfigError: with none.
    """
    small = with_layers(model, _one_of_each_kind(model), torch.float32)
    axes, prefix = axes_of(small), layers_prefix(small)
    ids_1T = probe_ids(small)
    expected = small(input_ids=ids_1T, use_cache=False).logits
    other = shuffled(kept, axes, len(layer_modules(small)))
    weights: Mapping[str, Tensor] = small.state_dict()
    for orders in ORDERS:
        try:
            reordered = built(small, resized(small.config, None, {}), Cutter(axes, other, prefix, *orders).cut(weights))
            found = reordered(input_ids=ids_1T, use_cache=False).logits
        except (RuntimeError, IndexError, ValueError):  # an order that does not fit the shapes
            continue
        if float((found - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max()):
            return orders
    raise ConfigError(
        f"student.width: {type(model).__name__} says something else when what is to be cut is put into another order, so "
        "it is not known where the parts of a head or a neuron lie; cut layers, or another size"
    )


def _one_of_each_kind(model: Any) -> list[int]:
    kinds: dict[Any, int] = {}
    for index, layer in enumerate(layer_modules(model)):
        kinds.setdefault(tuple((name, tuple(w.shape)) for name, w in layer.state_dict().items()), index)
    return sorted(kinds.values())
