"""Whether the attention that a model runs with does all that its config asks: shown beside eager attention, on a few tokens.

transformers' default, sdpa, takes what it does not know (a soft cap on the scores, sinks) and leaves it out without a word.
Each layer's function is given the layer's own queries, keys and values in float32, also magnified, so that what only bites on
large scores, or is smaller than the rounding of half precision, shows.
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
"""Of the greatest number in a layer's output, in float32."""


@dataclass(frozen=True)
class AttentionGap:
    """How far a model's attention is from eager attention; 0.0 where no further than rounding explains.

    Attributes:
        layers: of the same queries, keys, values and options, as a share of a layer's output. What eager attention does with
            them is what the model's code asks for, so the other one leaves something out. Looked at where the model follows
            transformers' attention interface.
        whole: of the whole model, as a share of its last states. Which of the two is right is not known: the eager path of
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
    """Whether the model has to run with eager attention, because the one it was loaded with leaves out what the config asks.

    Args:
        model: as it was loaded.
        named: whether the user named the implementation.
        field: the config field that does, for messages; None where there is none.

    Raises:
        ConfigError: the user named one that leaves something out; or nobody named one, and which is right cannot be told.
    """
    gap, name, kind = attention_gap(model), attention_of(model), type(model).__name__
    if gap.layers and named:
        raise ConfigError(
            f"{field} is {name!r}, which leaves out what the config of {kind} asks of its attention, a cap on scores, say: "
            f"its output is up to {gap.layers:.0%} of the largest number off; set it to 'eager', or leave it out"
        )
    if gap.layers:
        log.warning(
            "%s runs with eager attention: %s leaves out what the config asks (its output is up to %.0f%% of the largest off)",
            kind, name, 100 * gap.layers,
        )  # fmt: skip
        return True
    if gap.whole and (named or field is None):
        log.warning("%s: %s and eager attention differ (%.2g of the last states); it runs with %s", kind, name, gap.whole, name)
    elif gap.whole:
        raise ConfigError(
            f"{kind} gives other numbers with {name!r} attention than with 'eager' ({gap.whole:.1%} of its last states in the "
            f"mean), and nothing says which it was trained with; name the right one as {field}"
        )
    return False


def _run(look: Callable[[Any], float], model: Any) -> float:
    try:
        return look(model)
    except Exception as error:  # of foreign code on a path that a capture may never take
        log.debug("%s: eager attention cannot be run: %s", type(model).__name__, error)
        return 0.0


def attention_of(model: Any) -> str | None:
    """The name of the implementation that the language model runs with."""
    return model.config.get_text_config()._attn_implementation


def use_eager(model: Any) -> bool:
    """Switch to eager attention; False where the model chose it for good when it was built, and must be built again."""
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
        eager, chosen = _eager_of(module), interface[name]
        gaps.extend(_gap(module, eager, chosen, tensors, options, times) for times in _MAGNIFIED)
        return eager(module, *tensors, **options)

    AttentionInterface.register(_PROOF, both)
    AttentionMaskInterface.register(_PROOF, eager_mask)
    with _attention(model, _PROOF):
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
    """Of the model's last hidden state, in its own precision."""
    ids_1T = _ids(model)
    own = _last(model, ids_1T)
    if model._can_set_attn_implementation():
        with _attention(model, EAGER):
            eager = _last(model, ids_1T)
    else:
        eager = _last(_twin(model), ids_1T)
    gap = _mean_share(own, eager)
    # Two ways of rounding, layer after layer.
    explained = 16 * torch.finfo(own.dtype).eps * math.sqrt(model.config.get_text_config().num_hidden_layers)
    if gap <= max(_TOLERANCE, explained):
        return 0.0
    # A model that is never the same twice is refused elsewhere, and not for its attention.
    return gap if _mean_share(own, _last(model, ids_1T)) <= gap / 10 else 0.0


def _last(model: Any, ids_1T: Tensor) -> Tensor:
    """The last states, or the logits of a model whose body is not found."""
    output = model.base_model(input_ids=ids_1T, use_cache=False)
    found = getattr(output, "last_hidden_state", None)
    return output.logits if found is None else found


def _twin(model: Any) -> PreTrainedModel:
    """The same weights, not copied, in a model that was built with eager attention."""
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
def _attention(model: Any, name: str) -> Iterator[None]:
    before = attention_of(model)
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _eager_of(module: Any) -> Callable[..., Any]:
    for kind in type(module).__mro__:
        found = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise NotImplementedError(f"{type(module).__name__} has no eager attention beside it")


def _mean_share(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().mean() / expected.float().abs().mean().clamp_min(1e-30))


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _ids(model: Any) -> Tensor:
    config = model.config.get_text_config()
    number = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
    return (torch.arange(number, device=model.device) * 37 + 11)[None] % config.vocab_size
