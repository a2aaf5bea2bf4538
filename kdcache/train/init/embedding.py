"""Some models scale their embeddings by the square root of the hidden size (Gemma): cut channels would come out too small.

What enters the first layer is compared with the teacher's, on those channels. Where it is a multiple, the embeddings are scaled
back; and where they are also the output projection, the final norm gives that much less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcache.teacher.features import find_decoder
from kdcache.teacher.hf.features import PROBE_TOKENS
from kdcache.train.body import text_config
from kdcache.train.init.build import layer_modules
from kdcache.train.init.width import Indices

_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-9}
_ROUNDING_HALF = 2e-2


@torch.no_grad()
def mend_embedding_scale(teacher: PreTrainedModel, student: PreTrainedModel, channels: Indices) -> float:
    """Make the student's first layer read what the teacher's reads, on these channels.

    Returns:
        What the embeddings were multiplied by; 1 where nothing was to be mended, or it could not be.
    """
    there = _entering(teacher)[..., torch.from_numpy(channels).to(teacher.device)]
    here = _entering(student)
    scale = float((here * there).sum() / (there * there).sum())
    rounding = _ROUNDING.get(teacher.dtype, _ROUNDING_HALF)
    is_multiple = float((here - scale * there).norm()) <= rounding * float(here.norm())
    if not is_multiple or abs(scale - 1) <= rounding or scale <= 0:
        return 1.0
    embeddings: Any = student.get_input_embeddings()
    head: Any = student.get_output_embeddings()
    if head is not None and head.weight is embeddings.weight and not _scale_final_norm(student, scale):
        return 1.0
    embeddings.weight.div_(scale)
    return 1 / scale


def _entering(model: Any) -> Tensor:
    """(1, T, H) float32: what enters the first layer for a few tokens."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).float())

    handle = layer_modules(model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        size = int(text_config(model).vocab_size)
        model(input_ids=((torch.arange(PROBE_TOKENS, device=model.device) * 37 + 11) % size)[None], use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def _scale_final_norm(model: Any, scale: float) -> bool:
    """Multiply what the final norm gives, whether its weight is a factor or is added to 1; False where neither does it."""
    found = find_decoder(model, int(text_config(model).num_hidden_layers))
    norms = [m for m in found[0].children() if "norm" in type(m).__name__.lower() and hasattr(m, "weight")] if found else []
    if len(norms) != 1 or getattr(norms[0], "bias", None) is not None:
        return False
    norm = norms[0]
    states_1H = torch.randn(1, norm.weight.shape[0], generator=torch.Generator().manual_seed(0)).to(norm.weight)
    before, weight = norm(states_1H).float(), norm.weight.clone()
    changes: tuple[Callable[[Tensor], Tensor], ...] = (lambda w: w * scale, lambda w: (1 + w) * scale - 1)
    for change in changes:
        norm.weight.copy_(change(weight))
        gap = float((norm(states_1H).float() - scale * before).norm())
        if gap <= _ROUNDING.get(weight.dtype, _ROUNDING_HALF) * float(before.norm()):
            return True
    norm.weight.copy_(weight)
    return False
