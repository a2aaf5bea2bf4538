"""The fused loss against the same loss over whole logits: value, gradients by hidden, weight and bias, memory."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from contracts import kernels as contract
from contracts.kernels import Problem, make_problem
from loose_calls import fused_sparse_kd_loss, sparse_kd_loss
from test_sparse_kd import with_estimates

from kdcache.errors import LossError
from kdcache.kernels.base import NO_TARGET, Objective
from kdcache.loss import chunks


class Case:
    """A projection whose logits are near the teacher's, and targets as keywords of both losses."""

    def __init__(self, dtype: torch.dtype = torch.float32, num_positions: int = 37, num_entries: int = 9) -> None:
        problem = make_problem(num_positions, 101, num_entries)
        generator = torch.Generator().manual_seed(0)
        self.hidden_PH = torch.randn((num_positions, 16), generator=generator).to(dtype).requires_grad_()
        self.weight_VH = torch.randn((101, 16), generator=generator).to(dtype).requires_grad_()
        self.bias_V = torch.randn(101, generator=generator).to(dtype).requires_grad_()
        self.targets = {
            "token_ids_PK": torch.tensor(problem.targets.token_ids_PK),
            "logprobs_PK": torch.tensor(problem.targets.logprobs_PK),
            "tail_mass_P": torch.tensor(problem.targets.tail_mass_P),
            "target_ids_P": torch.tensor(problem.targets.target_ids_P),
            "weights_P": torch.tensor(problem.targets.weights_P),
        }
        self.num_exact_P = torch.tensor(problem.targets.num_exact_P)

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.hidden_PH, self.weight_VH, self.bias_V

    def options(self, objective: Objective, **more) -> dict:
        """Those of an objective at temperature 1; `num_exact_P` where its divergence asks for it."""
        options = {"tail": objective.tail, "alpha": objective.alpha, "divergence": objective.divergence, **more}
        if objective.divergence.requirements.tail_sample:
            options |= {"entries": "unbiased", "num_exact_P": self.num_exact_P}
        return options

    def unfused(self, **options) -> torch.Tensor:
        return sparse_kd_loss(self.hidden_PH @ self.weight_VH.T + self.bias_V, **self.targets, **options)

    def fused(self, **options) -> torch.Tensor:
        return fused_sparse_kd_loss(self.hidden_PH, self.weight_VH, bias=self.bias_V, **self.targets, **options)


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("chunk_positions", [8, 37, 512])
def test_fused_equals_unfused(dtype, backend, chunk_positions):
    if backend == "numba" and dtype == torch.float64:
        backend = "auto"
    case = Case(dtype)
    # The products of two paths differ by roundings, which decide at the jumps of those that are not smooth.
    objectives = [objective for objective in contract.SMOOTH if objective.temperature == 1]
    for objective, reduction in zip(objectives, itertools.cycle(["mean", "sum"]), strict=False):
        options = case.options(objective, reduction=reduction)
        expected = case.unfused(**options, backend="torch")
        loss = case.fused(**options, backend=backend, chunk_positions=chunk_positions)
        assert loss.dtype == expected.dtype
        assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype])
        expected_gradients = torch.autograd.grad(expected, case.leaves)
        for gradient, want in zip(torch.autograd.grad(loss, case.leaves), expected_gradients, strict=True):
            assert gradient.dtype == dtype
            error = (gradient - want).abs().max() / want.abs().max()
            # Autograd subtracts what the closed forms leave out; Jensen-Shannon's over beta.
            beta = getattr(objective.divergence, "beta", 1.0) or 1.0 if dtype == torch.float64 else 1.0
            assert error.item() < TOLERANCE[dtype] / beta, options


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.bfloat16, "numba"), (torch.bfloat16, "torch"), (torch.float16, "torch")], ids=str
)
def test_half_precision_is_as_near_to_float64_as_whole_logits_in_that_precision(dtype, backend):
    """Both beside float64 on the same numbers; of the gradients, the largest error as a share of the largest element."""
    case, rounding = Case(dtype), torch.finfo(dtype).eps
    exact = Case(dtype)
    exact.hidden_PH, exact.weight_VH, exact.bias_V = (leaf.detach().double().requires_grad_() for leaf in case.leaves)
    for objective in (objective for objective in contract.SMOOTH if objective.temperature == 1):
        wanted = with_gradients(exact.unfused(**case.options(objective), backend="torch"), exact.leaves)
        whole = with_gradients(case.unfused(**case.options(objective), backend="torch"), case.leaves)
        fused = with_gradients(case.fused(**case.options(objective), backend=backend, chunk_positions=8), case.leaves)
        for ours, theirs, right in zip(fused, whole, wanted, strict=True):
            errors = [
                float((each.double() - right).abs().max() / right.abs().max().clamp_min(1e-30)) for each in (ours, theirs)
            ]
            assert errors[0] <= 1.25 * errors[1] + rounding, (objective, errors)


def with_gradients(loss: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def computed_fused(backend: str):
    """The contract's Compute: with the identity as projection, the hidden states are the logits, to the bit."""

    def compute(logits_PV, targets, objective):
        hidden_PV = torch.tensor(logits_PV, requires_grad=True)
        keywords = with_estimates(Problem(logits_PV, targets), objective)
        options = {"tail": objective.tail, "alpha": objective.alpha, "divergence": objective.divergence, "backend": backend}
        options["entries"] = "unbiased" if objective.divergence.requirements.tail_sample else "exact"
        eye_VV = torch.eye(logits_PV.shape[1])
        losses_P = torch.zeros(len(logits_PV))
        for row in range(len(logits_PV)):
            alone = {name: tensor[row : row + 1] for name, tensor in keywords.items()} | {"weights_P": None}
            losses_P[row] = fused_sparse_kd_loss(hidden_PV[row : row + 1].detach(), eye_VV, **alone, **options, reduction="sum")
        loss = fused_sparse_kd_loss(hidden_PV, eye_VV, **keywords, **options, reduction="sum", chunk_positions=2)
        return losses_P.numpy(), torch.autograd.grad(loss, hidden_PV)[0].numpy()

    return compute


# The target id among the entries is test_self_evolution.py's.
OBJECTIVES = [o for o in contract.OBJECTIVES if o.temperature == 1 and not o.divergence.requirements.target]
# Odd, of more than one chunk; K of 0, 1, some and V.
FUSED_SHAPES = [(0, 5, 2), (3, 1, 1), (5, 17, 0), (5, 16, 16), (5, 33, 5)]


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_every_objective_through_the_chunks_is_like_the_reference(backend):
    """Those with jumps too: no product is rounded here."""
    for shape, objective in itertools.product(FUSED_SHAPES, OBJECTIVES):
        contract.assert_like_reference(computed_fused(backend), make_problem(*shape), objective)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_memory_that_nobody_has_written_shows_nowhere(backend, nan_in_new_memory):
    assert torch.empty(3).isnan().all()
    for objective in OBJECTIVES:
        contract.assert_like_reference(computed_fused(backend), make_problem(5, 33, 5), objective)
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(dtype)
        for part in with_gradients(case.fused(backend=backend, chunk_positions=8), case.leaves):
            assert part.isfinite().all()


def test_many_bfloat16_chunks_are_summed_in_float32():
    """Against float32 on the same numbers: 512 chunks must not be worse than one."""
    case = Case(torch.bfloat16, num_positions=1024)
    exact = [leaf.detach().float().requires_grad_() for leaf in case.leaves]
    loss = fused_sparse_kd_loss(exact[0], exact[1], bias=exact[2], **case.targets)
    exact_weight_VH = torch.autograd.grad(loss, exact)[1]
    errors = []
    for chunk_positions in (1024, 2):
        weight_VH = torch.autograd.grad(case.fused(chunk_positions=chunk_positions), case.leaves)[1]
        errors.append(((weight_VH - exact_weight_VH).norm() / exact_weight_VH.norm()).item())
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("elements", [1, 16 * 7, 16 * 101])
def test_the_weights_gradient_may_be_summed_in_any_number_of_blocks(elements, monkeypatch):
    case = Case(torch.bfloat16)
    whole_VH = torch.autograd.grad(case.fused(chunk_positions=8), case.weight_VH)[0]
    monkeypatch.setattr(chunks, "_SUMMED_ELEMENTS", elements)
    torch.testing.assert_close(torch.autograd.grad(case.fused(chunk_positions=8), case.weight_VH)[0], whole_VH)


def test_two_backward_calls_and_two_chunks_of_a_batch_add_up():
    case = Case()
    loss = case.fused(reduction="sum", chunk_positions=8)
    expected = torch.autograd.grad(case.unfused(reduction="sum", backend="torch"), case.leaves)
    (2 * loss).backward(retain_graph=True)
    loss.backward()
    for start, stop in ((0, 20), (20, 37)):
        part = {name: tensor[start:stop] for name, tensor in case.targets.items()}
        fused_sparse_kd_loss(case.hidden_PH[start:stop], case.weight_VH, bias=case.bias_V, **part, reduction="sum").backward()
    for leaf, want in zip(case.leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("frozen", ["hidden_PH", "weight_VH", "bias_V"])
def test_frozen_inputs_get_no_gradient_and_the_others_theirs(frozen, backend):
    case, reference = Case(), Case()
    getattr(case, frozen).requires_grad_(False)
    case.fused(backend=backend, chunk_positions=8).backward()
    reference.unfused(backend="torch").backward()
    for name in ("hidden_PH", "weight_VH", "bias_V"):
        if name == frozen:
            assert getattr(case, name).grad is None
        else:
            torch.testing.assert_close(getattr(case, name).grad, getattr(reference, name).grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_without_gradients_the_loss_is_the_same(backend):
    case = Case()
    expected = case.fused(backend=backend).item()
    with torch.no_grad():
        loss = case.fused(backend=backend, chunk_positions=8)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_labels_without_a_teacher_are_a_chunked_cross_entropy(backend):
    case = Case()
    target_ids_P = case.targets["target_ids_P"].long()
    counted_P = (target_ids_P != NO_TARGET).float()
    options = {"alpha": 0.0, "target_ids_P": target_ids_P, "weights_P": counted_P, "chunk_positions": 8, "backend": backend}
    empty = (torch.empty((37, 0), dtype=torch.int32), torch.empty((37, 0)), torch.ones(37))
    logits_PV = case.hidden_PH @ case.weight_VH.T + case.bias_V
    expected = torch.nn.functional.cross_entropy(logits_PV, target_ids_P, ignore_index=NO_TARGET)
    expected_gradients = torch.autograd.grad(expected, case.leaves)
    for teacher in ((), empty):
        loss = fused_sparse_kd_loss(case.hidden_PH, case.weight_VH, *teacher, bias=case.bias_V, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        for gradient, want in zip(torch.autograd.grad(loss, case.leaves), expected_gradients, strict=True):
            torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_no_rows_give_zero(backend):
    case = Case(num_positions=0)
    loss = case.fused(backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert case.weight_VH.grad is not None
    assert not case.weight_VH.grad.any()


def test_a_second_derivative_is_refused():
    case = Case()
    with pytest.raises(LossError, match="sparse_kd_loss"):
        torch.autograd.grad(case.fused(), case.leaves, create_graph=True)


def test_autocast_around_it_changes_nothing():
    case = Case()
    expected = torch.autograd.grad(case.fused(chunk_positions=8), case.leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.fused(chunk_positions=8)
    for gradient, want in zip(torch.autograd.grad(loss, case.leaves), expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=0, atol=0)


def test_nan_in_the_hidden_states_surfaces_unless_its_row_does_not_count():
    case = Case()
    with torch.no_grad():
        case.hidden_PH[5, 3] = torch.nan
    assert case.fused(chunk_positions=8).isnan()
    case.targets["weights_P"][5] = 0
    assert case.fused(chunk_positions=8).isfinite()


MEMORY_PROGRAM = """
import re, torch
from kdcache import LossSettings, Projection, SoftTargets, fused_sparse_kd_loss, sparse_kd_loss

P, V, H, K = 4096, 8192, 64, 8
hidden, weight = torch.randn(P, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
arrays = torch.arange(K).repeat(P, 1), torch.full((P, K), -3.0), torch.full((P,), 0.6)
teacher = SoftTargets.of(*arrays, entries="exact")

def peak_mib():
    # Not ru_maxrss: across fork and exec that keeps the peak of the process that started this one.
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def grown(function):
    before = peak_mib()
    function().backward()
    return peak_mib() - before

def fused(rows):
    projection = Projection(weight, chunk_positions=256)
    settings = LossSettings(backend=BACKEND)
    return fused_sparse_kd_loss(hidden[:rows], projection, teacher.slice(0, rows), settings=settings)

fused(256).backward()
print(grown(lambda: fused(P)), grown(lambda: sparse_kd_loss(hidden @ weight.T, teacher)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_fused_never_holds_the_whole_logits(backend):
    """They would be 128 MiB; a buffer is 8. The unfused loss, in the same process, shows that the measure sees them."""
    program = MEMORY_PROGRAM.replace("BACKEND", repr(backend))
    # glibc raises this threshold when a large block is freed, and then keeps such blocks: 12 MiB would read as 32 to 64.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300, env=env)
    answer = done.stdout
    fused_mib, unfused_mib = map(float, answer.split())
    assert fused_mib < 64
    assert unfused_mib > 120
