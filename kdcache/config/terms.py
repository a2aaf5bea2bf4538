"""The terms of a training loss: what is added up, with which weights over time and over positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from kdcache import extensions
from kdcache.config.base import Config, Fraction, NonNegativeFloat

OF_LOGITS = ("divergence", "cross_entropy")
"""The terms that the short form (`loss.alpha`, `loss.divergence`, ...) stands for."""


class WeightSchedule(Config, frozen=True, kw_only=True):
    """A weight that changes over a training; lengths are shares of all steps.

    Attributes:
        schedule: `linear` goes from `start` at the first step to `end` at the last. `warmup_stable_decay` goes from `start`
            over the first `warmup` of all steps to `peak`, stays there, and goes to `end` over the last `decay` of them.
        start: weight of the first step; `linear` needs it, `warmup_stable_decay` has 0 where it is null.
        peak: weight of the stable part; `warmup_stable_decay` needs it, `linear` has none.
        end: weight of the last step; `linear` needs it, `warmup_stable_decay` has 0 where it is null.
        warmup: share of all steps, of `warmup_stable_decay` alone.
        decay: share of all steps, of `warmup_stable_decay` alone.
    """

    schedule: Literal["linear", "warmup_stable_decay"]
    start: NonNegativeFloat | None = None
    peak: NonNegativeFloat | None = None
    end: NonNegativeFloat | None = None
    warmup: Fraction = 0.0
    decay: Fraction = 0.0

    def __post_init__(self) -> None:
        if self.schedule == "linear":
            if self.peak is not None or self.warmup or self.decay:
                raise ValueError("peak, warmup and decay belong to the schedule warmup_stable_decay; linear has start and end")
            missing = [f"`{name}`" for name, value in (("start", self.start), ("end", self.end)) if value is None]
            if missing:
                are = "is" if len(missing) == 1 else "are"
                raise ValueError(
                    f"{' and '.join(missing)} {are} missing: a linear schedule needs both, as in "
                    "{schedule: linear, start: 1.0, end: 0.0}"
                )
            if self.start == self.end:
                raise ValueError(f"a linear schedule goes from {self.start:g} to {self.end:g}; give a number for a constant")
        elif self.peak is None:
            raise ValueError(
                "`peak` is missing: warmup_stable_decay needs the weight of its stable part, as in "
                "{schedule: warmup_stable_decay, peak: 1.0, warmup: 0.1, decay: 0.2}"
            )
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup:g} and decay {self.decay:g} are more than all steps; they may add up to 1")


class Varying(Config, frozen=True, kw_only=True):
    """A number that differs from position to position.

    Attributes:
        by: `role` of the token that a position predicts and `domain` of its sequence have `values`; the teacher's `entropy`,
            its `nll` of the target id and the `kept_mass` of the exact entries have `low` and `high`.
        values: name -> number, of `role` and `domain`.
        otherwise: number of what `values` does not name, and, for `nll`, of positions without a target id.
        low: [a, number at a and below], of `entropy` and `nll` in nats, or `kept_mass` in [0, 1].
        high: [b, number at b and above]; in between the number changes linearly.
    """

    by: Literal["role", "domain", "entropy", "nll", "kept_mass"]
    values: dict[str, float] = msgspec.field(default_factory=dict)
    otherwise: float | None = None
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None

    @property
    def is_named(self) -> bool:
        """Whether numbers belong to names and not to ranges."""
        return self.by in ("role", "domain")

    @property
    def all_values(self) -> list[float]:
        """Every value that a position may have."""
        ends = [end[1] for end in (self.low, self.high) if end is not None]
        return [*self.values.values(), *ends, *([] if self.otherwise is None else [self.otherwise])]

    def __post_init__(self) -> None:
        if self.is_named:
            if not self.values or self.otherwise is None or self.low or self.high:
                raise ValueError(f"by: {self.by} needs `values` and `otherwise`, as in {{values: {{a: 1.0}}, otherwise: 0.0}}")
            return
        if self.values or self.low is None or self.high is None or (self.by == "nll" and self.otherwise is None):
            rest = " and `otherwise`, for positions without a target id" if self.by == "nll" else ""
            raise ValueError(f"by: {self.by} needs `low` and `high`, as in {{low: [0.5, 1.0], high: [4.0, 0.1]}}{rest}")
        if not self.low[0] < self.high[0]:
            raise ValueError(f"low is at {self.low[0]:g}, but must be below high, which is at {self.high[0]:g}")


class TermConfig(Config, frozen=True, kw_only=True):
    """One term of the loss: `divergence`, `cross_entropy`, another of ours, or one of an installed package's.

    Attributes:
        term: its name; packages bring others by entry points of the group `kdcache.losses`.
        weight: what its mean is multiplied by: a number, or a schedule over the training. A term of weight 0 is left out.
        per_position: further factors of the weight, by position; the mean is still taken over all positions.
        balance: `equal` multiplies the weight by the ratio of the first term's mean to this one's in each batch, as a constant.
        options: the term's own parameters, by name; where the term allows it, one may differ by position, as `per_position`.
    """

    term: str
    weight: NonNegativeFloat | WeightSchedule = 1.0
    per_position: Varying | None = None
    balance: Literal["none", "equal"] = "none"
    options: dict[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not extensions.is_known("losses", self.term):
            known = ", ".join(map(repr, extensions.names("losses")))
            raise ValueError(f"term is {self.term!r}, but must be one of ours or of an installed package: {known}")
        if self.per_position is not None and min(self.per_position.all_values) < 0:
            raise ValueError(f"per_position has {min(self.per_position.all_values):g}, but a weight must be at least 0")
        self.varying_options()

    def varying_options(self) -> dict[str, Varying]:
        """The options that differ by position: those with a `by`."""
        found = {name: as_varying(f"options.{name}", value) for name, value in self.options.items()}
        return {name: varying for name, varying in found.items() if varying is not None}

    def plain_options(self) -> dict[str, Any]:
        """The others."""
        return {name: value for name, value in self.options.items() if name not in self.varying_options()}


def as_varying(name: str, value: Any) -> Varying | None:
    """An option's value as a number that differs by position; None unless it is a mapping with `by`.

    Raises:
        ValueError: a mapping with `by` that says something else wrong; begins with the name.
    """
    if not (isinstance(value, Mapping) and "by" in value):
        return None
    try:
        return msgspec.convert(value, Varying)
    except (msgspec.ValidationError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
