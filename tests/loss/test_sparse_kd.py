"""`sparse_kd_loss` of both backends against the reference, as a torch function: dtypes, reductions, autograd."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from contracts import kernels as contract
from contracts.kernels import Problem, make_problem
from loose_calls import prepared, sparse_kd_loss

import kdcache
from kdcache.errors import LossError
from kdcache.kernels.base import TAIL_POLICIES, Objective
from kdcache.kernels.reference import loss_and_gradient
from kdcache.loss import sparse_kd
from kdcache.loss.sparse_kd import _OverLogits
from kdcache.loss.steps import torch_positions
from kdcache.loss.steps.step import make_step


def tensors(problem: Problem) -> dict[str, torch.Tensor]:
    t = problem.targets
    return {
        "token_ids_PK": torch.tensor(t.token_ids_PK),
        "logprobs_PK": torch.tensor(t.logprobs_PK),
        "tail_mass_P": torch.tensor(t.tail_mass_P),
        "target_ids_P": torch.tensor(t.target_ids_P).long(),
        "weights_P": torch.tensor(t.weights_P),
    }


def with_estimates(problem: Problem, objective: Objective) -> dict[str, torch.Tensor]:
    """`tensors`, and the number of exact entries or logprobs of the target ids where the divergence asks for them."""
    keywords = tensors(problem)
    if objective.divergence.requirements.target:
        keywords["target_logprobs_P"] = (0.5 * keywords["tail_mass_P"]).log()
    if objective.divergence.requirements.tail_sample:
        keywords["num_exact_P"] = torch.tensor(problem.targets.num_exact_P)
    return keywords


def at_temperature_1(z_PV, keywords, *, objective, backend, reduction):
    options = {"tail": objective.tail, "alpha": objective.alpha, "divergence": objective.divergence}
    options["entries"] = "unbiased" if objective.divergence.requirements.tail_sample else "exact"
    return sparse_kd_loss(z_PV, **keywords, **options, reduction=reduction, backend=backend)


def at_another(z_PV, keywords, *, objective, backend, reduction):
    """Below the public function, which makes the teacher's masses at T itself: here they are given as they are."""
    ready, is_summed = prepared(objective, backend, reduction, **keywords), reduction != "none"
    if backend == "torch":
        losses_P, _ = torch_positions.position_losses(z_PV, ready)
        losses_P = losses_P * ready.scales_P.to(losses_P.dtype)
        return losses_P.sum() if is_summed else losses_P
    return _OverLogits.apply(z_PV, make_step(ready, z_PV.shape[1]), True, is_summed)[0]


def way_to(objective: Objective):
    """The public function puts the target id among the entries; the kernels take it in the tail, too."""
    return at_another if objective.temperature != 1 or objective.divergence.requirements.target else at_temperature_1


def computed_by(backend: str):
    """The contract's Compute, through the torch function."""

    def compute(logits_PV, targets, objective):
        z_PV = torch.tensor(logits_PV, requires_grad=True)
        keywords = with_estimates(Problem(logits_PV, targets), objective)
        loss = partial(way_to(objective), objective=objective, backend=backend)
        losses_P = loss(z_PV, {**keywords, "weights_P": None}, reduction="none")
        total = loss(z_PV, keywords, reduction="sum")
        (gradient_PV,) = torch.autograd.grad(total, z_PV)
        # `none` has to be asked without weights here, and then reads the rows of weight 0 too.
        losses_P = torch.where(torch.tensor(targets.weights_P) > 0, losses_P, 0.0)
        return losses_P.detach().numpy(), gradient_PV.numpy()

    return compute


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_backends_keep_the_kernels_contract(check, backend):
    check(computed_by(backend))


@pytest.mark.parametrize("objective", contract.OBJECTIVES, ids=str)
def test_torch_in_float64_equals_the_reference_to_1e_12(objective):
    for shape in contract.SHAPES:
        problem = make_problem(*shape)
        z_PV = torch.tensor(problem.logits_PV, dtype=torch.float64, requires_grad=True)
        run = way_to(objective)
        loss = run(z_PV, with_estimates(problem, objective), objective=objective, backend="torch", reduction="sum")
        (gradient_PV,) = torch.autograd.grad(loss, z_PV)
        exact_P, exact_PV = loss_and_gradient(problem.logits_PV, problem.targets, objective)
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx((exact_P * problem.targets.weights_P).sum(), rel=1e-12, abs=1e-12)
        # Autograd subtracts what the reference leaves out; Jensen-Shannon's over beta.
        beta = getattr(objective.divergence, "beta", 1.0) or 1.0
        np.testing.assert_allclose(gradient_PV, exact_PV, rtol=1e-12, atol=1e-12 / beta)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_mean_divides_by_the_sum_of_the_weights(backend):
    problem = make_problem(5, 30, 4)
    z_PV, keywords = torch.tensor(problem.logits_PV), tensors(problem)
    losses_P = sparse_kd_loss(z_PV, **{**keywords, "weights_P": None}, reduction="none", backend=backend).double()
    weights_P = keywords["weights_P"]
    weighted_P = sparse_kd_loss(z_PV, **keywords, reduction="none", backend=backend)
    torch.testing.assert_close(weighted_P.double(), losses_P * weights_P, atol=1e-6, rtol=1e-6)
    mean = sparse_kd_loss(z_PV, **keywords, backend=backend)
    assert mean.item() == pytest.approx(((losses_P * weights_P).sum() / weights_P.sum()).item(), rel=1e-6)
    keywords["weights_P"] = torch.tensor([1.0, 0, 0, 1, 0])
    assert sparse_kd_loss(z_PV, **keywords, backend=backend).item() == pytest.approx(losses_P[[0, 3]].mean().item(), rel=1e-6)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("num_positions", [0, 3])
def test_nothing_that_counts_gives_zero_and_not_nan(num_positions, backend):
    problem = make_problem(num_positions, 10, 2)
    z_PV = torch.tensor(problem.logits_PV, requires_grad=True)
    loss = sparse_kd_loss(z_PV, **{**tensors(problem), "weights_P": torch.zeros(num_positions)}, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert z_PV.grad is not None
    assert not z_PV.grad.any()


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_upstream_gradients_scale_and_two_backward_calls_add_up(backend):
    problem = make_problem(5, 30, 4)
    z_PV, keywords = torch.tensor(problem.logits_PV, requires_grad=True), tensors(problem)
    loss = sparse_kd_loss(z_PV, **keywords, backend=backend)
    (once_PV,) = torch.autograd.grad(loss, z_PV, retain_graph=True)
    expected_PV = once_PV.clone()
    (loss * 3).backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(z_PV.grad, 4 * expected_PV)
    torch.testing.assert_close(once_PV, expected_PV)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_gradient_of_unreduced_losses_takes_one_upstream_number_per_row(backend):
    problem = make_problem(5, 30, 4)
    z_PV, keywords = torch.tensor(problem.logits_PV, requires_grad=True), tensors(problem)
    upstream_P = torch.tensor([1.0, 0, -2, 0.5, 3])
    losses_P = sparse_kd_loss(z_PV, **keywords, reduction="none", backend=backend)
    (gradient_PV,) = torch.autograd.grad(losses_P, z_PV, upstream_P)
    (expected_PV,) = torch.autograd.grad(sparse_kd_loss(z_PV, **keywords, reduction="sum", backend="torch"), z_PV)
    torch.testing.assert_close(gradient_PV, expected_PV * upstream_P[:, None], atol=1e-6, rtol=1e-5)


def test_numba_leaves_the_logits_alone_and_takes_strided_ones():
    problem = make_problem(6, 30, 4)
    wide_PV = torch.tensor(problem.logits_PV).repeat_interleave(2, dim=1)
    before_PV = wide_PV.clone()
    strided_PV = wide_PV[:, ::2].requires_grad_()
    loss = sparse_kd_loss(strided_PV, **tensors(problem), backend="numba")
    expected = sparse_kd_loss(strided_PV, **tensors(problem), backend="torch")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss, strided_PV)[0], torch.autograd.grad(expected, strided_PV)[0], atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(wide_PV, before_PV, rtol=0, atol=0)


def test_bfloat16_logits_give_a_float32_loss_and_a_bfloat16_gradient_as_good_as_torchs():
    problem = make_problem(20, 300, 8)
    z_PV = torch.tensor(problem.logits_PV).bfloat16().requires_grad_()
    exact_P, exact_PV = loss_and_gradient(z_PV.detach().float().numpy(), problem.targets, contract.OBJECTIVES[1])
    scale = problem.targets.weights_P.sum()
    errors = {}
    for backend in ("numba", "torch"):
        loss = sparse_kd_loss(z_PV, **tensors(problem), tail="drop", alpha=0.3, backend=backend)
        (gradient_PV,) = torch.autograd.grad(loss, z_PV)
        assert (loss.dtype, gradient_PV.dtype) == (torch.float32, torch.bfloat16)
        assert loss.item() == pytest.approx((exact_P * problem.targets.weights_P).sum() / scale, rel=1e-6)
        errors[backend] = np.abs(gradient_PV.float().numpy() - exact_PV / scale).max()
    assert errors["numba"] <= errors["torch"] * 1.01


@pytest.mark.parametrize(
    ("backend", "dtype"), [("numba", torch.bfloat16), ("torch", torch.bfloat16), ("torch", torch.float16)], ids=str
)
def test_half_precision_logits_have_the_loss_of_their_values_and_its_gradient_rounded_once(backend, dtype):
    """What float32 makes of them is held to the reference by the contract."""
    for shape in [(5, 17, 0), (4, 71, 5), (5, 16, 16)]:
        problem = make_problem(*shape)
        half_PV = torch.tensor(problem.logits_PV).to(dtype)
        for objective in contract.OBJECTIVES:
            run, found = way_to(objective), []
            for z_PV in (half_PV.clone().requires_grad_(), half_PV.float().requires_grad_()):
                loss = run(z_PV, with_estimates(problem, objective), objective=objective, backend=backend, reduction="sum")
                found.append((loss.detach(), torch.autograd.grad(loss, z_PV)[0]))
            (loss, gradient_PV), (exact, exact_PV) = found
            assert (loss.dtype, gradient_PV.dtype) == (torch.float32, dtype)
            torch.testing.assert_close(loss, exact, rtol=0, atol=0)
            torch.testing.assert_close(gradient_PV, exact_PV.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("tail", TAIL_POLICIES)
def test_torch_backend_passes_gradcheck_and_gradgradcheck(tail):
    problem = make_problem(3, 7, 3)
    keywords = tensors(problem)
    keywords["token_ids_PK"][0, 1] = -1
    z_PV = torch.tensor(problem.logits_PV, dtype=torch.float64, requires_grad=True)

    def loss_of(z_PV: torch.Tensor) -> torch.Tensor:
        return sparse_kd_loss(z_PV, **keywords, tail=tail, alpha=0.6, backend="torch")

    assert torch.autograd.gradcheck(loss_of, z_PV)
    assert torch.autograd.gradgradcheck(loss_of, z_PV)


def test_numba_backend_refuses_a_second_derivative():
    """Not silently 0: the gradient is a constant to autograd."""
    problem = make_problem(3, 7, 3)
    z_PV = torch.tensor(problem.logits_PV, requires_grad=True)
    loss = sparse_kd_loss(z_PV, **tensors(problem), backend="numba")
    with pytest.raises(LossError, match="backend='torch'"):
        torch.autograd.grad(loss, z_PV, create_graph=True)


def test_losses_and_gradients_do_not_depend_on_the_number_of_threads():
    problem = make_problem(300, 4001, 9)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            z_PV = torch.tensor(problem.logits_PV, requires_grad=True)
            loss = sparse_kd_loss(z_PV, **tensors(problem), backend="numba")
            loss.backward()
            assert z_PV.grad is not None
            results.append((loss.item(), z_PV.grad.numpy()))
    finally:
        torch.set_num_threads(before)
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_auto_takes_numba_where_it_can_and_torch_elsewhere():
    problem = make_problem(3, 7, 3)
    for dtype, name in ((torch.float32, "_OverLogits"), (torch.bfloat16, "_OverLogits"), (torch.float64, "Sum")):
        z_PV = torch.tensor(problem.logits_PV, dtype=dtype, requires_grad=True)
        assert name in type(sparse_kd_loss(z_PV, **tensors(problem)).grad_fn).__name__


def test_the_loss_is_a_public_name():
    assert kdcache.sparse_kd_loss is sparse_kd.sparse_kd_loss


@pytest.mark.slow
def test_torch_backend_compiles_without_a_graph_break():
    problem = make_problem(4, 20, 3)
    keywords = tensors(problem)
    z_PV = torch.tensor(problem.logits_PV, requires_grad=True)
    compiled = torch.compile(lambda z: sparse_kd_loss(z, **keywords, alpha=0.5), fullgraph=True, backend="aot_eager")
    expected = sparse_kd_loss(z_PV, **keywords, alpha=0.5, backend="torch")
    torch.testing.assert_close(compiled(z_PV), expected)
