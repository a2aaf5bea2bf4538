"""The definition against things that do not share its code: hand-made numbers, autograd of dense formulas, differences."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from contracts import kernels as contract
from contracts.kernels import make_problem

from kdcache.kernels import divergences as d
from kdcache.kernels.base import NO_TARGET, TAIL_POLICIES, Objective, make_kernel_inputs
from kdcache.kernels.divergences import _torch_support
from kdcache.kernels.divergences import reference as reference_divergences
from kdcache.kernels.reference import loss_and_gradient, position_losses, position_losses_and_gradients


def compute(logits_PV, targets, objective):
    losses_P, gradients_PV = np.full(len(logits_PV), np.nan), logits_PV.astype(np.float64)
    position_losses_and_gradients(gradients_PV, targets, objective, losses_P)
    return losses_P, gradients_PV


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_reference_keeps_the_contract(check):
    check(compute)


def test_a_row_by_hand():
    """Student uniform over four ids; teacher 1/2 and 1/4 on two of them, 1/4 in the tail, whose two ids hold 1/2."""
    targets = make_kernel_inputs([[2, 0]], np.log([[0.5, 0.25]]), [0.25], vocab_size=4)
    losses = {tail: loss_and_gradient(np.zeros((1, 4)), targets, Objective(tail)) for tail in TAIL_POLICIES}
    assert losses["drop"][0][0] == pytest.approx(0.5 * math.log(2), abs=1e-7)
    np.testing.assert_allclose(losses["drop"][1], [[0.75 / 4 - 0.25, 0.75 / 4, 0.75 / 4 - 0.5, 0.75 / 4]], atol=1e-7)
    assert losses["bucket"][0][0] == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.25 / 0.5), abs=1e-7)
    np.testing.assert_allclose(losses["bucket"][1], [[0.0, 0.25 * 0.5, -0.25, 0.25 * 0.5]], atol=1e-7)
    assert losses["renormalize"][0][0] == pytest.approx(2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(4 / 3), abs=1e-7)
    np.testing.assert_allclose(losses["renormalize"][1], [[0.25 - 1 / 3, 0.25, 0.25 - 2 / 3, 0.25]], atol=1e-7)


def textbook(
    divergence: d.Divergence,
    p: torch.Tensor,
    q: torch.Tensor,
    is_entry: torch.Tensor,
    is_estimate: torch.Tensor | None = None,
    is_target: torch.Tensor | None = None,
) -> torch.Tensor:
    """One row's loss from bucket masses, as papers write it: no stable forms. `is_entry` is not the tail."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a[a > 0] * (a[a > 0] / b[a > 0]).log()).sum()

    entry_p, entry_q = p[is_entry], q[is_entry]
    pairs = [(i, j) for i in range(len(entry_p)) for j in range(len(entry_p)) if entry_p[i] > entry_p[j]]
    gaps = torch.stack([(entry_q[i] / entry_q[j]).log() for i, j in pairs]) if pairs else entry_q[:0]
    match divergence:
        case d.ForwardKL():
            return kl(p, q)
        case d.ReverseKL() | d.JensenShannon(beta=1.0):
            return kl(q, p)
        case d.JensenShannon(beta=0.0):
            return kl(p, q)
        case d.JensenShannon(beta=b):
            m = b * p + (1 - b) * q
            return (b * kl(p, m) + (1 - b) * kl(q, m)) / (1 if divergence.gkd_scale else b * (1 - b))
        case d.SkewKL(skew=s):
            return kl(p, s * p + (1 - s) * q)
        case d.SkewReverseKL(skew=s):
            return kl(q, (1 - s) * p + s * q)
        case d.SelfEvolution(lam=lam, threshold=threshold, max_share=most, softness=softness):
            assert is_target is not None
            guide = lam * p + (1 - lam) * is_target.double()
            gap = kl(guide, q).detach()
            mu = most * gap / (gap + softness) if is_target.any() and gap > threshold else 0.0
            return kl(p, (1 - mu) * q + mu * guide)
        case d.AdaptiveKL():
            order = entry_p.argsort(descending=True)
            head = [int(order[n]) for n in range(len(order)) if n == 0 or entry_p[order[: n + 1]].sum() <= 0.5]
            head_gap = (entry_p - entry_q)[head].abs().sum().detach()
            share = head_gap / (p - q).abs().sum().detach()
            return share * kl(p, q) + (1 - share) * kl(q, p)
        case d.TotalVariation():
            return 0.5 * (p - q).abs().sum()
        case d.Hellinger():
            return 1 - (p * q).sqrt().sum() + (p.sum() + q.sum() - 2) / 2
        case d.AlphaBeta(a=a, b=b):
            c = a + b
            return -(p**a * q**b - a / c * p**c - b / c * q**c).sum() / (a * b)
        case d.DecoupledTopK(inner_temperature=t):
            m, mass_q = entry_p.sum(), entry_q.sum()
            inner_p, inner_q = ((x.log() / t).softmax(dim=0) for x in (entry_p, entry_q))
            outer = kl(torch.stack([m, p[~is_entry].sum()]), torch.stack([mass_q, q[~is_entry].sum()]))
            return outer + m * t**2 * kl(inner_p, inner_q)
        case d.TailAwareKL(tail_weight=w):
            assert is_estimate is not None
            in_tail = is_estimate | ~is_entry
            outer = kl(torch.cat([p[~in_tail], p[~is_entry]]), torch.cat([q[~in_tail], q[in_tail].sum()[None]]))
            t = p[is_estimate]
            return outer + w * t.sum() * kl(t / t.sum(), q[is_estimate] / q[in_tail].sum()) if len(t) else outer
        case d.CenteredMSE():
            return ((entry_q.log() - entry_q.log().mean()) - (entry_p.log() - entry_p.log().mean())).square().mean()
        case d.HingeRanking(margin=margin):
            return (margin - gaps).clamp_min(0).mean()
        case d.LogisticRanking():
            return (1 + (-gaps).exp()).log().mean()
        case d.SoftSpearman():
            inside = torch.ones(1, len(entry_p), dtype=torch.bool)
            ranks = torch.cat([_torch_support.soft_ranks(x.log()[None], inside)[0] for x in (entry_p, entry_q)])
            return 1 - torch.corrcoef(ranks)[0, 1]
    raise AssertionError(divergence)


def dense_loss(z_PV: torch.Tensor, targets, objective: Objective) -> torch.Tensor:
    """The definition once more, row by row over dense probabilities."""
    losses = []
    for row in range(len(z_PV)):
        q_V = (z_PV[row] / objective.temperature).softmax(dim=0)
        ids_K = torch.tensor(targets.token_ids_PK[row]).long()
        p_K, r = torch.tensor(targets.logprobs_PK[row]).double().exp(), torch.tensor(targets.tail_mass_P[row]).double()
        outside_V = torch.ones(len(q_V), dtype=torch.bool)
        outside_V[ids_K] = False
        p, q, is_entry = (
            torch.cat([p_K, r[None]]),
            torch.cat([q_V[ids_K], q_V[outside_V].sum()[None]]),
            torch.arange(len(p_K) + 1),
        )
        if objective.tail == "renormalize":
            p = p_K / p_K.sum()
        if objective.tail == "drop":
            p = p_K
        if objective.tail == "uniform":
            p, q = torch.cat([p_K, (r / outside_V.sum()).expand(int(outside_V.sum()))]), torch.cat([q_V[ids_K], q_V[outside_V]])
        is_estimate = (is_entry >= int(targets.num_exact_P[row])) & (is_entry < len(p_K))
        target_id = int(targets.target_ids_P[row])
        is_target = torch.cat([ids_K == target_id, torch.tensor([target_id != NO_TARGET and target_id not in ids_K])])
        is_what = (is_entry[: len(p)] < len(p_K), is_estimate[: len(p)], is_target[: len(p)])
        losses.append(
            textbook(objective.divergence, p, q[: len(p)], *is_what)
            if objective.tail != "uniform"
            else textbook(objective.divergence, p, q, torch.ones(len(p), dtype=torch.bool))
        )
    target_ids_P = torch.tensor(targets.target_ids_P).long()
    ce_P = torch.nn.functional.cross_entropy(z_PV, target_ids_P, reduction="none", ignore_index=NO_TARGET)
    return objective.alpha * objective.temperature**2 * torch.stack(losses) + (1 - objective.alpha) * ce_P


@pytest.mark.parametrize("objective", contract.OBJECTIVES, ids=str)
def test_reference_equals_autograd_of_a_dense_formula(objective):
    problem = make_problem(6, 40, 7, seed=3, noise=1.0)
    z_PV = torch.tensor(problem.logits_PV, dtype=torch.float64, requires_grad=True)
    expected_P = dense_loss(z_PV, problem.targets, objective)
    (expected_PV,) = torch.autograd.grad((expected_P * torch.tensor(problem.targets.weights_P)).sum(), z_PV)
    losses_P, gradients_PV = loss_and_gradient(problem.logits_PV, problem.targets, objective)
    np.testing.assert_allclose(losses_P, expected_P.detach(), rtol=1e-12, atol=1e-13 * slack(objective))
    np.testing.assert_allclose(gradients_PV, expected_PV, rtol=1e-12, atol=1e-13 * slack(objective))


def slack(objective: Objective) -> float:
    """The Jensen-Shannon divergence has differences of logs over beta: rounding grows by that."""
    beta = objective.divergence.beta if isinstance(objective.divergence, d.JensenShannon) else 1.0
    return 1 / beta if beta else 1.0


def test_jensen_shannon_has_no_jump_at_its_ends():
    problem = make_problem(5, 40, 7, noise=1.0)
    for end, near in ((0.0, 1e-7), (1.0, 1 - 1e-7)):
        at, by = (
            loss_and_gradient(problem.logits_PV, problem.targets, Objective("bucket", 1.0, d.JensenShannon(beta)))
            for beta in (end, near)
        )
        np.testing.assert_allclose(by[0], at[0], rtol=1e-4)
        np.testing.assert_allclose(by[1], at[1], atol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_temperature_is_exact_and_its_square_is_in_value_and_gradient(temperature, alpha):
    """Whole-vocabulary support, so that the dense KL at T is known: T^2 KL(softmax(l / T), softmax(z / T)), by autograd."""
    problem = make_problem(5, 31, 31, seed=1)
    teacher_PV = torch.empty(5, 31, dtype=torch.float64)
    teacher_PV.scatter_(
        1, torch.tensor(problem.targets.token_ids_PK).long(), torch.tensor(problem.targets.logprobs_PK).double()
    )
    z_PV = torch.tensor(problem.logits_PV, dtype=torch.float64, requires_grad=True)
    p_PV, log_q_PV = (teacher_PV / temperature).softmax(dim=1), (z_PV / temperature).log_softmax(dim=1)
    target_ids_P = torch.tensor(problem.targets.target_ids_P).long()
    ce_P = torch.nn.functional.cross_entropy(z_PV, target_ids_P, reduction="none", ignore_index=NO_TARGET)
    expected_P = alpha * temperature**2 * (p_PV * (p_PV.log() - log_q_PV)).sum(dim=1) + (1 - alpha) * ce_P
    (expected_PV,) = torch.autograd.grad((expected_P * torch.tensor(problem.targets.weights_P)).sum(), z_PV)
    ids_PK = torch.tensor(problem.targets.token_ids_PK).long()
    at_T = replace(problem.targets, logprobs_PK=p_PV.log().gather(1, ids_PK).float().numpy())
    losses_P, gradients_PV = loss_and_gradient(problem.logits_PV, at_T, Objective("bucket", alpha, temperature=temperature))
    np.testing.assert_allclose(losses_P, expected_P.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients_PV, expected_PV, atol=1e-6)


def test_soft_ranks_are_hard_ranks_far_apart_and_the_projection_in_between():
    values_K = np.array([3.0, -50.0, 90.0, 7.5])
    np.testing.assert_allclose(reference_divergences.soft_ranks(values_K, 0.1)[0], [2, 1, 4, 3])
    close_K = np.array([0.2, 0.1, 0.4, 0.0, 2.5])
    ranks_K, _ = reference_divergences.soft_ranks(close_K, 1.0)
    # The nearest point of the permutahedron: no permutation of the ranks is on the other side of it.
    assert ranks_K.sum() == pytest.approx(15)
    for vertex in itertools.permutations(range(1, 6)):
        assert np.dot(close_K - ranks_K, np.array(vertex) - ranks_K) <= 1e-12


@pytest.mark.parametrize("tail", TAIL_POLICIES)
def test_whole_vocabulary_support_gives_the_dense_kl(tail):
    problem = make_problem(5, 31, 31, seed=1)
    teacher_PV = np.empty((5, 31))
    np.put_along_axis(teacher_PV, problem.targets.token_ids_PK, problem.targets.logprobs_PK.astype(np.float64), axis=1)
    log_q_PV = contract.log_softmax(problem.logits_PV.astype(np.float64))
    losses_P, gradients_PV = loss_and_gradient(problem.logits_PV, problem.targets, Objective(tail))
    np.testing.assert_allclose(losses_P, (np.exp(teacher_PV) * (teacher_PV - log_q_PV)).sum(axis=1), atol=1e-6)
    weights_P1 = problem.targets.weights_P[:, None]
    np.testing.assert_allclose(gradients_PV, weights_P1 * (np.exp(log_q_PV) - np.exp(teacher_PV)), atol=1e-6)


@pytest.mark.parametrize("objective", contract.OBJECTIVES, ids=str)
def test_gradient_equals_finite_differences(objective):
    if isinstance(objective.divergence, d.AdaptiveKL | d.SelfEvolution):
        pytest.skip("no derivative goes through its weights")
    problem, step = make_problem(2, 9, 3, seed=2), 1e-5
    z_PV = problem.logits_PV.astype(np.float64)
    gradients_PV = loss_and_gradient(z_PV, problem.targets, objective)[1]
    for row, column in np.ndindex(z_PV.shape):
        shift_PV = np.zeros_like(z_PV)
        shift_PV[row, column] = step
        high, low = (loss_and_gradient(z_PV + s * shift_PV, problem.targets, objective)[0] for s in (1, -1))
        difference = (high - low)[row] / (2 * step) * problem.targets.weights_P[row]
        assert gradients_PV[row, column] == pytest.approx(difference, abs=1e-8 + 1e-11 * slack(objective), rel=1e-6)


def test_bucket_gradient_vanishes_exactly_where_student_equals_teacher():
    teacher = np.log([[0.5, 0.3, 0.15, 0.05]])
    targets = make_kernel_inputs([[0, 1]], teacher[:, :2], [0.2], vocab_size=4)
    losses_P, gradients_PV = loss_and_gradient(teacher, targets, Objective("bucket"))
    assert losses_P[0] == pytest.approx(0, abs=1e-7)
    np.testing.assert_allclose(gradients_PV, 0, atol=1e-7)


def test_row_losses_leave_the_logits_alone():
    problem, losses_P = make_problem(3, 10, 2), np.full(3, np.nan)
    before = problem.logits_PV.copy()
    position_losses(problem.logits_PV, problem.targets, Objective(), losses_P)
    np.testing.assert_array_equal(problem.logits_PV, before)
    np.testing.assert_array_equal(losses_P, loss_and_gradient(before, problem.targets, Objective())[0])
