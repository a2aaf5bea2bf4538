"""A teacher's logprobs in float16, as a loader may give them, count as the same numbers in float32, for every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.kernels import make_problem
from loose_calls import fused_sparse_kd_loss, sparse_kd_loss
from test_sparse_kd import tensors

OPTIONS: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "renormalised, with labels": {"tail": "renormalize", "alpha": 0.4},
    "reverse_kl": {"divergence": "reverse_kl"},
    "another temperature": {"temperature": 2.0, "log_z_P": True},
}


def both(name: str) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Logits, and the keywords of a loss with float32 and with float16 logprobs of the same values."""
    problem, options = make_problem(5, 30, 4), OPTIONS[name]
    keywords = tensors(problem)
    half_PK = keywords["logprobs_PK"].half()
    if "log_z_P" in options:  # large enough for any support
        options = options | {"log_z_P": torch.full((5,), 3.0)}
    return torch.tensor(problem.logits_PV), [keywords | options | {"logprobs_PK": x} for x in (half_PK.float(), half_PK)]


def loss_and_gradient(z_PV: torch.Tensor, keywords: dict[str, Any], backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    leaf_PV = z_PV.clone().requires_grad_()
    loss = sparse_kd_loss(leaf_PV, **keywords, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, leaf_PV)[0]


def check_rows(name: str, backend: str) -> None:
    z_PV, (single, half) = both(name)
    for found, expected in zip(loss_and_gradient(z_PV, half, backend), loss_and_gradient(z_PV, single, backend), strict=True):
        assert found.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def check_fused(name: str, backend: str) -> None:
    z_PV, keywords = both(name)
    hidden_PH, weight_VH = torch.randn(5, 8), torch.randn(z_PV.shape[1], 8)
    found = []
    for each in keywords:
        leaves = hidden_PH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
        loss = fused_sparse_kd_loss(*leaves, **each, backend=backend, chunk_positions=2)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_gradients_of_half_logprobs_are_those_of_the_same_values(name: str, backend: str):
    check_rows(name, backend)
    check_fused(name, backend)


def test_rounding_the_logprobs_does_change_the_loss():
    z_PV, (_, half) = both("forward_kl")
    exact = tensors(make_problem(5, 30, 4))
    assert loss_and_gradient(z_PV, half, "torch")[0] != loss_and_gradient(z_PV, exact, "torch")[0]
