"""Temperature from stored logsumexps, and unbiased targets: what the loss makes of a record, against the dense teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contracts.kernels import make_problem
from loose_calls import fused_sparse_kd_loss, sparse_kd_loss

from kdcache.kernels import divergences as d


class Teacher:
    """A dense teacher (6 positions, 50 ids), its top 5 as a record, and a student."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        whole = make_problem(6, 50, 50, noise=1.0)
        self.log_p_PV = torch.empty(6, 50, dtype=torch.float64)
        ids_PK = torch.tensor(whole.targets.token_ids_PK).long()
        self.log_p_PV.scatter_(1, ids_PK, torch.tensor(whole.targets.logprobs_PK).double())
        top = self.log_p_PV.topk(5, dim=1)
        self.record = {
            "token_ids_PK": top.indices,
            "logprobs_PK": top.values.float(),
            "tail_mass_P": (1 - top.values.exp().sum(dim=1)).float(),
        }
        self.target_ids_P = torch.tensor(whole.targets.target_ids_P)
        self.z_PV = torch.tensor(whole.logits_PV, dtype=dtype, requires_grad=True)

    def log_z_P(self, temperature: float) -> torch.Tensor:
        return (self.log_p_PV / temperature).logsumexp(dim=1).float()

    def dense(self, temperature: float, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
        """T^2 times the K+1 bucket KL of both softmaxes at T, and the gradient by the logits, by autograd in float64."""
        z_PV = self.z_PV.detach().double().requires_grad_()
        buckets = []
        for logits_PV in (self.log_p_PV, z_PV):
            mass_PV = (logits_PV / temperature).softmax(dim=1)
            head_PK = mass_PV.gather(1, self.record["token_ids_PK"])
            buckets.append(torch.cat([head_PK, 1 - head_PK.sum(dim=1, keepdim=True)], dim=1))
        p_PK1, q_PK1 = buckets
        kl_P = (p_PK1 * (p_PK1 / q_PK1).log()).sum(dim=1)
        ce_P = torch.nn.functional.cross_entropy(z_PV, self.target_ids_P.long(), reduction="none")
        loss = (alpha * temperature**2 * kl_P + (1 - alpha) * ce_P).mean()
        return loss.detach(), torch.autograd.grad(loss, z_PV)[0]


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(("temperature", "alpha"), [(2.0, 1.0), (2.0, 0.3), (0.5, 0.7), (4.0, 1.0)])
def test_temperature_from_a_stored_logsumexp_is_that_of_the_dense_teacher(temperature, alpha, backend):
    """The square of T in the value and in the gradient: leaving it out of one of them is the known defect."""
    teacher = Teacher()
    options = {"temperature": temperature, "alpha": alpha, "target_ids_P": teacher.target_ids_P, "backend": backend}
    loss = sparse_kd_loss(teacher.z_PV, **teacher.record, **options, log_z_P=teacher.log_z_P(temperature))
    expected, expected_PV = teacher.dense(temperature, alpha)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    (gradient_PV,) = torch.autograd.grad(loss, teacher.z_PV)
    torch.testing.assert_close(gradient_PV.double(), expected_PV, rtol=2e-5, atol=2e-6)


SOFTENED = [k for k in d.DIVERGENCES.values() if k.requirements.temperature and not k.requirements.target]


@pytest.mark.parametrize("kind", SOFTENED, ids=lambda k: k.name)
def test_every_divergence_with_a_temperature_is_itself_on_softened_masses(kind):
    """L_T(teacher, z) = T^2 L_1(teacher at T, z / T), the fused loss alike."""
    teacher, temperature = Teacher(), 3.0
    soft_PV = teacher.log_p_PV / temperature - teacher.log_z_P(temperature)[:, None]
    head_PK = soft_PV.gather(1, teacher.record["token_ids_PK"])
    softened = {
        "token_ids_PK": teacher.record["token_ids_PK"],
        "logprobs_PK": head_PK.float(),
        "tail_mass_P": (1 - head_PK.exp().sum(dim=1)).float(),
    }
    expected = temperature**2 * sparse_kd_loss(teacher.z_PV / temperature, **softened, divergence=kind(), backend="torch")
    (expected_PV,) = torch.autograd.grad(expected, teacher.z_PV)
    hot = {"temperature": temperature, "log_z_P": teacher.log_z_P(temperature), "divergence": kind()}
    for backend in ("numba", "torch"):
        loss = sparse_kd_loss(teacher.z_PV, **teacher.record, **hot, backend=backend)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        torch.testing.assert_close(torch.autograd.grad(loss, teacher.z_PV)[0], expected_PV, rtol=1e-4, atol=1e-5)
    fused = fused_sparse_kd_loss(teacher.z_PV, torch.eye(50), **teacher.record, **hot, chunk_positions=4)
    torch.testing.assert_close(torch.autograd.grad(fused, teacher.z_PV)[0], expected_PV, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_the_mean_over_random_targets_is_the_dense_gradient(backend):
    """Random Sampling KD with two draws, all outcomes weighed by their probability: exact, not statistical."""
    teacher = Teacher()
    p_V, z_1V = teacher.log_p_PV[0, :12].softmax(dim=0), teacher.z_PV.detach()[:1, :12].clone().requires_grad_()
    mean_1V = torch.zeros(1, 12, dtype=torch.float64)
    for first, second in np.ndindex(12, 12):
        same = first == second
        ids_1K, logprobs_1K = torch.tensor([[first, -1 if same else second]]), torch.tensor([[1.0 if same else 0.5, 0.5]]).log()
        sampled = {"token_ids_PK": ids_1K, "logprobs_PK": logprobs_1K, "tail_mass_P": torch.zeros(1)}
        loss = sparse_kd_loss(z_1V, **sampled, entries="unbiased", tail="drop", backend=backend)
        mean_1V += p_V[first] * p_V[second] * torch.autograd.grad(loss, z_1V)[0].double()
    dense_1V = z_1V.detach().double().softmax(dim=1) - p_V
    torch.testing.assert_close(mean_1V, dense_1V, rtol=0, atol=1e-7)
