"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from kdcache.config.train import OptimizerConfig


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Rate of a step.

    Args:
        step: 0 for the first, below num_steps.
        num_steps: of the whole run.
        config: rate, warm-up and shape.

    Returns:
        Rises linearly over the warm-up steps and reaches config.lr with the last of them; then falls from it to
        config.lr * config.final_fraction at the last step, or stays.
    """
    num_warmup = round(config.warmup_fraction * num_steps)
    if step < num_warmup:
        return config.lr * (step + 1) / num_warmup
    progress = (step - num_warmup + 1) / max(1, num_steps - num_warmup)
    if config.schedule == "constant":
        return config.lr
    falling = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_fraction + (1 - config.final_fraction) * falling)
