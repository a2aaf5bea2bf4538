"""Promises of every backend of the row losses: one function per promise, called for each backend with its `Compute`.

Shape letters: P positions (rows), K entries per position (padded), V the student's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.kernels import divergences as d
from kdcache.kernels import reference
from kdcache.kernels.base import NO_TARGET, TAIL_POLICIES, KernelInputs, Objective, make_kernel_inputs

Floats = NDArray[np.floating[Any]]
Compute = Callable[[Floats, KernelInputs, Objective], tuple[Floats, Floats]]
"""float32 logits to (P,) losses and (P, V) gradients of sum(weights * losses)."""

# V of 1, odd, one more than a vector, a vector exactly, more than one block of the kernel's sums; K of 0, 1, some and V.
SHAPES = [(0, 5, 2), (1, 1, 0), (3, 1, 1), (4, 2, 1), (5, 17, 0), (5, 16, 16), (7, 33, 5), (3, 8197, 64), (2, 4096, 1)]
FORWARD_KL = [Objective(tail, alpha) for tail in TAIL_POLICIES for alpha in (1.0, 0.3, 0.0)]
DIVERGENCES = [
    d.ReverseKL(),
    d.JensenShannon(0.3),
    d.JensenShannon(0.3, gkd_scale=1),
    d.JensenShannon(1e-5),
    d.JensenShannon(0.0),
    d.JensenShannon(1.0),
    d.SkewKL(),
    d.SkewKL(0.0),
    d.SkewReverseKL(0.3),
    d.SelfEvolution(threshold=0.0),
    d.SelfEvolution(0.3, 1.5, 0.8, 0.2),
    d.SelfEvolution(1.0, 0.0, 0.1, 0.0),
    d.AdaptiveKL(),
    d.TotalVariation(),
    d.Hellinger(),
    d.AlphaBeta(),
    d.AlphaBeta(1.0, 1.0),
    d.DecoupledTopK(),
    d.TailAwareKL(),
    d.CenteredMSE(),
    d.HingeRanking(0.7),
    d.LogisticRanking(),
    d.SoftSpearman(),
]
OTHERS = [Objective(tail, 1.0, divergence) for divergence in DIVERGENCES for tail in divergence.requirements.tails]
MIXED = [
    Objective("bucket", 0.6, d.JensenShannon()),
    *[Objective(tail, alpha, temperature=2.0) for tail in TAIL_POLICIES for alpha in (1.0, 0.4)],
    Objective("bucket", 0.7, d.TailAwareKL(0.5)),
    *[Objective("bucket", 0.5, kind, 0.5) for kind in (d.ReverseKL(), d.SkewKL(), d.Hellinger(), d.AdaptiveKL())],
]
OBJECTIVES = FORWARD_KL + OTHERS + MIXED
# Their derivative has jumps, at which rounding decides.
SMOOTH = [o for o in OBJECTIVES if not isinstance(o.divergence, d.TotalVariation | d.HingeRanking | d.SelfEvolution)]

# A few float32 roundings of numbers of size 1: what is left where the reference in float32 happens to be exact.
_EPSILON = 3e-7


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Logits (P, V) float32 and what they are compared with."""

    logits_PV: NDArray[np.float32]
    targets: KernelInputs


def make_problem(num_positions: int, vocab_size: int, num_entries: int, *, seed: int = 0, noise: float = 3.0) -> Problem:
    """A random teacher's top entries in shuffled order, weights and labels; the student is the teacher plus noise.

    Some of each row's entries count as estimates for divergences that distinguish them.
    """
    rng = np.random.default_rng((seed, num_positions, vocab_size, num_entries))
    teacher_PV = log_softmax(rng.standard_normal((num_positions, vocab_size)) * 3)
    ids_PK = rng.permuted(np.argsort(-teacher_PV, axis=1)[:, :num_entries], axis=1)
    logprobs_PK = np.take_along_axis(teacher_PV, ids_PK, axis=1)
    targets = make_kernel_inputs(
        ids_PK,
        logprobs_PK,
        np.clip(1 - np.exp(logprobs_PK).sum(axis=1), 0, 1),
        vocab_size=vocab_size,
        target_ids_P=np.where(rng.random(num_positions) < 0.3, NO_TARGET, rng.integers(0, vocab_size, num_positions)),
        weights_P=rng.random(num_positions) + 0.1,
        num_exact_P=np.arange(num_positions) % (num_entries + 1),
    )
    student_PV = teacher_PV + noise * rng.standard_normal((num_positions, vocab_size)) + 5
    return Problem(student_PV.astype(np.float32), targets)


def log_softmax(z_PV: Floats) -> Floats:
    return z_PV - np.log(np.exp(z_PV).sum(axis=1, keepdims=True))


def assert_like_reference(compute: Compute, problem: Problem, objective: Objective) -> None:
    """error <= error of the reference computed in float32 + epsilon, for losses and gradients."""
    losses_P, gradients_PV = compute(problem.logits_PV, problem.targets, objective)
    exact_P, exact_PV = reference.loss_and_gradient(problem.logits_PV, problem.targets, objective)
    single_P, single_PV = reference.loss_and_gradient(problem.logits_PV, problem.targets, objective, np.float32)
    # A loss is a difference of logits and their lse, which float32 arithmetic may round as large as they are.
    largest = np.abs(problem.logits_PV, where=np.isfinite(problem.logits_PV), out=np.zeros_like(problem.logits_PV)).max(
        initial=0
    )
    allowed_P = np.abs(single_P - exact_P) + _EPSILON * (1 + np.abs(exact_P)) + largest * 2.0**-24
    assert (np.abs(losses_P - exact_P) <= allowed_P).all(), (objective, losses_P, exact_P)
    allowed = np.abs(single_PV - exact_PV).max(initial=0) + _EPSILON
    if not isinstance(objective.divergence, d.ForwardKL):
        allowed += largest * 2.0**-24  # the forward KL's h has no log Q in it
    assert np.abs(gradients_PV - exact_PV).max(initial=0) <= allowed, objective
    assert losses_P.shape == exact_P.shape
    assert gradients_PV.shape == exact_PV.shape


def check_agrees_with_the_reference(compute: Compute) -> None:
    for shape in SHAPES:
        for objective in OBJECTIVES:
            assert_like_reference(compute, make_problem(*shape), objective)


def check_padding_may_be_anywhere(compute: Compute) -> None:
    """Padding entries hold -1 and any logprob, also a NaN; a row may have nothing else."""
    full = make_problem(4, 50, 3)
    ids_PK = np.full((4, 6), -1)
    logprobs_PK = np.full((4, 6), np.nan, np.float32)
    ids_PK[:3, [1, 2, 5]], logprobs_PK[:3, [1, 2, 5]] = full.targets.token_ids_PK[:3], full.targets.logprobs_PK[:3]
    num_exact_P = np.array([[0, 2, 3, 6][count] for count in full.targets.num_exact_P])
    wide = make_kernel_inputs(ids_PK, logprobs_PK, full.targets.tail_mass_P, vocab_size=50, num_exact_P=num_exact_P)
    narrow = replace(full.targets, target_ids_P=wide.target_ids_P, weights_P=wide.weights_P)
    for objective in OBJECTIVES:
        wide_P, wide_PV = compute(full.logits_PV, wide, objective)
        narrow_P, narrow_PV = compute(full.logits_PV, narrow, objective)
        np.testing.assert_allclose(wide_P[:3], narrow_P[:3], atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(wide_PV[:3], narrow_PV[:3], atol=1e-6, rtol=1e-6)
        assert_like_reference(compute, Problem(full.logits_PV, wide), objective)


def check_probability_zero_adds_nothing(compute: Compute) -> None:
    """A stored -inf: 0 log 0 = 0, also where the student gives the id nothing."""
    problem = make_problem(3, 20, 4)
    logprobs_PK, logits_PV = problem.targets.logprobs_PK.copy(), problem.logits_PV.copy()
    logprobs_PK[:, 1] = -np.inf
    logits_PV[0, problem.targets.token_ids_PK[0, 1]] = -np.inf
    problem = Problem(logits_PV, replace(problem.targets, logprobs_PK=logprobs_PK))
    for objective in OBJECTIVES:
        losses_P, gradients_PV = compute(logits_PV, problem.targets, objective)
        assert np.isfinite(losses_P).all(), objective
        assert np.isfinite(gradients_PV).all(), objective
        assert_like_reference(compute, problem, objective)
    all_zero = replace(problem.targets, logprobs_PK=np.full_like(logprobs_PK, -np.inf))
    assert not compute(logits_PV, all_zero, Objective("renormalize"))[0].any()


def check_masked_logits_get_no_gradient(compute: Compute) -> None:
    """-inf logits outside the support, as of a padded vocabulary."""
    problem = make_problem(3, 40, 4)
    masked_PV = np.ones((3, 40), bool)
    np.put_along_axis(masked_PV, problem.targets.token_ids_PK, False, axis=1)
    masked_PV[:, 10:] = False
    logits_PV = np.where(masked_PV, -np.inf, problem.logits_PV).astype(np.float32)
    unlabelled = replace(problem.targets, target_ids_P=np.full(3, NO_TARGET, np.int32))
    for objective in OBJECTIVES:
        if objective.tail != "uniform":
            assert_like_reference(compute, Problem(logits_PV, unlabelled), objective)
            assert not compute(logits_PV, unlabelled, objective)[1][masked_PV].any(), objective


def check_a_uniform_tail_that_the_student_cannot_give_is_infinite(compute: Compute) -> None:
    problem = make_problem(3, 40, 4)
    logits_PV = problem.logits_PV.copy()
    logits_PV[0, next(v for v in range(40) if v not in problem.targets.token_ids_PK[0])] = -np.inf
    for alpha in (1.0, 0.5):
        losses_P, _ = compute(logits_PV, problem.targets, Objective("uniform", alpha))
        assert np.isposinf(losses_P).tolist() == [True, False, False]


def check_no_tail_mass_means_no_tail_term(compute: Compute) -> None:
    """r = 0 exactly, also where the student has no tail; and r of rounding size where the support is the whole vocabulary."""
    problem = make_problem(4, 30, 6)
    no_tail = replace(problem.targets, tail_mass_P=np.zeros(4, np.float32))
    bucket, drop = (compute(problem.logits_PV, no_tail, Objective(tail)) for tail in ("bucket", "drop"))
    np.testing.assert_array_equal(bucket[0], drop[0])
    np.testing.assert_array_equal(bucket[1], drop[1])
    outside_PV = np.ones((4, 30), bool)
    np.put_along_axis(outside_PV, problem.targets.token_ids_PK, False, axis=1)
    alone = Problem(np.where(outside_PV, -np.inf, problem.logits_PV).astype(np.float32), no_tail)
    assert np.isfinite(compute(alone.logits_PV, alone.targets, Objective())[1]).all()
    assert_like_reference(compute, alone, Objective())
    whole = make_problem(4, 12, 12)
    whole = Problem(whole.logits_PV, replace(whole.targets, tail_mass_P=np.full(4, 1e-7, np.float32)))
    assert np.isfinite(compute(whole.logits_PV, whole.targets, Objective())[0]).all()
    assert_like_reference(compute, whole, Objective())


def check_near_convergence_the_gradient_stays_right(compute: Compute) -> None:
    """q close to p: the gradient is a small difference of large numbers."""
    for noise in (1e-2, 1e-4, 0.0):
        problem = make_problem(6, 500, 20, noise=noise)
        for objective in SMOOTH:
            assert_like_reference(compute, problem, objective)


def check_a_tiny_student_tail_keeps_its_gradient(compute: Compute) -> None:
    """Logits outside the support 20, 60 and 150 below it: 1 - sum(Q) would be 0, and so would exp(z - max) in float32."""
    problem = make_problem(3, 300, 8)
    outside_PV = np.ones((3, 300), bool)
    np.put_along_axis(outside_PV, problem.targets.token_ids_PK, False, axis=1)
    for depth in (20, 60, 150):
        logits_PV = np.where(outside_PV, problem.logits_PV - depth, problem.logits_PV).astype(np.float32)
        for tail_mass in (1e-12, 1e-3):
            targets = replace(problem.targets, tail_mass_P=np.full(3, tail_mass, np.float32))
            losses_P, gradients_PV = compute(logits_PV, targets, Objective())
            exact_P, exact_PV = reference.loss_and_gradient(logits_PV, targets, Objective())
            np.testing.assert_allclose(losses_P, exact_P, rtol=2e-6)
            np.testing.assert_allclose(gradients_PV[outside_PV], exact_PV[outside_PV], rtol=2e-5, atol=1e-30)


def check_rows_of_weight_zero_are_not_read(compute: Compute) -> None:
    problem = make_problem(4, 25, 3)
    problem.targets.weights_P[[0, 2]] = 0
    problem.logits_PV[0] = np.nan
    for objective in OBJECTIVES:
        losses_P, gradients_PV = compute(problem.logits_PV, problem.targets, objective)
        assert not losses_P[[0, 2]].any()
        assert not gradients_PV[[0, 2]].any()
        assert losses_P[[1, 3]].any() or objective.alpha == 0, objective
        assert_like_reference(compute, problem, objective)


def check_nan_and_infinity_surface(compute: Compute) -> None:
    """In the support, outside it, in the last odd column; the other rows are untouched."""
    clean = make_problem(3, 37, 4)
    inside = int(clean.targets.token_ids_PK[1, 2])
    outside = next(v for v in range(37) if v not in clean.targets.token_ids_PK[1])
    for value in (np.nan, np.inf):
        for column in (inside, outside, 36):
            logits_PV = clean.logits_PV.copy()
            logits_PV[1, column] = value
            for objective in OBJECTIVES:
                if objective.alpha == 0:
                    continue
                losses_P, gradients_PV = compute(logits_PV, clean.targets, objective)
                surfaced_P = np.isnan(losses_P) if np.isnan(value) else ~np.isfinite(losses_P)
                assert surfaced_P.tolist() == [False, True, False], (value, column, objective)
                assert np.isnan(gradients_PV).any(axis=1).tolist() == [False, True, False], (value, column, objective)
                assert np.isfinite(gradients_PV[[0, 2]]).all()


def check_large_logits_do_not_overflow(compute: Compute) -> None:
    problem = make_problem(3, 40, 5)
    logits_PV = (problem.logits_PV * 100).astype(np.float32)
    losses_P, gradients_PV = compute(logits_PV, problem.targets, Objective(alpha=0.5))
    exact_P, exact_PV = reference.loss_and_gradient(logits_PV, problem.targets, Objective(alpha=0.5))
    np.testing.assert_allclose(losses_P, exact_P, rtol=1e-5)
    np.testing.assert_allclose(gradients_PV, exact_PV, atol=2e-4)


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
