"""Several divergences in one loss: their slopes add up, so that one pass over the logits serves them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.kernels.divergences import Divergence, get_divergence


@dataclass(frozen=True, slots=True, eq=False)
class WeightedDivergence:
    """One divergence of a sum.

    Attributes:
        divergence: a name, or one made with its options.
        weight: a finite number of at least 0, or one per position, (P,); no gradient flows into it.
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
            T^2) in their order, then the cross entropy, 0 where its weight is 0. Each is reduced as the loss is. It
            is multiplied by its weight where that is (P,), and not where it is a number: the loss is the sum over value or
            weight * value. (D + 1, P) for the reduction `none`; None before the first call.
        measures: further numbers that the divergences say are worth watching, of the latest call and reduced as the loss is, by
            `<index of the part>.<measure>`.

    Raises:
        LossError: parts is empty, or has something of another type.
    """

    parts: Sequence[WeightedDivergence]
    cross_entropy: float | Tensor = 0.0
    values: Tensor | None = field(default=None, init=False, repr=False)
    measures: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise LossError("a DivergenceSum has no parts; give it at least one WeightedDivergence")
        for part in self.parts:
            if not isinstance(part, WeightedDivergence):
                raise LossError(f"a part of a DivergenceSum is {part!r}, but must be a WeightedDivergence(divergence, weight)")
            name = part.divergence if isinstance(part.divergence, str) else part.divergence.name
            _check_weight(part.weight, f"the weight of {name}")
        _check_weight(self.cross_entropy, "cross_entropy")

    def watched(self) -> list[tuple[str, WeightedDivergence]]:
        """The measures of the parts as parts of weight 0, with their names."""
        return [
            (f"{index}.{name}", WeightedDivergence(measure, 0.0, part.tail, part.entries, part.temperature))
            for index, part in enumerate(self.parts)
            for name, measure in get_divergence(part.divergence).measures().items()
        ]

    def keep(self, values: Tensor) -> None:
        """Take what a loss found: (parts + measures + 1, ...)."""
        watched, num_parts = self.watched(), len(self.parts)
        # Without a position there is no chunk that would say how many they are.
        values = values.detach() if values.ndim else values.detach().expand(num_parts + len(watched) + 1)
        self.measures = {name: values[num_parts + index] for index, (name, _) in enumerate(watched)}
        self.values = torch.cat([values[:num_parts], values[-1:]])


def _check_weight(weight: float | Tensor, what: str) -> None:
    # Not math.isfinite, which torch.compile cannot trace where numbers are symbols.
    if not isinstance(weight, Tensor) and not 0 <= weight < math.inf:
        raise LossError(f"{what} is {weight!r}, but must be finite and at least 0")
