"""A divergence in one file: half the squared distance between the buckets' masses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.kernels.divergences import Divergence


def _compiled(x_6K1, options):  # log P, P, log Q, Q, h, is an estimate
    loss = 0.0
    for b in range(x_6K1.shape[1]):
        gap = x_6K1[3, b] - x_6K1[1, b]
        x_6K1[4, b] = options[0] * x_6K1[3, b] * gap
        loss += options[0] * gap * gap / 2
    return loss


@dataclass(frozen=True, slots=True)
class SquaredDistance(Divergence):
    """scale / 2 * sum (P - Q)^2, which is not in nats.

    Attributes:
        scale: above 0.
    """

    name = "squared_distance"
    for_numba = staticmethod(_compiled)
    scale: float = 1.0

    def __post_init__(self) -> None:
        self._check("scale", 0, 1e6, ends="(]")

    def in_numpy(self, log_p_PK1: Any, log_q_PK1: Any) -> tuple[Any, Any]:
        p_PK1, q_PK1 = np.exp(log_p_PK1), np.exp(log_q_PK1)
        return self.scale * ((q_PK1 - p_PK1) ** 2).sum(axis=1) / 2, self.scale * q_PK1 * (q_PK1 - p_PK1)

    def in_torch(self, masses: Any) -> tuple[Any, Any]:
        gap_PK1 = masses.q_PK1 - masses.p_PK1
        return self.scale * gap_PK1.square().sum(dim=1) / 2, self.scale * masses.q_PK1 * gap_PK1


@dataclass(frozen=True, slots=True)
class SquaredDistanceInTorch(SquaredDistance):
    """The same without a compiled form."""

    name = "squared_distance_in_torch"
    for_numba = None
