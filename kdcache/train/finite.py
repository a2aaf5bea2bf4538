"""Numbers that end the worth of a run: found where they first show, and named with the step and the sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdcache.errors import NotFiniteError

_MOST_NAMES = 8


def not_finite_weight(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that holds a NaN or an infinity; None where there is none.

    Looks at this process's part of a sharded parameter. Buffers may hold -inf on purpose (masks), so only NaN counts there.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(_own_part(parameter)).all()):
            return name
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(torch.isnan(_own_part(buffer)).any()):
            return name
    return None


def check_weights(model: nn.Module, when: str) -> None:
    """Refuse to save a model that is not finite.

    Raises:
        NotFiniteError: names the weight; `when` begins the sentence.
    """
    name = not_finite_weight(model)
    if name is not None:
        raise NotFiniteError(
            f"{when} the weight {name!r} is not finite: nothing is saved, and what was saved before stays; start again with a "
            "lower learning rate or a longer warm-up"
        )


def batch_reason(loss: float, grad_norm: float) -> str | None:
    """What of a step is not finite, in words; None where both are finite."""
    for name, value in (("loss", loss), ("gradient's norm", grad_norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}"
    return None


def shown_sources(sources: Sequence[str]) -> str:
    """Some of a batch's sequences by name, as part of a sentence."""
    rest = f" and {len(sources) - _MOST_NAMES} more" if len(sources) > _MOST_NAMES else ""
    return f"in the batch of the sequences {', '.join(sources[:_MOST_NAMES])}{rest}"


def _own_part(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor.detach() if to_local is None else to_local().detach()
