"""torch.func over the losses: right where torch can see through them, refused in a sentence where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loose_calls import fused_sparse_kd_loss, sparse_kd_loss
from torch import Tensor, func

from kdcache.errors import LossError
from kdcache.kernels.divergences import DIVERGENCES

GENERATOR = torch.Generator().manual_seed(0)
LOGITS_PV = torch.randn(4, 12, generator=GENERATOR)
TEACHER = torch.randn(4, 12, generator=GENERATOR).log_softmax(dim=-1).topk(5)
TARGETS = TEACHER.indices, TEACHER.values, 1 - TEACHER.values.exp().sum(dim=1)
TRANSFORMS: dict[str, Callable[[Any, Tensor], object]] = {
    "grad": lambda f, x: func.grad(f)(x),
    "jvp": lambda f, x: func.jvp(f, (x,), (x,)),
    "vmap": lambda f, x: func.vmap(f)(torch.stack([x, x])),
    "jacrev": lambda f, x: func.jacrev(f)(x),
}
OTHERS = ("tail_aware_kl", "self_evolution")  # which need more than entries and a tail
WITH_TAIL = [name for name, kind in DIVERGENCES.items() if "bucket" in kind.requirements.tails and name not in OTHERS]


@pytest.mark.parametrize("divergence", WITH_TAIL)
def test_gradients_of_torch_func_are_those_of_autograd(divergence: str) -> None:
    def loss(logits_PV: Tensor) -> Tensor:
        return sparse_kd_loss(logits_PV, *TARGETS, divergence=divergence)

    logits_PV = LOGITS_PV.clone().requires_grad_()
    (expected_PV,) = torch.autograd.grad(loss(logits_PV), logits_PV)
    torch.testing.assert_close(func.grad(loss)(LOGITS_PV), expected_PV, rtol=1e-4, atol=1e-6)
    _, slope = func.jvp(loss, (LOGITS_PV,), (LOGITS_PV,))
    torch.testing.assert_close(slope, (expected_PV * LOGITS_PV).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", WITH_TAIL)
def test_vmap_gives_each_ones_loss(divergence: str) -> None:
    def loss(logits_PV: Tensor) -> Tensor:
        return sparse_kd_loss(logits_PV, *TARGETS, divergence=divergence)

    two = torch.stack([LOGITS_PV, 2 * LOGITS_PV])
    expected = torch.stack([loss(logits_PV) for logits_PV in two])
    torch.testing.assert_close(func.vmap(loss)(two), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_torch_func_cannot_see_into_is_refused(transform: str) -> None:
    run = TRANSFORMS[transform]
    with pytest.raises(LossError, match=r"torch.func cannot see into this loss.*use LossSettings\(backend='torch'\)"):
        run(lambda logits_PV: sparse_kd_loss(logits_PV, *TARGETS, backend="numba"), LOGITS_PV)
    weight_VH = torch.randn(12, 3, generator=GENERATOR)
    with pytest.raises(LossError, match=r"torch.func cannot see into this loss.*use sparse_kd_loss"):
        run(lambda hidden_PH: fused_sparse_kd_loss(hidden_PH, weight_VH, *TARGETS), LOGITS_PV[:, :3])
