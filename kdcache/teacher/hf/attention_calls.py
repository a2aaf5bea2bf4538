"""What the attention function of chosen layers is called with, and from it the most probable keys of each head.

Queries and keys are held while the model runs; probabilities are made afterwards in float32, a few positions at a time, so that
a map of all positions by all keys never exists.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from kdcache.errors import ConfigError
from kdcache.teacher.features import SMALLEST_PROBABILITY, find_decoder, shape_of_fields
from kdcache.teacher.hf.attention import EAGER, attention_of, eager_of, with_attention

_SEEN = "kdcache_seen"
_MOST_SCORES = 2**23
"""Scores that exist at once: 32 MiB."""

_PROOF_ERROR = 2e-3


@dataclass(frozen=True)
class AttentionCall:
    """One call of a layer's attention function; queries and keys after the rotary embedding.

    Attributes:
        query_BhTd: query heads.
        key_BhKd, value_BhKd: key-value heads, not repeated. The last key is that of the last query.
        mask: what may be seen, as the function gets it; None for all keys up to the position.
        options: of the function.
    """

    query_BhTd: Tensor
    key_BhKd: Tensor
    value_BhKd: Tensor
    mask: Tensor | None
    options: dict[str, Any]

    def tensor_of(self, kind: str) -> Tensor:
        """(B, heads, T, numbers per head): the queries, keys or values."""
        return {"queries": self.query_BhTd, "keys": self.key_BhKd, "values": self.value_BhKd}[kind]

    def probabilities(self, b: int, index_C: Tensor) -> Tensor:
        """(h, C, K) float32: what the heads give to each key at some positions of this call, of text b of the batch.

        Sinks and masked keys take their part, so a head may give less than 1 in all.
        """
        key_hKd = self.key_BhKd[b].float()
        query_hCd = self.query_BhTd[b][:, index_C].float()
        groups = len(query_hCd) // len(key_hKd)
        scores = torch.einsum("kgcd,kjd->kgcj", query_hCd.unflatten(0, (len(key_hKd), groups)), key_hKd).flatten(0, 1)
        scores = scores * self._scaling()
        if (cap := self.options.get("softcap")) is not None:
            scores = torch.tanh(scores / cap) * cap
        scores = self._masked(scores, b, index_C)
        if (sinks := self.options.get("s_aux")) is not None:
            sinks_hC1 = sinks.float().reshape(-1, 1, 1).expand(-1, scores.shape[1], 1)
            return torch.cat([scores, sinks_hC1], dim=-1).softmax(-1)[..., :-1]
        return scores.softmax(-1)

    def top_keys(self, b: int, index_P: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """The most probable keys of each head at some positions of this call.

        Returns:
            (P, heads x top) float32 probabilities, falling, 0 where there are fewer keys; and int32, how far back each key is.
        """
        num_heads, num_keys = self.query_BhTd.shape[1], self.key_BhKd.shape[2]
        size = max(1, _MOST_SCORES // (num_heads * num_keys))
        first = num_keys - self.query_BhTd.shape[2]
        parts = [self._top(b, index_C, top, first) for index_C in index_P.split(size)]
        width = num_heads * top
        if not parts or not len(index_P):
            return torch.zeros(0, width), torch.zeros(0, width, dtype=torch.int32)
        values, distances = (torch.cat(each) for each in zip(*parts, strict=True))
        return values, distances

    def _top(self, b: int, index_C: Tensor, top: int, first: int) -> tuple[Tensor, Tensor]:
        found = self.probabilities(b, index_C).topk(min(top, self.key_BhKd.shape[2]), dim=-1)
        values_hCk, keys_hCk = found.values, found.indices
        values_hCk = values_hCk.masked_fill(values_hCk < SMALLEST_PROBABILITY, 0.0)
        distances_hCk = (index_C + first)[None, :, None] - keys_hCk
        distances_hCk = torch.where(values_hCk > 0, distances_hCk, torch.zeros_like(distances_hCk))
        missing = top - values_hCk.shape[-1]
        both = (torch.nn.functional.pad(each, (0, missing)).transpose(0, 1).flatten(1) for each in (values_hCk, distances_hCk))
        values, distances = both
        return values, distances.to(torch.int32)

    def _scaling(self) -> float:
        scaling = self.options.get("scaling")
        return self.query_BhTd.shape[-1] ** -0.5 if scaling is None else float(scaling)

    def _masked(self, scores_hCK: Tensor, b: int, index_C: Tensor) -> Tensor:
        num_keys = scores_hCK.shape[-1]
        if self.mask is not None:
            mask_hCK = self.mask[b if len(self.mask) > 1 else 0][:, index_C, :num_keys]
            return scores_hCK.masked_fill(~mask_hCK, -torch.inf) if mask_hCK.dtype == torch.bool else scores_hCK + mask_hCK
        keys_K = torch.arange(num_keys, device=scores_hCK.device)
        back_CK = (index_C + num_keys - self.query_BhTd.shape[2])[:, None] - keys_K
        hidden = back_CK < 0
        if (window := self.options.get("sliding_window")) is not None:
            hidden = hidden | (back_CK >= window)
        return scores_hCK.masked_fill(hidden, -torch.inf)


@contextmanager
def seen_calls(model: Any, layers: Sequence[int]) -> Iterator[dict[int, AttentionCall]]:
    """Hold what the attention function of these layers is called with in each forward pass, while the context is open.

    Raises:
        ConfigError: the layers are not found, or the model does not let its attention function be chosen.
    """
    calls: dict[int, AttentionCall] = {}
    if not layers:
        yield calls
        return
    name = attention_of(model)
    shape = shape_of_fields(model.config.get_text_config().to_dict())
    found = None if shape is None else find_decoder(model, shape.num_layers)
    if found is None or name is None or not model._can_set_attn_implementation():
        raise ConfigError(f"features: the attention of {type(model).__name__} cannot be seen; use kind hidden")
    layer_of = {id(part): layer for layer in layers for part in found[1][layer - 1].modules()}

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        if id(module) in layer_of:
            calls[layer_of[id(module)]] = AttentionCall(query, key, value, mask, options)
        return _function_of(module, name)(module, query, key, value, mask, **options)

    AttentionInterface.register(_SEEN, attention)
    AttentionMaskInterface.register(_SEEN, ALL_MASK_ATTENTION_FUNCTIONS[name])
    with with_attention(model, _SEEN):
        yield calls


@torch.no_grad()
def prove_calls(model: Any, layers: Sequence[int], ids_1T: Tensor) -> None:
    """Compare the probabilities that we make with those of the model's own eager attention, on a few tokens.

    Raises:
        ConfigError: they differ: the attention has an option that is not known here.
    """
    expected: dict[int, Tensor] = {}
    with seen_calls(model, layers) as calls:
        model(input_ids=ids_1T, use_cache=False)
        seen = dict(calls)
    missing = [layer for layer in layers if layer not in seen]
    if not missing:
        with with_attention(model, EAGER):
            found = model(input_ids=ids_1T, use_cache=False, output_attentions=True).attentions
        expected = {layer: found[layer - 1] for layer in layers if found is not None and found[layer - 1] is not None}
    index_T = torch.arange(ids_1T.shape[1], device=ids_1T.device)
    for layer in layers:
        if layer in expected:
            own = seen[layer].probabilities(0, index_T)
            if float((own - expected[layer][0].float()).abs().max()) <= _tolerance(model):
                continue
        raise ConfigError(
            f"features: the attention of layer {layer} of {type(model).__name__} is not the softmax of its queries and keys as "
            "kdcache computes it; leave kind attention out"
        )


def _tolerance(model: Any) -> float:
    return _PROOF_ERROR if model.dtype == torch.float32 else 0.05


def _function_of(module: Any, name: str) -> Any:
    if name == EAGER:
        return eager_of(module)
    interface = sys.modules[type(module).__module__].__dict__.get("ALL_ATTENTION_FUNCTIONS", AttentionInterface())
    return interface[name]
