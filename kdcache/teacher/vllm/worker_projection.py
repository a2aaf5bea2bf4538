"""The output projection of a model in vLLM's worker, read by projecting unit vectors.

So it does not matter how the weight is laid out, packed or spread over ranks, and what comes is what the engine computes with:
of a quantised head, the numbers after dequantisation. A product of a unit vector has one term, so nothing is rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.errors import ConfigError
from kdcache.format.output_projection import FinalNorm, OutputProjection
from kdcache.teacher.features import find_decoder
from kdcache.teacher.sidecars import describe_norm
from kdcache.teacher.vllm import internals
from kdcache.teacher.vllm.layers import final_norm
from kdcache.teacher.vllm.wire import pack_array, unpack_array

_CHUNK = 256
"""Unit vectors that are projected at once."""


@torch.inference_mode()
def read_projection(worker: Any, *, keeps: bool) -> dict[str, Any] | None:
    """See the module's docstring; every rank must call it. None on ranks whose answer does not count.

    Returns:
        What `projection_from` takes, or {"problem": reason}.
    """
    model, (size, dtype, device) = worker.model_runner.model, internals.hidden_layout(worker)
    processors = [module for module in model.modules() if hasattr(module, "_gather_logits")]
    if len(processors) != 1 or not hasattr(processors[0], "scale") or not hasattr(processors[0], "soft_cap"):
        return {"problem": f"the logits of {type(model).__name__} are not made by one LogitsProcessor"}
    (processor,) = processors
    scale, softcap, project = processor.scale, processor.soft_cap, internals.projection(worker)
    processor.scale, processor.soft_cap = 1.0, None
    columns: list[Any] = []
    try:
        zero_1V = project(torch.zeros(1, size, dtype=dtype, device=device))
        for start in range(0, size, _CHUNK):
            width = min(_CHUNK, size - start)
            unit_CH = torch.zeros(width, size, dtype=dtype, device=device)
            unit_CH[torch.arange(width), start + torch.arange(width)] = 1.0
            logits_CV = project(unit_CH)
            if keeps and logits_CV is not None and zero_1V is not None:
                columns.append((logits_CV.float() - zero_1V.float()).to(dtype).cpu())
    finally:
        processor.scale, processor.soft_cap = scale, softcap
    if not keeps or zero_1V is None:
        return None
    bias_V = zero_1V[0].to(dtype).cpu()
    return {
        "weight": pack_array(_as_array(torch.cat(columns).T.contiguous())),
        "bias": pack_array(_as_array(bias_V)) if bool(bias_V.any()) else None,
        "logit_scale": float(scale),
        "softcap": None if softcap is None else float(softcap),
        "tied": bool(getattr(worker.model_config.hf_text_config, "tie_word_embeddings", False)),
        "norm": _norm_of(worker, model),
    }


def projection_from(packed: dict[str, Any]) -> OutputProjection:
    """What `read_projection` gave; raises ConfigError where that is a problem."""
    if "problem" in packed:
        raise ConfigError(f"sidecars: vLLM gives no output_projection: {packed['problem']}; leave it out")
    return OutputProjection(
        weight_VH=unpack_array(packed["weight"]),
        bias_V=None if packed["bias"] is None else unpack_array(packed["bias"]),
        logit_scale=packed["logit_scale"],
        softcap=packed["softcap"],
        is_tied=packed["tied"],
        norm=None if packed["norm"] is None else _norm_from(packed["norm"]),
    )


def _norm_from(packed: dict[str, Any]) -> FinalNorm:
    bias_H = None if packed["bias"] is None else unpack_array(packed["bias"])
    return FinalNorm(unpack_array(packed["weight"]), bias_H, *packed["is"])


def _norm_of(worker: Any, model: Any) -> dict[str, Any] | None:
    parent, _ = find_decoder(model, worker.model_config.get_total_num_hidden_layers()) or (None, ())
    norm = final_norm(parent)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if norm is None or weight is None:
        return None

    def apply(states: NDArray[Any]) -> NDArray[Any]:
        output = norm(torch.from_numpy(states).to(weight.device, weight.dtype))
        return (output[0] if isinstance(output, tuple) else output).float().cpu().numpy()

    weight_H = weight.detach().float().cpu().numpy()
    bias_H = None if bias is None else bias.detach().float().cpu().numpy()
    found = describe_norm(norm, weight_H, bias_H, apply, str(weight.dtype).removeprefix("torch."))
    if found is None:
        return None
    packed_bias = None if found.bias_H is None else pack_array(found.bias_H)
    return {
        "weight": pack_array(found.weight_H),
        "bias": packed_bias,
        "is": [found.eps, found.offset, found.subtracts_mean],
    }


def _as_array(tensor: Any) -> NDArray[Any]:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()
