"""The numba kernels against the reference, and what only they promise: in place, any thread count, bfloat16, speed of form."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from contracts import kernel_sums as sums
from contracts import kernels as contract
from contracts.kernels import make_problem

from kdcache.compiled import OPTIONS, compiled
from kdcache.kernels import _numba_positions, numba_kernels, reference
from kdcache.kernels.base import Objective, SumOutputs, make_kernel_inputs
from kdcache.kernels.threads import for_blocks


def compute(logits_PV, targets, objective, num_threads=1):
    losses_P, gradients_PV = np.full(len(logits_PV), np.nan), logits_PV.copy()
    numba_kernels.position_losses_and_gradients(gradients_PV, targets, objective, losses_P, num_threads)
    only_P = np.full(len(logits_PV), np.nan)
    before = logits_PV.copy()
    numba_kernels.position_losses(logits_PV, targets, objective, only_P, num_threads)
    np.testing.assert_array_equal(logits_PV, before)
    np.testing.assert_array_equal(only_P, losses_P)
    return losses_P, gradients_PV


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_numba_keeps_the_contract(check):
    check(compute)


def compute_sum(logits_PV, summands):
    gradients_PV, outputs = (
        logits_PV.copy(),
        SumOutputs(np.empty(len(logits_PV)), np.empty((len(logits_PV), len(summands) + 1))),
    )
    numba_kernels.summed_losses(gradients_PV, summands, outputs, want_gradient=True)
    only = SumOutputs(np.empty(len(logits_PV)), np.empty((len(logits_PV), len(summands) + 1)))
    numba_kernels.summed_losses(logits_PV, summands, only, want_gradient=False)
    np.testing.assert_array_equal(only.losses_P, outputs.losses_P)
    np.testing.assert_array_equal(only.values_PD1, outputs.values_PD1)
    return outputs.losses_P, gradients_PV, outputs.values_PD1


@pytest.mark.parametrize("check", sums.CHECKS, ids=lambda check: check.__name__)
def test_numba_keeps_the_contract_of_sums(check):
    check(compute_sum)


def test_one_and_three_threads_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(numba_kernels, "_LOGITS_PER_BLOCK", 5 * 301)
    problem = make_problem(64, 301, 7)
    problem.targets.weights_P[10:30] = 0
    for objective in contract.OBJECTIVES:
        one, three = (compute(problem.logits_PV, problem.targets, objective, threads) for threads in (1, 3))
        np.testing.assert_array_equal(one[0], three[0])
        np.testing.assert_array_equal(one[1], three[1])


def to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("shape", contract.SHAPES, ids=str)
def test_bfloat16_gradient_is_the_float32_one_rounded_once(shape):
    problem = make_problem(*shape)
    bits_PV = to_bfloat16_bits(problem.logits_PV)
    for objective in contract.OBJECTIVES:
        losses_P, gradients_PV = compute(bits_PV, problem.targets, objective)
        exact_P, exact_PV = compute(from_bfloat16_bits(bits_PV), problem.targets, objective)
        np.testing.assert_array_equal(losses_P, exact_P)
        np.testing.assert_array_equal(gradients_PV, to_bfloat16_bits(exact_PV))


def test_bfloat16_nan_stays_nan_and_weight_zero_is_zero():
    problem = make_problem(3, 9, 2)
    bits_PV = to_bfloat16_bits(problem.logits_PV)
    bits_PV[0] = 0x7FFF
    bits_PV[1, 4] = 0x7FFF
    problem.targets.weights_P[0] = 0
    losses_P, gradients_PV = compute(bits_PV, problem.targets, Objective())
    assert losses_P[0] == 0
    assert not gradients_PV[0].any()
    assert np.isnan(losses_P[1])
    assert np.isnan(from_bfloat16_bits(gradients_PV[1])).all()
    assert np.isfinite(from_bfloat16_bits(gradients_PV[2])).all()


def test_rounding_to_bfloat16_equals_torch_and_no_nan_becomes_a_number():
    rng = np.random.default_rng(0)
    random_bits = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    ties = (rng.integers(0, 2**16, 256, dtype=np.uint32) << 16) | 0x8000
    bits = np.concatenate([random_bits, ties, np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F7FFFFF], np.uint32)])
    rounded = np.empty(len(bits), np.uint16)
    _numba_positions._narrow(bits, rounded)
    np.testing.assert_array_equal(from_bfloat16_bits(rounded), from_bfloat16_bits(to_bfloat16_bits(bits.view(np.float32))))


def test_exponential_is_right_over_its_whole_range():
    x = np.concatenate([np.linspace(-87.3, 88, 100_001), [-0.0, -1e-30]]).astype(np.float32)
    y = x.copy()
    _numba_positions._to_exp(y, np.float32(0))
    np.testing.assert_allclose(y, np.exp(x.astype(np.float64)), rtol=2e-7)
    special = np.array([-np.inf, -1000, -87.4, np.nan], np.float32)
    assert np.isnan(_numba_positions._to_exp(special, np.float32(0)))
    np.testing.assert_array_equal(special, [0, 0, 0, np.nan])


def test_sum_over_a_large_row_keeps_float32_accuracy():
    z_V = np.full(2_000_000, -0.1, np.float32)
    expected = 2_000_000 * np.exp(np.float64(np.float32(-0.1)))
    assert _numba_positions._to_exp(z_V, np.float32(0)) == pytest.approx(expected, rel=6e-7)


ROW_V, BITS_V, OUT_V = np.zeros(64, np.float32), np.zeros(64, np.uint32), np.zeros(64, np.uint16)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (_numba_positions._to_exp, (ROW_V, np.float32(0))),
        (_numba_positions._maximum_of, (ROW_V,)),
        (_numba_positions._sum_of, (ROW_V,)),
        (_numba_positions._scale, (ROW_V, np.float32(1), np.float32(0))),
        (_numba_positions._add_scaled, (ROW_V, np.float32(1), ROW_V.copy())),
        (_numba_positions._narrow, (BITS_V, OUT_V)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_loops_over_the_vocabulary_are_vectorised(function, arguments):
    """The optimised code has the loop's own operation on vectors, and no call of a scalar one: else 10 to 30 times slower."""
    fresh = numba.njit(**OPTIONS)(function.py_func)
    fresh(*arguments)
    (code,) = fresh.inspect_llvm().values()
    assert re.search(r"(fmul|fadd|lshr|llvm\.maximum\.v\d+f32\().*<\d+ x (float|i\d+)>", code), "no vectors"
    assert "@expf" not in code
    assert "@fmaxf" not in code


@pytest.mark.parametrize("spoil", ["strides", "dtype", "rows", "columns", "losses"])
def test_arrays_the_kernel_could_not_take_are_refused_before_it_runs(spoil):
    problem, losses_P = make_problem(4, 10, 2), np.empty(4)
    logits_PV = {
        "strides": np.asfortranarray(problem.logits_PV),
        "dtype": problem.logits_PV.astype(np.float64),
        "rows": problem.logits_PV[:3],
        "columns": np.ascontiguousarray(problem.logits_PV[:, :9]),
    }.get(spoil, problem.logits_PV)
    with pytest.raises(ValueError, match="C-contiguous"):
        numba_kernels.position_losses_and_gradients(
            logits_PV, problem.targets, Objective(), losses_P[:3] if spoil == "losses" else losses_P
        )


def test_kernels_work_where_no_cache_folder_can_be_written():
    """Functions without a source file have none."""
    namespace: dict = {}
    exec("def double(x):\n    return 2 * x", namespace)
    assert compiled()(namespace["double"])(3) == 6


def test_each_kernel_is_compiled_once_for_all_calls():
    """A second specialisation would be slower and, in the on-disk cache, open to a race between processes."""
    problem = make_problem(3, 10, 2)
    for objective in contract.OBJECTIVES:
        compute(problem.logits_PV, problem.targets, objective)
        compute(problem.logits_PV[:1], problem.targets.slice(0, 1), objective)
    targets = make_kernel_inputs(np.zeros((3, 0)), np.zeros((3, 0)), np.ones(3), vocab_size=10)
    compute(problem.logits_PV, targets, Objective())
    assert len(numba_kernels._compiled_kernel(np.dtype(np.float32)).signatures) == 1  # type: ignore[attr-defined]


def test_row_blocks_cover_every_row_once_and_errors_come_through():
    seen = np.zeros(103, int)

    def work(start: int, stop: int) -> None:
        seen[start:stop] += 1

    for num_threads in (1, 3, 200):
        for_blocks(work, 103, num_threads=num_threads, block=10)
    for_blocks(work, 0, num_threads=2, block=10)
    np.testing.assert_array_equal(seen, 3)

    def fail(start: int, stop: int) -> None:
        raise KeyError(start)

    with pytest.raises(KeyError):
        for_blocks(fail, 103, num_threads=3, block=10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_can_use_the_pool_again():
    program = """
import os, sys, numpy as np
from kdcache.kernels.threads import for_blocks
seen = np.zeros(40, int)
def work(start, stop): seen[start:stop] += 1
for_blocks(work, 40, num_threads=3, block=4)
child = os.fork()
if child == 0:
    for_blocks(work, 40, num_threads=3, block=4)
    os._exit(0 if (seen == 2).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_reference_and_kernel_share_the_interface():
    problem = make_problem(4, 20, 5)
    bits_PV = to_bfloat16_bits(problem.logits_PV)
    for logits_PV in (problem.logits_PV, bits_PV):
        results = []
        for module in (reference, numba_kernels):
            buffer_PV, losses_P = logits_PV.copy(), np.full(4, np.nan)
            module.position_losses_and_gradients(buffer_PV, problem.targets, Objective(alpha=0.5), losses_P)
            results.append((losses_P, from_bfloat16_bits(buffer_PV) if buffer_PV.dtype == np.uint16 else buffer_PV))
        np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-6)
        np.testing.assert_allclose(results[0][1], results[1][1], rtol=2**-7, atol=1e-6)
