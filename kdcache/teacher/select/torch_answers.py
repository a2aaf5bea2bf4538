"""One step of writing in torch: a token for each answer of a batch, drawn in whole units of `exact_weights`.

Rounding decides nothing here: from the same logits and the same uniform numbers every processor draws the same tokens. The
logits are the model's. Libraries round them differently, so a draw that is this close to an edge may take the other token
elsewhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdcache.config.capture import GenerateConfig
from kdcache.errors import TeacherError
from kdcache.teacher.select._torch_draws import units_of, weights_of
from kdcache.teacher.select.exact_weights import UNITS


def draw_tokens(logits_BV: Tensor, config: GenerateConfig, uniform_B: Tensor) -> Tensor:
    """(B,) int64: a token for each answer. `kdcache.teacher.generation.draw_from` is the definition; weights are whole units.

    Args:
        logits_BV: any floating dtype.
        config: sampling.
        uniform_B: (B,) float64 in [0, 1).

    Raises:
        TeacherError: a logit is NaN.
    """
    logits_BV = logits_BV.double()
    if logits_BV.isnan().any():
        raise TeacherError(
            "the teacher gave NaN while writing; float16 overflows in many models: set teacher.dtype to bfloat16"
        )
    if config.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV / config.temperature
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)).float()
    units_BV = units_of(weights_of(logits_BV, torch.zeros_like(logits_BV[:, :1])))
    units_BV = _filtered(units_BV, logits_BV, config)
    sums_BV = units_BV.cumsum(dim=-1)
    points_B1 = (uniform_B[:, None] * sums_BV[:, -1:].double()).long()
    return torch.searchsorted(sums_BV, torch.minimum(points_B1, sums_BV[:, -1:] - 1), right=True)[:, 0]


def _filtered(units_BV: Tensor, logits_BV: Tensor, config: GenerateConfig) -> Tensor:
    """The units, 0 for what the filters rule out, in the definition's order. The largest logit is 0 and weighs UNITS."""
    units_BV = units_BV.masked_fill(units_BV < math.ceil(config.min_p * UNITS), 0)
    if 0 < config.top_k < units_BV.shape[1]:
        units_BV = units_BV.masked_fill(logits_BV < logits_BV.topk(config.top_k).values[:, -1:], 0)
    if config.top_p < 1:
        falling_BV, ids_BV = logits_BV.sort(descending=True)
        sums_BV = units_BV.gather(-1, ids_BV).cumsum(dim=-1)
        asked_B1 = (config.top_p * sums_BV[:, -1:].double()).ceil().long()
        last_B1 = torch.searchsorted(sums_BV, asked_B1).clamp(max=units_BV.shape[1] - 1)
        units_BV = units_BV.masked_fill(logits_BV < falling_BV.gather(-1, last_B1), 0)
    return units_BV
