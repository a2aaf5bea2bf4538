"""The weight of a term as a pure function of the step."""

from __future__ import annotations

from kdcache.config.terms import WeightSchedule


def weight_at(weight: float | WeightSchedule, step: int, num_steps: int) -> float:
    """Weight of a step.

    Args:
        weight: a constant, or what changes.
        step: 0 for the first, below num_steps.
        num_steps: of the whole run.
    """
    if not isinstance(weight, WeightSchedule):
        return float(weight)
    start, peak, end = weight.start or 0.0, weight.peak or 0.0, weight.end or 0.0
    if weight.schedule == "linear":
        return _between(start, end, step / max(1, num_steps - 1))
    num_warmup, num_decay = round(weight.warmup * num_steps), round(weight.decay * num_steps)
    num_left = num_steps - step - 1
    if step < num_warmup:
        return _between(start, peak, step / num_warmup)
    if num_left < num_decay:
        return _between(end, peak, num_left / num_decay)
    return peak


def _between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share
