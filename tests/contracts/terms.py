"""What every term of a loss promises (see kdcache/train/terms/base.py): one function per promise, run for each term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdcache.format.soft_targets import SoftTargets
from kdcache.loss.fused import Projection
from kdcache.train.terms import StudentStates

VOCAB_SIZE, HIDDEN, NUM_POSITIONS = 23, 6, 9

SumOfLosses = Callable[[StudentStates, Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Part:
    """Of a batch, what terms may read."""

    teacher: SoftTargets[torch.Tensor]
    target_ids_P: torch.Tensor

    def take(self, start: int, stop: int) -> Part:
        return Part(self.teacher.slice(start, stop), self.target_ids_P[start:stop])


@dataclass(frozen=True)
class Given:
    student: StudentStates
    batch: Part
    weights_P: torch.Tensor

    def take(self, start: int, stop: int) -> Given:
        student = replace(self.student, hidden_PH=self.student.hidden_PH[start:stop])
        return Given(student, self.batch.take(start, stop), self.weights_P[start:stop])


def given(seed: int = 0) -> Given:
    """Random states, and the exact top 4 of a random teacher."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    logprobs_PK, ids_PK = (2 * draw(NUM_POSITIONS, VOCAB_SIZE)).log_softmax(dim=1).topk(4, dim=1)
    teacher = SoftTargets.of(
        ids_PK, logprobs_PK.float(), (1 - logprobs_PK.exp().sum(dim=1)).float(), entries="exact", vocab_size=VOCAB_SIZE
    )
    weight_VH, hidden_PH = draw(VOCAB_SIZE, HIDDEN).requires_grad_(), draw(NUM_POSITIONS, HIDDEN).requires_grad_()
    targets_P = torch.randint(0, VOCAB_SIZE, (NUM_POSITIONS,), generator=random)
    weights_P = torch.rand(NUM_POSITIONS, generator=random) + 0.1
    return Given(StudentStates(hidden_PH, Projection(weight_VH)), Part(teacher, targets_P), weights_P)


def evaluate(term: SumOfLosses, here: Given) -> torch.Tensor:
    return term(here.student, here.batch, here.weights_P)


def a_term_is_a_finite_number_with_a_gradient(term: SumOfLosses) -> None:
    here = given()
    total = evaluate(term, here)
    assert total.ndim == 0
    (slope_PH,) = torch.autograd.grad(total, here.student.hidden_PH)
    assert torch.isfinite(total)
    assert torch.isfinite(slope_PH).all()
    assert slope_PH.abs().max() > 0


def the_gradient_is_the_derivative(term: SumOfLosses) -> None:
    here = given()
    (slope_PH,) = torch.autograd.grad(evaluate(term, here), here.student.hidden_PH)
    direction_PH = torch.randn(slope_PH.shape, generator=torch.Generator().manual_seed(1), dtype=slope_PH.dtype)
    with torch.no_grad():
        up, down = (
            evaluate(term, replace(here, student=replace(here.student, hidden_PH=here.student.hidden_PH + s * direction_PH)))
            for s in (1e-3, -1e-3)
        )
    torch.testing.assert_close((slope_PH * direction_PH).sum().float(), ((up - down) / 2e-3).float(), rtol=2e-3, atol=2e-3)


def the_sum_over_a_batch_is_that_over_its_parts(term: SumOfLosses) -> None:
    here = given()
    parts = evaluate(term, here.take(0, 4)) + evaluate(term, here.take(4, 4)) + evaluate(term, here.take(4, NUM_POSITIONS))
    torch.testing.assert_close(parts, evaluate(term, here), rtol=1e-5, atol=1e-6)


def weights_are_factors_and_weight_zero_is_not_read(term: SumOfLosses) -> None:
    here = given()
    doubled = replace(here, weights_P=2 * here.weights_P)
    torch.testing.assert_close(evaluate(term, doubled), 2 * evaluate(term, here), rtol=1e-5, atol=1e-6)
    weights_P, hidden_PH = here.weights_P.clone(), here.student.hidden_PH.detach().clone()
    weights_P[2], hidden_PH[2] = 0.0, 1e4
    without = replace(here, weights_P=weights_P)
    other = replace(without, student=replace(here.student, hidden_PH=hidden_PH.requires_grad_()))
    torch.testing.assert_close(evaluate(term, other), evaluate(term, without), rtol=1e-5, atol=1e-6)
    (slope_PH,) = torch.autograd.grad(evaluate(term, other), other.student.hidden_PH)
    assert not slope_PH[2].any()


def the_same_call_gives_the_same_number(term: SumOfLosses) -> None:
    assert evaluate(term, given()).item() == evaluate(term, given()).item()


PROMISES = (
    a_term_is_a_finite_number_with_a_gradient,
    the_gradient_is_the_derivative,
    the_sum_over_a_batch_is_that_over_its_parts,
    weights_are_factors_and_weight_zero_is_not_read,
    the_same_call_gives_the_same_number,
)
