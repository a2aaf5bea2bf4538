"""A step of writing in torch: one token for each answer, drawn in whole units of `exact_weights`.

Numbers that differ by rounding decide nothing here: from the same logits and the same uniform numbers every processor draws the
same tokens. The logits are the model's; libraries round them as they like, and a draw within that of a border may fall to its
other side elsewhere.

Shape letters: B answers, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdcache.config.capture import GenerateConfig
from kdcache.errors import TeacherError
from kdcache.teacher.select._torch_draws import units_of, weights_of
from kdcache.teacher.select.exact_weights import UNITS


def draw_rows(logits_BV: Tensor, config: GenerateConfig, uniform_B: Tensor) -> Tensor:
    """(B,) int64: `kdcache.teacher.generation.draw_from` for each row, which is the definition, with weights in whole units.

    Args:
        logits_BV: of any float type.
        config: sampling.
        uniform_B: (B,) float64 in [0, 1).

    Raises:
        TeacherError: a logit is NaN.
    """
    logits_BV = logits_BV.double()
    if logits_BV.isnan().any():
        raise TeacherError(
            "the teacher gave NaN while it wrote; float16 overflows in many models: set teacher.dtype to bfloat16"
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
    """The units, 0 for what the filters take out, in the definition's order. The largest logit is 0, its units are UNITS."""
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
