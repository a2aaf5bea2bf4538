"""Self-Evolution KD (our reconstruction), and the support with the target id in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdcache.errors import LossError
from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels import divergences as d
from kdcache.loss.divergence_sum import DivergenceSum, WeightedDivergence
from kdcache.loss.fused import fused_sparse_kd_loss
from kdcache.loss.prepare import LossSettings
from kdcache.loss.sparse_kd import sparse_kd_loss
from kdcache.loss.support import with_target

BACKENDS = ["numba", "torch"]


def exact_teacher(log_p_PV: torch.Tensor, ids_PK: torch.Tensor, target_ids_P: torch.Tensor) -> SoftTargets[torch.Tensor]:
    """Of a dense one, with some of its entries."""
    logprobs_PK = log_p_PV.gather(1, ids_PK)
    teacher = SoftTargets.of(
        ids_PK, logprobs_PK.float(), (1 - logprobs_PK.exp().sum(dim=1)).clamp_min(0).float(), entries="exact"
    )
    targets_P = log_p_PV.gather(1, target_ids_P.clamp_min(0)[:, None])[:, 0]
    return replace(teacher, target_logprobs_P=torch.where(target_ids_P < 0, torch.nan, targets_P).float())


def losses(z_PV, teacher, target_ids_P, divergence, backend):
    z_PV = z_PV.detach().clone().requires_grad_()
    settings = LossSettings(reduction="none", backend=backend)
    loss_P = sparse_kd_loss(z_PV, teacher, divergence=divergence, target_ids=target_ids_P, settings=settings)
    return loss_P.detach(), torch.autograd.grad(loss_P.sum(), z_PV)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_proxy_has_the_golden_numbers(backend):
    """P = (.6, .25, .05, .1), target id 2 and lam 1/2, so G = (.3, .125, .525, .05); mu 0.2 at every position."""
    log_p_1V, z_1V = torch.tensor([[0.6, 0.25, 0.05, 0.1]]).log(), torch.tensor([[1.0, 0.5, -1.0, 0.2]])
    y_1 = torch.tensor([2])
    constant = d.SelfEvolution(lam=0.5, threshold=0.0, max_share=0.2, softness=0.0)
    for ids_K in ([0, 1, 2, 3], [0, 1, 3], [3, 0]):  # the whole vocabulary; the target outside; two ids in the tail but one
        loss_1, slope_1V = losses(z_1V, exact_teacher(log_p_1V, torch.tensor([ids_K]), y_1), y_1, constant, backend)
        torch.testing.assert_close(loss_1, torch.tensor([0.098553]), rtol=0, atol=1e-6)
        torch.testing.assert_close(slope_1V, torch.tensor([[-0.127303, 0.010701, 0.036512, 0.080090]]), rtol=0, atol=1e-6)


@pytest.fixture
def problem():
    random = torch.Generator().manual_seed(0)
    log_p_PV = (2 * torch.randn(9, 14, generator=random)).log_softmax(dim=1)
    target_ids_P = torch.randint(0, 14, (9,), generator=random)
    target_ids_P[4] = -100
    z_PV = log_p_PV + torch.randn(9, 14, generator=random)
    return z_PV, log_p_PV, target_ids_P, exact_teacher(log_p_PV, log_p_PV.topk(5, dim=1).indices, target_ids_P)


@pytest.mark.parametrize("backend", BACKENDS)
def test_its_limits_are_the_forward_kl_and_the_skew_kl(problem, backend):
    z_PV, _, target_ids_P, teacher = problem
    forward = losses(z_PV, with_target(teacher, target_ids_P), target_ids_P, d.ForwardKL(), backend)
    torch.testing.assert_close(losses(z_PV, teacher, target_ids_P, d.SelfEvolution(max_share=0.0), backend), forward)
    torch.testing.assert_close(losses(z_PV, teacher, target_ids_P, d.SelfEvolution(threshold=1e6), backend), forward)
    constant = d.SelfEvolution(lam=1.0, threshold=0.0, max_share=0.3, softness=0.0)
    found = losses(z_PV, teacher, target_ids_P, constant, backend)
    skewed = losses(z_PV, with_target(teacher, target_ids_P), target_ids_P, d.SkewKL(0.3), backend)
    is_target_P = target_ids_P >= 0
    for one, other, plain in zip(found, skewed, forward, strict=True):
        torch.testing.assert_close(one[is_target_P], other[is_target_P], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one[~is_target_P], plain[~is_target_P])


def dense(z_PV, log_p_PV, target_ids_P, options):
    """Over the whole vocabulary, by autograd."""
    z_PV = z_PV.detach().double().requires_grad_()
    p_PV, q_PV = log_p_PV.double().exp(), z_PV.softmax(dim=1)
    target_PV = torch.nn.functional.one_hot(target_ids_P.clamp_min(0), z_PV.shape[1]).double()
    guide_PV = options.lam * p_PV + (1 - options.lam) * target_PV
    gap_P = torch.where(guide_PV > 0, guide_PV * (guide_PV.log() - q_PV.log()), 0.0).sum(dim=1).detach()
    is_hard_P = (gap_P > options.threshold) & (target_ids_P >= 0)
    mu_P1 = torch.where(is_hard_P, options.max_share * gap_P / (gap_P + options.softness), 0.0)[:, None]
    loss_P = (p_PV * (p_PV.log() - ((1 - mu_P1) * q_PV + mu_P1 * guide_PV).log())).sum(dim=1)
    return loss_P.detach(), torch.autograd.grad(loss_P.sum(), z_PV)[0], is_hard_P


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_the_whole_vocabulary_at_hand_it_is_the_dense_loss(problem, backend):
    z_PV, log_p_PV, target_ids_P, _ = problem
    options = d.SelfEvolution(threshold=0.8)
    expected_P, expected_PV, is_hard_P = dense(z_PV, log_p_PV, target_ids_P, options)
    assert 0 < is_hard_P.sum() < len(is_hard_P) - 1
    whole_PK = torch.arange(14).expand(9, 14).contiguous()
    is_other_PV = whole_PK != target_ids_P[:, None]
    without_PK = torch.stack([row_V[keep_V][:13] for row_V, keep_V in zip(whole_PK, is_other_PV, strict=True)])
    for ids_PK in (whole_PK, without_PK):
        teacher = exact_teacher(log_p_PV, ids_PK, target_ids_P)
        found_P, found_PV = losses(z_PV, teacher, target_ids_P, options, backend)
        torch.testing.assert_close(found_P.double(), expected_P, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found_PV.double(), expected_PV, rtol=1e-4, atol=1e-5)


def test_the_hard_share_is_measured_beside_the_loss_and_falls_over_training(problem):
    z_PV, log_p_PV, target_ids_P, teacher = problem
    hidden_PH, weight_VH = torch.eye(9), z_PV.T.clone().requires_grad_()
    optimizer, seen = torch.optim.Adam([weight_VH], lr=0.1), []
    for _ in range(60):
        total = DivergenceSum([WeightedDivergence(d.SelfEvolution(threshold=0.9))], cross_entropy=0.5)
        loss = fused_sparse_kd_loss(hidden_PH, weight_VH, teacher, divergence=total, target_ids=target_ids_P)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(total.measures["0.hard_share"]))
    assert seen[0] == pytest.approx(
        float(dense(z_PV, log_p_PV, target_ids_P, d.SelfEvolution(threshold=0.9))[2].double().mean())
    )
    assert seen[-1] < seen[0]


def test_the_target_id_is_an_entry_once_whatever_it_was_before():
    """Position by position: an exact entry; an estimate; neither; none. Two exact entries each, one estimate."""
    ids_PK = torch.tensor([[3, 1, 5], [3, 1, 5], [3, 1, 5], [3, 1, 5]])
    logprobs_PK = torch.tensor([[0.5, 0.2, 0.1]] * 4).log()
    teacher = SoftTargets.of(
        ids_PK, logprobs_PK, torch.full((4,), 0.3), entries="mixed", num_exact_P=torch.tensor([2, 2, 2, 2])
    )
    target_ids_P = torch.tensor([1, 5, 7, -100])
    known = torch.tensor([0.9, 0.04, 0.03, torch.nan]).log()
    found = with_target(replace(teacher, target_logprobs_P=known), target_ids_P)
    assert found.token_ids_PK.tolist() == [[3, 1, -1, -1], [3, 1, 5, -1], [3, 1, -1, 7], [3, 1, -1, -1]]
    assert found.entries == "exact"
    assert found.num_exact_P is None
    np.testing.assert_allclose(found.tail_mass_P, [0.3, 0.26, 0.27, 0.3], rtol=1e-6)
    np.testing.assert_allclose(found.logprobs_PK[1, 2].exp(), 0.04, rtol=1e-6)
    np.testing.assert_allclose(found.logprobs_PK[2, 3].exp(), 0.03, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_next_to_a_divergence_that_reads_estimates_each_has_its_own_entries(backend):
    """The target id is an estimate for one of them and an exact entry for the other."""
    ids_PK, logprobs_PK = torch.tensor([[3, 1, 5], [3, 1, 5]]), torch.tensor([[0.5, 0.2, 0.1]] * 2).log()
    teacher = SoftTargets.of(ids_PK, logprobs_PK, torch.full((2,), 0.3), entries="mixed", num_exact_P=torch.tensor([2, 2]))
    teacher = replace(teacher, target_logprobs_P=torch.tensor([0.04, 0.03]).log())
    target_ids_P, z_PV = torch.tensor([5, 7]), torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    settings = LossSettings(reduction="sum", backend=backend)
    kinds = (d.ForwardKL(), d.SelfEvolution(threshold=0.0), d.ReverseKL())
    total = DivergenceSum([WeightedDivergence(kind) for kind in kinds])
    whole = sparse_kd_loss(z_PV, teacher, divergence=total, target_ids=target_ids_P, settings=settings)
    alone = [sparse_kd_loss(z_PV, teacher, divergence=kind, target_ids=target_ids_P, settings=settings) for kind in kinds]
    assert total.values is not None
    torch.testing.assert_close(total.values[:3].float(), torch.stack(alone).detach(), rtol=1e-5, atol=1e-6)
    found_PV, expected_PV = torch.autograd.grad(whole, z_PV)[0], torch.autograd.grad(sum(alone), z_PV)[0]
    torch.testing.assert_close(found_PV, expected_PV, rtol=1e-5, atol=1e-6)


def test_what_is_missing_is_said_in_one_sentence(problem):
    z_PV, _, target_ids_P, teacher = problem
    with pytest.raises(LossError, match="self_evolution needs the target ids, but target_ids is missing"):
        sparse_kd_loss(z_PV, teacher, divergence="self_evolution")
    unknown = replace(teacher, target_logprobs_P=None)
    with pytest.raises(LossError, match=r"logprobs of the target ids are not there.*with_target_logprobs"):
        sparse_kd_loss(z_PV, unknown, divergence="self_evolution", target_ids=target_ids_P)
    with pytest.raises(LossError, match=r"self_evolution's lam has the shape \(3,\), but must have \(9,\)"):
        sparse_kd_loss(z_PV, teacher, divergence=d.SelfEvolution(torch.ones(3)), target_ids=target_ids_P)
    lam_P = torch.ones(9)
    lam_P[1] = 2
    with pytest.raises(LossError, match=r"self_evolution: lam is 2.0 at position 1, but must be in \[0, 1\]"):
        sparse_kd_loss(z_PV, teacher, divergence=d.SelfEvolution(lam_P), target_ids=target_ids_P)
