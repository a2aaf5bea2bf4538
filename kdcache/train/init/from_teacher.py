"""Load a teacher and cut a student from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from transformers import PreTrainedModel

from kdcache.config.train import StudentConfig
from kdcache.teacher.hf.rotary import mend_rotary
from kdcache.train.init.cut import Cut, cut_student
from kdcache.train.init.layers import Statistics
from kdcache.train.student import load_model, with_attention

Measure = Callable[[PreTrainedModel], Statistics]
"""Gives what a teacher does with some text, as `kdcache.teacher.hf.activations` sums it up."""


def cut_from_teacher(
    config: StudentConfig,
    measure: Measure | None = None,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    look: Callable[[PreTrainedModel], object] = lambda _: None,
) -> Cut:
    """Load a teacher and cut a student from it, on the CPU, with attention that keeps packed documents apart.

    Args:
        config: with `init: from_teacher`.
        measure: gives what the teacher does with some text, where that decides what is cut.
        dtype: of both; `auto` for the checkpoint's.
        look: called with the teacher, before it is let go.

    Raises:
        ConfigError: the teacher does not load, or `cut_student` refuses.
    """
    cuts: list[Cut] = []

    def load(attention: str) -> PreTrainedModel:
        options = {"dtype": dtype, "attn_implementation": attention}
        teacher = load_model(config.model, revision=config.revision, field="student.model", **options).eval()
        mend_rotary(teacher)
        cuts[:] = [cut_student(teacher, config.layers, config.width, None if measure is None else partial(measure, teacher))]
        look(teacher)
        return cuts[0].student

    student = with_attention(load, config.attention, field="student.attention")
    return replace(cuts[0], student=student)
