"""The output projection of a `transformers` model, proven on a few tokens: what makes logits of its states after the norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.format.output_projection import FinalNorm, OutputProjection
from kdcache.shown import get_logger
from kdcache.teacher.hf.features import PROBE_TOKENS, final_norm
from kdcache.teacher.sidecars import describe_norm

log = get_logger(__name__)

_OFF = {torch.float32: 1e-3}
_OFF_HALF = 0.1
"""Nats, the most that logits of the proof may differ: half precision rounds, and ours are made in float32."""


@torch.no_grad()
def projection_of(model: Any, vocab_size: int) -> OutputProjection:
    """Read the projection of a loaded model.

    Args:
        model: of transformers, in evaluation mode.
        vocab_size: V; what the weight has beyond is padding.

    Raises:
        ConfigError: the logits are not one linear projection of the last states, scaled and capped as the config says.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(head, torch.nn.Linear):
        raise ConfigError(f"sidecars: {type(model).__name__} has no linear output projection to keep; leave it out")
    embedding = model.get_input_embeddings()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    found = OutputProjection(
        weight_VH=as_array(head.weight[:vocab_size]),
        bias_V=None if head.bias is None else as_array(head.bias[:vocab_size]),
        logit_scale=float(scale),
        softcap=getattr(config, "final_logit_softcapping", None),
        is_tied=embedding is not None and embedding.weight.data_ptr() == head.weight.data_ptr(),
        norm=_norm_of(model),
    )
    _prove(model, found, vocab_size)
    return found


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The numbers on the host; bfloat16 as its bits, uint16."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _prove(model: Any, found: OutputProjection, vocab_size: int) -> None:
    ids_1T = (torch.arange(PROBE_TOKENS, device=model.device) + 1)[None] % vocab_size
    states = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
    expected = model(input_ids=ids_1T, use_cache=False).logits[0, :, :vocab_size].float().cpu().numpy()
    off = float(np.abs(found.logits(states.float().cpu().numpy()) - expected).max())
    if not off <= _OFF.get(model.dtype, _OFF_HALF) * max(1.0, float(np.abs(expected).max()) / 8):
        raise ConfigError(
            f"sidecars: the logits of {type(model).__name__} are not its output projection of the last states, scaled and "
            f"capped as its config says (they differ by {off:.2g}); leave output_projection out"
        )


def _norm_of(model: Any) -> FinalNorm | None:
    norm = final_norm(model)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if norm is None or weight is None:
        log.warning("sidecars: the final norm of %s is not known, so output_projection has none", type(model).__name__)
        return None

    def apply(states: NDArray[Any]) -> NDArray[Any]:
        return norm(torch.from_numpy(states).to(weight.device, weight.dtype)).float().cpu().numpy()

    arrays = (None if each is None else each.detach().float().cpu().numpy() for each in (weight, bias))
    weight_H, bias_H = arrays
    assert weight_H is not None
    return describe_norm(norm, weight_H, bias_H, apply, str(weight.dtype).removeprefix("torch."))
