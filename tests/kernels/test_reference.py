"""The definition against things that do not share its code: hand-made numbers, autograd of dense formulas, differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contracts import kernels as contract
from contracts.kernels import make_problem

from kdcache.errors import LossError
from kdcache.kernels import get_backend
from kdcache.kernels.base import NO_LABEL, TAIL_POLICIES, Objective, make_targets
from kdcache.kernels.reference import loss_and_gradient, row_losses, row_losses_and_gradients


def compute(logits_PV, targets, objective):
    losses_P, gradients_PV = np.full(len(logits_PV), np.nan), logits_PV.astype(np.float64)
    row_losses_and_gradients(gradients_PV, targets, objective, losses_P)
    return losses_P, gradients_PV


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_reference_keeps_the_contract(check):
    check(compute)


def test_a_row_by_hand():
    """Student uniform over four ids; teacher 1/2 and 1/4 on two of them, 1/4 in the tail, whose two ids hold 1/2."""
    targets = make_targets([[2, 0]], np.log([[0.5, 0.25]]), [0.25], vocab_size=4)
    losses = {tail: loss_and_gradient(np.zeros((1, 4)), targets, Objective(tail)) for tail in TAIL_POLICIES}
    assert losses["drop"][0][0] == pytest.approx(0.5 * math.log(2), abs=1e-7)
    np.testing.assert_allclose(losses["drop"][1], [[0.75 / 4 - 0.25, 0.75 / 4, 0.75 / 4 - 0.5, 0.75 / 4]], atol=1e-7)
    assert losses["bucket"][0][0] == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.25 / 0.5), abs=1e-7)
    np.testing.assert_allclose(losses["bucket"][1], [[0.0, 0.25 * 0.5, -0.25, 0.25 * 0.5]], atol=1e-7)
    assert losses["renormalize"][0][0] == pytest.approx(2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(4 / 3), abs=1e-7)
    np.testing.assert_allclose(losses["renormalize"][1], [[0.25 - 1 / 3, 0.25, 0.25 - 2 / 3, 0.25]], atol=1e-7)


def dense_loss(z_PV: torch.Tensor, targets, objective: Objective) -> torch.Tensor:
    """The definition once more, over dense probabilities, as a textbook has it: no stable forms."""
    q_PV = z_PV.softmax(dim=1)
    p_PV = torch.zeros_like(q_PV)
    p_PV.scatter_(1, torch.tensor(targets.token_ids_PK).long(), torch.tensor(targets.logprobs_PK).double().exp())
    inside_PV = p_PV > 0
    if objective.tail == "renormalize":
        p_PV = p_PV / p_PV.sum(dim=1, keepdim=True)
    kl_P = torch.where(inside_PV, p_PV * (p_PV.clamp_min(1e-300) / q_PV).log(), 0.0).sum(dim=1)
    if objective.tail == "bucket":
        r_P = torch.tensor(targets.tail_mass_P).double()
        kl_P = kl_P + r_P * (r_P / torch.where(inside_PV, 0.0, q_PV).sum(dim=1)).log()
    labels_P = torch.tensor(targets.labels_P).long()
    ce_P = torch.nn.functional.cross_entropy(z_PV, labels_P, reduction="none", ignore_index=NO_LABEL)
    return objective.alpha * kl_P + (1 - objective.alpha) * ce_P


@pytest.mark.parametrize("objective", contract.OBJECTIVES, ids=str)
def test_reference_equals_autograd_of_a_dense_formula(objective):
    problem = make_problem(6, 40, 7, seed=3)
    z_PV = torch.tensor(problem.logits_PV, dtype=torch.float64, requires_grad=True)
    expected_P = dense_loss(z_PV, problem.targets, objective)
    (expected_PV,) = torch.autograd.grad((expected_P * torch.tensor(problem.targets.weights_P)).sum(), z_PV)
    losses_P, gradients_PV = loss_and_gradient(problem.logits_PV, problem.targets, objective)
    np.testing.assert_allclose(losses_P, expected_P.detach(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(gradients_PV, expected_PV, rtol=1e-12, atol=1e-13)


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
    problem, step = make_problem(2, 9, 3, seed=2), 1e-5
    z_PV = problem.logits_PV.astype(np.float64)
    gradients_PV = loss_and_gradient(z_PV, problem.targets, objective)[1]
    for row, column in np.ndindex(z_PV.shape):
        shift_PV = np.zeros_like(z_PV)
        shift_PV[row, column] = step
        high, low = (loss_and_gradient(z_PV + s * shift_PV, problem.targets, objective)[0] for s in (1, -1))
        difference = (high - low)[row] / (2 * step) * problem.targets.weights_P[row]
        assert gradients_PV[row, column] == pytest.approx(difference, abs=1e-8)


def test_bucket_gradient_vanishes_exactly_where_student_equals_teacher():
    teacher = np.log([[0.5, 0.3, 0.15, 0.05]])
    targets = make_targets([[0, 1]], teacher[:, :2], [0.2], vocab_size=4)
    losses_P, gradients_PV = loss_and_gradient(teacher, targets, Objective("bucket"))
    assert losses_P[0] == pytest.approx(0, abs=1e-7)
    np.testing.assert_allclose(gradients_PV, 0, atol=1e-7)


def test_row_losses_leave_the_logits_alone():
    problem, losses_P = make_problem(3, 10, 2), np.full(3, np.nan)
    before = problem.logits_PV.copy()
    row_losses(problem.logits_PV, problem.targets, Objective(), losses_P)
    np.testing.assert_array_equal(problem.logits_PV, before)
    np.testing.assert_array_equal(losses_P, loss_and_gradient(before, problem.targets, Objective())[0])


def test_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(LossError, match=r"'cuda'.*'reference', 'numba'"):
        get_backend("cuda")
