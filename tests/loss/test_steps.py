"""Row losses from passes over the logits and closed-form slopes, with torch's passes; Triton's are in test_triton.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from contracts import kernel_sums as sums
from contracts import kernels as contract
from contracts.kernels import Problem, make_problem
from loose_calls import prepared, prepared_sum
from test_sparse_kd import with_estimates

from kdcache.kernels import divergences as d
from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import torch_formulas as torch_divergences
from kdcache.kernels.reference import loss_and_gradient
from kdcache.loss.steps import torch_positions
from kdcache.loss.steps.step import BucketStep, Passes, make_step
from kdcache.loss.steps.torch_passes import TorchPasses


def run_step(backend: str, logits_PV: torch.Tensor, problem: Problem, objective: Objective, *, want_gradient: bool = True):
    ready = prepared(objective, backend, **with_estimates(problem, objective))
    return make_step(ready, logits_PV.shape[1])(logits_PV, 0, want_gradient)[:2]


def compute_by_step(backend: str, logits_PV, targets, objective):
    """The contract's Compute, below autograd."""
    weights_P = torch.tensor(targets.weights_P)
    scaled_P, gradient_PV = run_step(backend, torch.tensor(logits_PV), Problem(logits_PV, targets), objective)
    losses_P = torch.where(weights_P > 0, scaled_P / weights_P, 0.0)
    return losses_P.numpy(), gradient_PV.numpy()


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_torch_passes_keep_the_kernels_contract(check):
    check(lambda *problem: compute_by_step("torch", *problem))


def without_factors(values_PD1, logits_PV, summands):
    """The losses multiply a value by a weight that is (P,), the kernels do not; where it is 0, what the kernels give."""
    ones_P = np.ones(len(logits_PV))
    factors = [ones_P if summand.factor_P is None else summand.factor_P for summand in summands]
    share_P = sum(factor_P * (1 - summand.objective.alpha) for factor_P, summand in zip(factors, summands, strict=True))
    factors_PD1 = np.stack([f * (s.objective.alpha or 1) for f, s in zip(factors, summands, strict=True)] + [share_P], axis=1)
    with np.errstate(all="ignore"):
        return np.where(factors_PD1 > 0, values_PD1 / factors_PD1, sums.by_reference(logits_PV, summands)[2])


def sum_by_step(backend: str, logits_PV, summands):
    """The contract's ComputeSum, below autograd."""
    step = make_step(prepared_sum(summands, backend), logits_PV.shape[1])
    scaled_P, gradient_PV, values_PD1 = step(torch.tensor(logits_PV), 0, True)
    assert values_PD1 is not None
    weights_P = torch.tensor(summands[0].inputs.weights_P)
    losses_P = torch.where(weights_P > 0, scaled_P / weights_P, 0.0)
    values_PD1 = torch.where(weights_P[:, None] > 0, values_PD1 / weights_P[:, None], 0.0)
    return losses_P.numpy(), gradient_PV.numpy(), without_factors(values_PD1.numpy(), logits_PV, summands)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("check", sums.CHECKS, ids=lambda check: check.__name__)
def test_steps_keep_the_contract_of_sums(check, backend):
    check(partial(sum_by_step, backend))


def sum_by_autograd(logits_PV, summands):
    """The contract's ComputeSum through values alone."""
    logits_PV, ready = torch.tensor(logits_PV, requires_grad=True), prepared_sum(summands, "torch")
    losses_P, values_PD1 = torch_positions.position_losses(logits_PV, ready)
    (gradient_PV,) = torch.autograd.grad((losses_P * ready.scales_P).sum(), logits_PV)
    raw_PD1 = without_factors(values_PD1.numpy(), logits_PV.detach().numpy(), summands)
    return losses_P.detach().numpy(), gradient_PV.numpy(), raw_PD1


@pytest.mark.parametrize("check", sums.CHECKS, ids=lambda check: check.__name__)
def test_autograd_keeps_the_contract_of_sums(check):
    check(sum_by_autograd)


def test_in_float64_they_equal_the_reference_to_1e_12():
    for shape in contract.SHAPES:
        problem = make_problem(*shape)
        for objective in contract.OBJECTIVES:
            logits_PV = torch.tensor(problem.logits_PV, dtype=torch.float64)
            scaled_P, gradient_PV = run_step("torch", logits_PV, problem, objective)
            exact_P, exact_PV = loss_and_gradient(problem.logits_PV, problem.targets, objective)
            beta = getattr(objective.divergence, "beta", 1.0) or 1.0
            bound = {"rtol": 1e-12, "atol": 1e-12 / beta}
            np.testing.assert_allclose(scaled_P, exact_P * problem.targets.weights_P, **bound, err_msg=str(objective))
            np.testing.assert_allclose(gradient_PV, exact_PV, **bound, err_msg=str(objective))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_are_the_float32_ones_rounded_once(dtype):
    problem = make_problem(4, 71, 5)
    for objective in contract.OBJECTIVES:
        half_PV = torch.tensor(problem.logits_PV).to(dtype)
        losses_P, gradient_PV = run_step("torch", half_PV.clone(), problem, objective)
        exact_P, exact_PV = run_step("torch", half_PV.float(), problem, objective)
        torch.testing.assert_close(losses_P, exact_P, rtol=0, atol=0)
        torch.testing.assert_close(gradient_PV, exact_PV.to(dtype), rtol=0, atol=0)


def test_without_a_gradient_the_logits_come_back():
    problem = make_problem(4, 71, 5)
    for objective in contract.OBJECTIVES:
        logits_PV = torch.tensor(problem.logits_PV)
        scaled_P, _ = run_step("torch", logits_PV, problem, objective, want_gradient=False)
        np.testing.assert_array_equal(logits_PV, problem.logits_PV)
        exact_P = loss_and_gradient(problem.logits_PV, problem.targets, objective)[0] * problem.targets.weights_P
        np.testing.assert_allclose(scaled_P, exact_P, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divergence", [kind() for kind in d.DIVERGENCES.values()], ids=str)
def test_slopes_are_what_autograd_makes_of_the_values(divergence):
    """But for multiples of Q, which change no gradient by the logits."""
    problem, objective = make_problem(6, 40, 7), Objective("bucket", divergence=divergence)
    ready = prepared(objective, "torch", **with_estimates(problem, objective))
    generator = torch.Generator().manual_seed(0)
    log_q_PK1 = torch.randn(6, 8, generator=generator, dtype=torch.float64).log_softmax(dim=1).requires_grad_()
    masses = torch_positions.masses(ready.parts[0], 40, log_q_PK1, ready.target_ids_P)
    (wanted_PK1,) = torch.autograd.grad(torch_divergences.compute(divergence, masses).sum(), log_q_PK1)
    h_PK1 = torch_divergences.slopes(divergence, masses)
    by_logits = [h - h.sum(dim=1, keepdim=True) * log_q_PK1.exp() for h in (h_PK1, wanted_PK1)]
    torch.testing.assert_close(*by_logits, rtol=1e-12, atol=1e-13)


def check_ids_beyond_the_vocabulary(make_passes: Callable[[torch.Tensor, torch.Tensor], Passes]) -> None:
    """Such an id or label in row 1: NaN there, the other rows as without it, and nothing before or behind the rows changed."""
    problem = make_problem(3, 20, 4)
    clean = with_estimates(problem, Objective("bucket", 0.5))
    for name, foreign in itertools.product(("token_ids_PK", "target_ids_P"), (20, 21, 10_000, 2**31 - 1)):
        spoiled = clean | {name: clean[name].clone()}
        spoiled[name].view(3, -1)[1, -1] = foreign
        for want_gradient in (True, False):
            results = []
            for targets in (clean, spoiled):
                memory_PV = torch.full((5, 20), 7.0)
                memory_PV[1:4] = torch.tensor(problem.logits_PV)
                step = BucketStep(make_passes, prepared(Objective("bucket", 0.5), "torch", **targets))
                results.append((step(memory_PV[1:4], 0, want_gradient)[0], memory_PV))
            (losses_P, gradient_PV), (found_P, found_PV) = results
            assert found_P.isnan().tolist() == [False, True, False], (name, foreign)
            assert found_PV[2].isnan().any() == want_gradient
            torch.testing.assert_close(found_PV[[0, 1, 3, 4]], gradient_PV[[0, 1, 3, 4]], rtol=0, atol=0)
            torch.testing.assert_close(found_P[[0, 2]], losses_P[[0, 2]], rtol=0, atol=0)


def test_an_id_beyond_the_vocabulary_is_nan_in_its_row_where_nobody_looks_for_it():
    check_ids_beyond_the_vocabulary(TorchPasses)
