"""What test_triton.py runs under TRITON_INTERPRET=1; not a test module itself."""

from __future__ import annotations

from functools import partial
from unittest import mock

import numpy as np
import torch
from contracts import kernel_sums as sums
from contracts import kernels as contract
from contracts.kernels import make_problem
from loose_calls import fused_sparse_kd_loss, sparse_kd_loss
from test_compile import assert_fused_compiles_whole, assert_rows_compile_whole
from test_half_logprobs import OPTIONS, check_fused, check_rows
from test_head import make
from test_sparse_kd import with_estimates
from test_steps import check_ids_beyond_the_vocabulary, compute_by_step, run_step, sum_by_step
from unwritten_memory import unwritten_memory_is_nan

from kdcache.kernels import divergences as d
from kdcache.kernels.base import Objective
from kdcache.kernels.reference import loss_and_gradient
from kdcache.loss.chunks import Head
from kdcache.loss.steps.triton_passes import TritonPasses

run, compute = partial(run_step, "triton"), partial(compute_by_step, "triton")


def keep_the_contract() -> None:
    """The interpreter takes milliseconds per launch: shapes and objectives are fewer here, promises are not.

    The O(K) part is torch's, and is held to the whole contract in test_steps.py.
    """
    shapes = [(0, 5, 2), (1, 1, 0), (3, 1, 1), (4, 2, 1), (5, 17, 0), (3, 16, 16), (3, 71, 5)]
    temperatures = [Objective(tail, 0.4, temperature=2.0) for tail in ("bucket", "uniform")]
    others = [Objective(divergence=kind()) for kind in (d.ReverseKL, d.TailAwareKL)]
    objectives = [o for o in contract.FORWARD_KL if o.alpha > 0] + temperatures + others
    fewer = mock.patch.multiple(contract, SHAPES=shapes, OBJECTIVES=objectives, SMOOTH=objectives)
    with np.errstate(all="ignore"), fewer:
        for check in contract.CHECKS:
            check(compute)


def keep_the_contract_of_sums() -> None:
    """The O(K) part is torch's: what is Triton's own here are several lifted ids and a uniform tail among others."""
    with np.errstate(all="ignore"), mock.patch.multiple(sums, SHAPES=[(2, 17, 0), (3, 33, 5)]):
        sums.check_a_sum_is_the_sum_of_its_parts(partial(sum_by_step, "triton"))
        sums.check_positions_of_weight_zero_are_not_read(partial(sum_by_step, "triton"))


def agree_with_the_reference_on_every_divergence() -> None:
    for objective in contract.OBJECTIVES:
        contract.assert_like_reference(compute, make_problem(2, 71, 3), objective)


def leave_no_memory_unwritten() -> None:
    with unwritten_memory_is_nan():
        assert torch.empty(3).isnan().all()
        for tail in ("bucket", "uniform"):
            contract.assert_like_reference(compute, make_problem(3, 71, 5), Objective(tail, 0.5))
        leaves, targets = make()
        loss = fused_sparse_kd_loss(*leaves[:2], bias=leaves[2], **targets, backend="triton", chunk_positions=16)
        assert all(part.isfinite().all() for part in (loss, *torch.autograd.grad(loss, leaves)))


def round_half_precision_once() -> None:
    """The gradient by logits in half precision is that by the same numbers in float32, rounded."""
    problem = make_problem(2, 71, 5)
    # The interpreter rounds to bfloat16 by cutting off; float16 has numbers below its normal ones.
    for dtype, rtol, atol in ((torch.bfloat16, 2**-7, 1e-37), (torch.float16, 2**-10, 6e-8)):
        for objective in contract.OBJECTIVES[::3]:
            half_PV = torch.tensor(problem.logits_PV).to(dtype)
            losses_P, gradient_PV = run(half_PV.clone(), problem, objective)
            exact_P, exact_PV = run(half_PV.float(), problem, objective)
            torch.testing.assert_close(losses_P, exact_P, rtol=0, atol=0)
            torch.testing.assert_close(gradient_PV.float(), exact_PV, rtol=rtol, atol=atol)


def equal_the_fused_loss_of_torch() -> None:
    leaves, targets = make()
    for options in ({}, {"alpha": 0.4, "divergence": "reverse_kl", "head": Head(softcap=4.0)}):
        results = []
        for backend in ("triton", "torch"):
            loss = fused_sparse_kd_loss(*leaves[:2], bias=leaves[2], **targets, **options, backend=backend, chunk_positions=16)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def compile_into_one_graph() -> None:
    assert_fused_compiles_whole("triton")
    assert_fused_compiles_whole("triton", divergence="reverse_kl", head=Head())
    assert_rows_compile_whole("triton")


def leave_logits_alone() -> None:
    problem = make_problem(4, 71, 5)
    for objective in contract.OBJECTIVES:
        if objective.temperature != 1 or objective.divergence.requirements.target:  # as in test_sparse_kd.way_to
            continue
        z_PV, options = torch.tensor(problem.logits_PV), {"tail": objective.tail, "alpha": objective.alpha}
        before_PV = z_PV.clone()
        options["entries"] = "unbiased" if objective.divergence.requirements.tail_sample else "exact"
        losses_P = sparse_kd_loss(
            z_PV,
            **with_estimates(problem, objective),
            **options,
            divergence=objective.divergence,
            reduction="none",
            backend="triton",
        )
        torch.testing.assert_close(z_PV, before_PV, rtol=0, atol=0)
        exact_P = loss_and_gradient(problem.logits_PV, problem.targets, objective)[0] * problem.targets.weights_P
        torch.testing.assert_close(losses_P.double(), torch.tensor(exact_P), rtol=1e-5, atol=1e-5)


def take_half_logprobs() -> None:
    for name in OPTIONS:
        check_rows(name, "triton")
        check_fused(name, "triton")


def keep_ids_beyond_the_vocabulary_to_their_row() -> None:
    check_ids_beyond_the_vocabulary(TritonPasses)
