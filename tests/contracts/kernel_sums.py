"""Promises of every backend for several divergences of the same logits, and for options that differ between positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from contracts.kernels import FORWARD_KL, Floats, Problem, make_problem

from kdcache.kernels import divergences as d
from kdcache.kernels import reference
from kdcache.kernels.base import PADDING_ID, KernelInputs, Objective, Summand, SumOutputs

Found = tuple[Floats, Floats, Floats]
ComputeSum = Callable[[Floats, list[Summand]], Found]
"""float32 logits to (P,) losses, (P, V) gradients of sum(weights * losses), and (P, D + 1) values."""

SHAPES = [(0, 5, 2), (2, 1, 1), (4, 17, 0), (5, 16, 16), (7, 33, 5), (3, 4133, 20)]

# Within these, one number for each position.
RANGES: dict[str, tuple[float, float]] = {
    "floor": (1e-9, 0.1), "beta": (0.0, 1.0), "skew": (0.05, 0.9), "head_mass": (0.1, 1.0), "a": (0.1, 2.0), "b": (0.1, 2.0),
    "inner_temperature": (0.5, 3.0), "tail_weight": (0.0, 2.0), "margin": (0.0, 2.0), "strength": (0.2, 3.0), "lam": (0.0, 1.0),
    "threshold": (0.0, 2.0), "max_share": (0.0, 0.9), "softness": (0.0, 2.0),
}  # fmt: skip


def by_reference(logits_PV: Floats, summands: list[Summand]) -> Found:
    gradients_PV, shape = logits_PV.astype(np.float64), (len(logits_PV), len(summands) + 1)
    outputs = SumOutputs(np.empty(shape[0]), np.empty(shape))
    reference.summed_losses(gradients_PV, summands, outputs, want_gradient=True)
    return outputs.losses_P, gradients_PV, outputs.values_PD1


def assert_like_reference(compute: ComputeSum, problem: Problem, summands: list[Summand]) -> None:
    found, exact = compute(problem.logits_PV, summands), by_reference(problem.logits_PV, summands)
    what = str([summand.objective for summand in summands])
    for name, one, other in zip(("losses", "gradients", "values"), found, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=3e-6, atol=5e-6, err_msg=f"{name} of {what}")


def exact_only(inputs: KernelInputs) -> KernelInputs:
    """As a divergence reads them that leaves estimates out: their ids are in its tail."""
    columns_K = np.arange(inputs.token_ids_PK.shape[1])
    ids_PK = np.where(columns_K < inputs.num_exact_P[:, None], inputs.token_ids_PK, PADDING_ID).astype(np.int32)
    mass_P = np.where(ids_PK >= 0, np.exp(inputs.logprobs_PK), 0).sum(axis=1)
    return replace(inputs, token_ids_PK=ids_PK, tail_mass_P=np.clip(1 - mass_P, 0, 1).astype(np.float32))


def mixtures(problem: Problem) -> Iterator[list[Summand]]:
    """Sums with several tails, another temperature, weights of positions, and entries that one part reads alone."""
    inputs, rng = problem.targets, np.random.default_rng(1)
    factor_P = rng.random(len(problem.logits_PV)) * (np.arange(len(problem.logits_PV)) != 1)
    narrow = exact_only(inputs)
    entropy = Summand(inputs, Objective(alpha=0.0), 0.3 * factor_P)
    for t in (1.0, 2.0):
        tails = [
            Summand(inputs, Objective(tail, temperature=t), (1 + place) * factor_P)
            for place, tail in enumerate(d.TAIL_POLICIES)
        ]
        yield [*tails, Summand(inputs, Objective(divergence=d.ReverseKL(), temperature=t)), replace_temperature(entropy, t)]
        yield [
            Summand(inputs, Objective("drop", temperature=t)),
            Summand(narrow, Objective("bucket", divergence=d.JensenShannon(), temperature=t), factor_P),
            Summand(narrow, Objective("uniform", temperature=t), factor_P),
            Summand(narrow, Objective("renormalize", 0.6, temperature=t)),
        ]
    yield [
        Summand(narrow, Objective(divergence=d.SelfEvolution())),
        Summand(narrow, Objective(divergence=d.HardShare()), np.zeros(len(factor_P))),
        Summand(inputs, Objective(divergence=d.TailAwareKL()), factor_P),
        Summand(inputs, Objective("bucket", divergence=d.SoftSpearman())),
        entropy,
    ]


def replace_temperature(summand: Summand, temperature: float) -> Summand:
    return replace(summand, objective=replace(summand.objective, temperature=temperature))


def check_a_sum_is_the_sum_of_its_parts(compute: ComputeSum) -> None:
    for shape in SHAPES:
        problem = make_problem(*shape)
        for summands in mixtures(problem):
            assert_like_reference(compute, problem, summands)


def check_one_part_is_the_divergence_alone(compute: ComputeSum) -> None:
    problem = make_problem(4, 33, 5)
    for objective in FORWARD_KL:
        losses_P, gradients_PV, values_PD1 = compute(problem.logits_PV, [Summand(problem.targets, objective)])
        exact_P, exact_PV = reference.loss_and_gradient(problem.logits_PV, problem.targets, objective)
        np.testing.assert_allclose(losses_P, exact_P, rtol=3e-6, atol=5e-6)
        np.testing.assert_allclose(gradients_PV, exact_PV, rtol=3e-6, atol=5e-6)
        np.testing.assert_allclose(
            objective.alpha * values_PD1[:, 0] + (1 - objective.alpha) * values_PD1[:, 1], losses_P, rtol=3e-6
        )


def check_options_may_differ_between_positions(compute: ComputeSum) -> None:
    """Each position's loss and gradient are those of its own number, whatever the others have."""
    problem, rng = make_problem(6, 33, 5), np.random.default_rng(2)
    for kind in d.DIVERGENCES.values():
        if not kind.per_position:
            continue
        drawn = {name: rng.uniform(*RANGES[name], 6) for name in kind.per_position}
        if kind is d.JensenShannon:
            drawn["beta"][[0, 1]] = 0.0, 1.0
        if kind is d.SkewKL:
            drawn["skew"][0] = 0.0
        if kind is d.SelfEvolution:
            drawn["max_share"][0], drawn["softness"][1], drawn["lam"][2] = 0.0, 0.0, 1.0
        assert_like_reference(compute, problem, [Summand(problem.targets, Objective(divergence=kind(**drawn)))])
        # In NumPy the definition itself goes position by position: here it is asked for one number at a time.
        for i in range(6):
            alone = Summand(
                problem.targets, Objective(divergence=kind(**{name: float(value_P[i]) for name, value_P in drawn.items()}))
            )
            together = compute(problem.logits_PV, [Summand(problem.targets, Objective(divergence=kind(**drawn)))])
            for one, other in zip(compute(problem.logits_PV, [alone]), together, strict=True):
                np.testing.assert_allclose(one[i], other[i], rtol=2e-6, atol=2e-6, err_msg=f"{kind.name} {i}")


def check_a_part_of_weight_zero_adds_nothing(compute: ComputeSum) -> None:
    """Also where its value is infinite."""
    problem = make_problem(3, 20, 4)
    logits_PV = problem.logits_PV.copy()
    logits_PV[:, problem.targets.token_ids_PK[0, 0]] = -np.inf
    without = Summand(problem.targets, Objective(divergence=d.ReverseKL()))
    infinite = Summand(problem.targets, Objective("drop"), np.zeros(3))
    for one, other in zip(compute(logits_PV, [without, infinite])[:2], compute(logits_PV, [without])[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def check_positions_of_weight_zero_are_not_read(compute: ComputeSum) -> None:
    problem = make_problem(4, 25, 3)
    problem.targets.weights_P[[0, 2]] = 0
    problem.logits_PV[0] = np.nan
    for summands in mixtures(problem):
        losses_P, gradients_PV, values_PD1 = compute(problem.logits_PV, summands)
        assert not losses_P[[0, 2]].any()
        assert not gradients_PV[[0, 2]].any()
        assert not values_PD1[[0, 2]].any()
        assert_like_reference(compute, problem, summands)


CHECKS: list[Callable[[ComputeSum], Any]] = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
