"""Several divergences in one loss: their slopes add up, so that one pass over the logits serves them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.kernels.divergences import Divergence
from kdcache.loss.prepare import LossSettings


@dataclass(frozen=True, slots=True, eq=False)
class WeightedDivergence:
    """One divergence of a sum.

    Attributes:
        divergence: a name, or one made with its options.
        weight: a finite number of at least 0, or one per position, (P,).
        tail: tail policy of this divergence; None for the best one known, as in `LossSettings`.
        entries: `exact` or `unbiased`, as in `LossSettings`; None for the best.
        temperature: of both sides; None for the loss's own. Each further temperature costs one more pass over the logits.
    """

    divergence: str | Divergence
    weight: float | Tensor = 1.0
    tail: str | None = None
    entries: str | None = None
    temperature: float | None = None


@dataclass(slots=True, eq=False)
class DivergenceSum:
    """sum of weight * T^2 * divergence, plus a weight times the cross entropy of the target ids; for `divergence=` of a loss.

    Attributes:
        parts: the divergences, at least one.
        cross_entropy: weight of the cross entropy of the target ids at temperature 1: a number, or one per position. It stands
            for `alpha`, which stays at 1.
        values: what the latest call of a loss was the sum of, (D + 1,) float64 without a gradient: the D divergences (times
            T^2) in their order, then the cross entropy, 0 where its weight is 0. Each is reduced as the loss is, and not
            multiplied by its weight: where all weights are numbers, the loss is their sum over weight * value. (D + 1, P) for
            the reduction `none`; None before the first call.

    Raises:
        LossError: parts is empty, or has something of another type.
    """

    parts: Sequence[WeightedDivergence]
    cross_entropy: float | Tensor = 0.0
    values: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise LossError("a DivergenceSum has no parts; give it at least one WeightedDivergence")
        for part in self.parts:
            if not isinstance(part, WeightedDivergence):
                raise LossError(f"a part of a DivergenceSum is {part!r}, but must be a WeightedDivergence(divergence, weight)")


def part_by_part(
    call: Callable[..., Tensor], total: DivergenceSum, student: Tensor, weights_P: Tensor | None, settings: LossSettings
) -> Tensor:
    """The sum with one call of a loss per part: `call(divergence=, alpha=, temperature=, weights=, settings=)`."""
    cross_entropy = WeightedDivergence("forward_kl", total.cross_entropy)
    base_P = (
        torch.ones(len(student), dtype=torch.float64, device=student.device)
        if weights_P is None
        else weights_P.detach().double()
    )
    if settings.reduction == "mean":
        base_P = base_P / base_P.sum().clamp_min(1e-300)
    losses: list[Tensor] = []
    values: list[Tensor] = []
    for part, alpha in [*((part, 1.0) for part in total.parts), (cross_entropy, 0.0)]:
        if not isinstance(part.weight, Tensor) and part.weight == 0 and alpha == 0:
            values.append(torch.zeros_like(values[0]))
            continue
        reduction = "none" if settings.reduction == "none" else "sum"
        asked = {
            "divergence": part.divergence,
            "alpha": alpha,
            "settings": replace(settings, tail=part.tail, entries=part.entries, reduction=reduction),
        }
        if part.temperature is not None:
            asked["temperature"] = part.temperature
        with torch.no_grad():
            values.append(call(weights=base_P, **asked).double())
        losses.append(call(weights=base_P * part.weight, **asked))
    total.values = torch.stack(values)
    return torch.stack(losses).sum(dim=0)
