"""A divergence that another package brings: the kernels' contract on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contracts import kernels as contract

from kdcache import SoftTargets, sparse_kd_loss
from kdcache.errors import LossError
from kdcache.kernels import numba_kernels
from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import get_divergence
from kdcache.loss.prepare import LossSettings


def in_numba(logits_PV, targets, objective):
    losses_P, gradients_PV = np.full(len(logits_PV), np.nan), logits_PV.copy()
    numba_kernels.position_losses_and_gradients(gradients_PV, targets, objective, losses_P, 1)
    return losses_P, gradients_PV


def in_torch(logits_PV, targets, objective):
    def loss(weights, reduction):
        return sparse_kd_loss(
            z_PV, teacher, divergence=objective.divergence, alpha=objective.alpha, target_ids=target_ids, weights=weights,
            settings=LossSettings(tail=objective.tail, reduction=reduction, backend="torch"),
        )  # fmt: skip

    z_PV = torch.tensor(logits_PV, requires_grad=True)
    arrays = [torch.tensor(array) for array in (targets.token_ids_PK, targets.logprobs_PK, targets.tail_mass_P)]
    teacher = SoftTargets.of(*arrays, entries="exact")
    target_ids, weights_P = torch.tensor(targets.target_ids_P).long(), torch.tensor(targets.weights_P)
    losses_P = torch.where(weights_P > 0, loss(None, "none").double(), 0.0)
    (gradient_PV,) = torch.autograd.grad(loss(weights_P, "sum"), z_PV)
    return losses_P.detach().numpy(), gradient_PV.numpy()


@pytest.mark.parametrize("compute", [in_numba, in_torch])
@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_kernels_contract(toys, monkeypatch, check, compute):
    divergence = get_divergence("squared_distance", scale=3.0)
    objectives = [Objective("bucket", 1.0, divergence), Objective("bucket", 0.4, divergence)]
    for name in ("OBJECTIVES", "SMOOTH"):
        monkeypatch.setattr(contract, name, objectives)
    check(compute)


def test_the_public_loss_takes_it_by_name_and_compiles(toys):
    teacher = SoftTargets.of(torch.tensor([[1, 2]]), torch.tensor([[-0.5, -2.0]]), torch.tensor([0.258]), entries="exact")
    logits_PV = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    losses = [
        sparse_kd_loss(logits_PV, teacher, divergence=name, settings=LossSettings(backend=backend))
        for name, backend in (
            ("squared_distance", "auto"), ("squared_distance", "torch"), ("squared_distance_in_torch", "auto"),
        )
    ]  # fmt: skip
    compiled = torch.compile(sparse_kd_loss, backend="eager", fullgraph=True)
    losses.append(compiled(logits_PV, teacher, divergence=get_divergence("squared_distance")))
    assert all(loss.item() == pytest.approx(losses[0].item(), rel=1e-5) for loss in losses)


def test_without_a_compiled_form_numba_is_refused_in_words(toys):
    teacher = SoftTargets.of(torch.tensor([[1]]), torch.tensor([[-0.5]]), torch.tensor([0.39]), entries="exact")
    settings = LossSettings(backend="numba")
    with pytest.raises(LossError, match="squared_distance_in_torch has no form for the numba backend; use 'torch', or 'auto'"):
        sparse_kd_loss(torch.zeros(1, 9), teacher, divergence="squared_distance_in_torch", settings=settings)


def test_a_name_that_nobody_brings_is_refused_with_all_there_are():
    with pytest.raises(LossError, match=r"divergence is 'squared_distance', but must be one of 'forward_kl', "):
        get_divergence("squared_distance")
