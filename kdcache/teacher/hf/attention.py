"""Check that a model's attention does all that its config asks, by comparison with eager attention on a few tokens.

transformers' default, sdpa, accepts options that it does not know (a soft cap on the scores, sinks) and silently ignores them.
Each layer's function gets the layer's own queries, keys and values in float32, also magnified, so that effects show that only
large scores have, or that half precision would round away.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from kdcache.errors import ConfigError
from kdcache.shown import get_logger
from kdcache.teacher.hf.proof import untouched_generators

log = get_logger(__name__)

EAGER = "eager"
_PROOF = "kdcache_proof"
_MAGNIFIED = (1.0, 32.0)
_TOKENS = 16
_TOLERANCE = 1e-3
"""Relative to the largest number in a layer's output, in float32."""


@dataclass(frozen=True)
class AttentionGap:
    """How far a model's attention is from eager attention; 0.0 if rounding explains the difference.

    Attributes:
        layers: on the same queries, keys, values and options, as a share of a layer's output. Eager attention does what the
            model's code asks, so the other one ignores something. Checked only where the model uses transformers' attention
            interface.
        whole: of the whole model, as a share of its last states. It is not known which of the two is right: the eager path of
            transformers' Falcon adds its position biases twice.
    """

    layers: float = 0.0
    whole: float = 0.0


@torch.no_grad()
def attention_gap(model: Any) -> AttentionGap:
    """Run the model's attention and eager attention on the same few tokens."""
    if attention_of(model) in (EAGER, None):
        return AttentionGap()
    with untouched_generators(model):
        return AttentionGap(_run(_layers_gap, model), _run(_whole_gap, model))


def must_be_eager(model: Any, *, named: bool, field: str | None) -> bool:
    """Whether the model must run with eager attention, because the one it was loaded with ignores part of the config.

    Args:
        model: as it was loaded.
        named: whether the user named the implementation.
        field: the config field that names it, for messages; None if there is none.

    Raises:
        ConfigError: the user named one that ignores part of the config; or nobody named one, and it is not known which is
            right.
    """
    gap, name, kind = attention_gap(model), attention_of(model), type(model).__name__
    if gap.layers and named:
        raise ConfigError(
            f"{field} is {name!r}, which ignores part of what the config of {kind} asks of its attention, such as a cap on "
            f"scores: its output is off by up to {gap.layers:.0%} of the largest number; set it to 'eager', or leave it out"
        )
    if gap.layers:
        log.warning(
            "%s runs with eager attention: %s ignores part of the config (its output is off by up to %.0f%% of the largest)",
            kind, name, 100 * gap.layers,
        )  # fmt: skip
        return True
    if gap.whole and (named or field is None):
        log.warning(
            "%s: %s and eager attention differ (by %.2g of the last states); it runs with %s", kind, name, gap.whole, name
        )
    elif gap.whole:
        raise ConfigError(
            f"{kind} gives other numbers with {name!r} attention than with 'eager' (by {gap.whole:.1%} of its last states on "
            f"average), and nothing says which it was trained with; name the right one as {field}"
        )
    return False


def _run(look: Callable[[Any], float], model: Any) -> float:
    try:
        return look(model)
    except Exception as error:  # foreign code, on a path that a capture may never take
        log.debug("%s: eager attention cannot be run: %s", type(model).__name__, error)
        return 0.0


def attention_of(model: Any) -> str | None:
    """The name of the attention implementation that the language model runs with."""
    return model.config.get_text_config()._attn_implementation


def use_eager(model: Any) -> bool:
    """Switch to eager attention; False if the model chose its attention when it was built, and must be built again."""
    if not model._can_set_attn_implementation():
        return False
    model.config._attn_implementation = EAGER
    return True


def _layers_gap(model: Any) -> float:
    if not model._can_set_attn_implementation():
        return 0.0
    name = attention_of(model)
    if name not in AttentionInterface._global_mapping:
        return 0.0
    gaps = [0.0]

    def both(module: Any, *tensors: Tensor, **options: Any) -> Any:
        interface = sys.modules[type(module).__module__].__dict__.get("ALL_ATTENTION_FUNCTIONS", AttentionInterface())
        eager, chosen = eager_of(module), interface[name]
        gaps.extend(_gap(module, eager, chosen, tensors, options, times) for times in _MAGNIFIED)
        return eager(module, *tensors, **options)

    AttentionInterface.register(_PROOF, both)
    AttentionMaskInterface.register(_PROOF, eager_mask)
    with with_attention(model, _PROOF):
        model.base_model(input_ids=_ids(model), use_cache=False)
    return max(gaps) if max(gaps) > _TOLERANCE else 0.0


def _gap(
    module: Any, eager: Callable[..., Any], chosen: Callable[..., Any], tensors: tuple[Any, ...], options: Any, times: float
) -> float:
    query, *others = map(_full, tensors)
    options = {name: _full(value) for name, value in options.items()}
    expected = eager(module, query * times, *others, **options)[0]
    try:
        found = chosen(module, query * times, *others, **options)[0]
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:  # flash kernels know half precision only
        log.debug("attention cannot be run in float32: %s", error)
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _whole_gap(model: Any) -> float:
    """The gap of the model's last hidden state, in its own precision."""
    ids_1T = _ids(model)
    own = _last(model, ids_1T)
    if model._can_set_attn_implementation():
        with with_attention(model, EAGER):
            eager = _last(model, ids_1T)
    else:
        eager = _last(_twin(model), ids_1T)
    gap = _mean_share(own, eager)
    # Two ways of rounding, layer after layer.
    explained = 16 * torch.finfo(own.dtype).eps * math.sqrt(model.config.get_text_config().num_hidden_layers)
    if gap <= max(_TOLERANCE, explained):
        return 0.0
    # A model that never answers the same twice is refused elsewhere, and not for its attention.
    return gap if _mean_share(own, _last(model, ids_1T)) <= gap / 10 else 0.0


def _last(model: Any, ids_1T: Tensor) -> Tensor:
    """The last states, or the logits if the model's body is not found."""
    output = model.base_model(input_ids=ids_1T, use_cache=False)
    found = getattr(output, "last_hidden_state", None)
    return output.logits if found is None else found


def _twin(model: Any) -> PreTrainedModel:
    """A model built with eager attention that shares the weights."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = EAGER
    with torch.device("meta"):
        twin = type(model)(config).eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    modules = dict(twin.named_modules())
    for path, buffer in model.named_buffers():
        owner, _, name = path.rpartition(".")
        modules[owner]._buffers[name] = buffer
    return twin


@contextmanager
def with_attention(model: Any, name: str) -> Iterator[None]:
    """Run the model with the attention function of this name, while the context is open."""
    before = attention_of(model)
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def eager_of(module: Any) -> Callable[..., Any]:
    """The eager attention of the file in which a module's class stands; raises NotImplementedError where it has none."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise NotImplementedError(f"{type(module).__name__} has no eager attention")


def _mean_share(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().mean() / expected.float().abs().mean().clamp_min(1e-30))


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _ids(model: Any) -> Tensor:
    config = model.config.get_text_config()
    num_tokens = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
    return (torch.arange(num_tokens, device=model.device) * 37 + 11)[None] % config.vocab_size
