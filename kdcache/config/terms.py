"""The terms of a training loss: what is added up, with which weights over time and over positions."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from kdcache import extensions
from kdcache.config.base import Config, Fraction, NonNegativeFloat


class WeightSchedule(Config, frozen=True, kw_only=True):
    """A weight that changes over a training; lengths are shares of all steps.

    Attributes:
        schedule: `linear` goes from `start` at the first step to `end` at the last. `warmup_stable_decay` rises from `start`
            to `peak` over the first `warmup` of all steps, stays, and goes to `end` over the last `decay` of them.
        start: weight of the first step.
        peak: weight of the stable part, of `warmup_stable_decay` alone.
        end: weight of the last step.
        warmup: share of all steps, of `warmup_stable_decay` alone.
        decay: share of all steps, of `warmup_stable_decay` alone.
    """

    schedule: Literal["linear", "warmup_stable_decay"]
    start: NonNegativeFloat = 0.0
    peak: NonNegativeFloat = 1.0
    end: NonNegativeFloat = 0.0
    warmup: Fraction = 0.0
    decay: Fraction = 0.0


class TermConfig(Config, frozen=True, kw_only=True):
    """One term of the loss: `divergence`, `cross_entropy`, another of ours, or one of an installed package's.

    Attributes:
        term: its name; packages bring others by entry points of the group `kdcache.losses`.
        weight: what its mean is multiplied by: a number, or a schedule over the training.
        balance: `equal` multiplies by the ratio of the first term's magnitude to this one's, as a constant of each step.
        options: the term's own parameters, by name.
    """

    term: str
    weight: NonNegativeFloat | WeightSchedule = 1.0
    balance: Literal["none", "equal"] = "none"
    options: dict[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not extensions.is_known("losses", self.term):
            known = ", ".join(map(repr, extensions.names("losses"))) or "none is installed"
            raise ValueError(f"term is {self.term!r}, but must be the name of an installed package's loss term: {known}")
