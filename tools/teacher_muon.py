"""Muon (Jordan et al. 2024) that orthogonalises in a dtype of our choice; `torch.optim.Muon` takes bfloat16 everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Those of torch.optim.Muon: of the quintic, its slope at 0 and the steps that it is iterated.
A, B, C, STEPS, EPS = 3.4445, -4.7750, 2.0315, 5, 1e-7


class Muon(torch.optim.Optimizer):
    """As `torch.optim.Muon`, with Nesterov's momentum, for matrices."""

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, weight_decay: float, momentum: float, dtype: torch.dtype
    ) -> None:
        """See `torch.optim.Muon`.

        Args:
            dtype: of the products that orthogonalise: bfloat16 where the processor computes in it, else float32.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every matrix that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(weight, group)
        return loss

    def _step(self, weight: Tensor, group: dict[str, Any]) -> None:
        mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
        mean.lerp_(weight.grad, 1 - group["momentum"])
        update = orthogonalized(weight.grad.lerp(mean, group["momentum"]), self._dtype)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1, weight.shape[0] / weight.shape[1])))


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """About U V^T of the matrix's singular value decomposition, by Newton and Schulz's iteration."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype, copy=True)
    x = x.T if is_tall else x
    x.div_(x.norm().clamp(min=EPS))
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if is_tall else x
