"""The Jensen-Shannon divergence beside TRL's: the same with `gkd_scale`, and by how much it differs without."""

from __future__ import annotations

import pytest
import torch
from loose_calls import sparse_kd_loss

from kdcache.kernels.divergences import JensenShannon

gkd_trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer")


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_with_gkd_scale_loss_and_gradient_are_trls(beta: float, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student_PV, teacher_PV = (3 * torch.randn(6, 17, generator=generator) for _ in range(2))
    student_PV.requires_grad_()
    theirs = gkd_trainer.GKDTrainer.generalized_jsd_loss(student_PV[None], teacher_PV[None], beta=beta, reduction="sum")
    (their_gradient,) = torch.autograd.grad(theirs, student_PV)
    logprobs_PV = teacher_PV.log_softmax(dim=-1)
    entries = torch.arange(17).expand(6, 17), logprobs_PV, torch.zeros(6)
    ours = {}
    for scale in (0, 1):
        divergence = JensenShannon(beta, gkd_scale=scale)
        loss = sparse_kd_loss(student_PV, *entries, divergence=divergence, reduction="sum", backend=backend)
        ours[scale] = loss.detach()
        if scale:
            (gradient,) = torch.autograd.grad(loss, student_PV)
            torch.testing.assert_close(gradient, their_gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[1], theirs.detach(), rtol=1e-5, atol=1e-6)
    expected = 1 / (beta * (1 - beta)) if 0 < beta < 1 else 1.0
    torch.testing.assert_close(ours[0] / ours[1], torch.tensor(expected), rtol=1e-5, atol=1e-6)
