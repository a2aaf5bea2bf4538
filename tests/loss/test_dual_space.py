"""Dual-space distillation: its definition, DSKDv2's own numbers, where gradients go, and maps from Gram matrices."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.errors import LossError
from kdcache.loss.chunks import Head
from kdcache.loss.fused import Projection
from kdcache.loss.states import dense_reference as reference
from kdcache.loss.states.dense_reference import Side
from kdcache.loss.states.dual_space import Affine, DualSpaceSettings, LogitSolver, dual_space_loss
from kdcache.loss.states.exact_kl import TeacherStates, exact_kd_loss, low_rank, whole_divergence

sys.path.insert(0, str(Path(__file__).parent / "oracles"))
from dskdv2 import toy

# `python tests/loss/oracles/dskdv2.py`; label, student's space, teacher's space, agreement, and norms of the gradients with
# respect to the student's hidden states, its head, and A.
DSKDV2 = {
    "forward_kl": (1.0227901935577393, 1.3712824583053589, 0.8868141770362854, 0.5, 1.0079206, 0.21458030, 0.99929521),
    "reverse_kl": (1.0227901935577393, 1.7846953868865967, 1.1295931339263916, 0.5, 0.83013903, 0.17102895, 0.99929521),
}


class Case:
    """Two models, and maps between their states."""

    def __init__(self, *, seed: int = 1, num_positions: int = 13, ids: int = 41) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.hidden_PH, self.weight_VH = normal(num_positions, 6).requires_grad_(), normal(ids, 6).requires_grad_()
        self.weight_A = normal(6, 9).mul(0.3).requires_grad_()
        self.weight_B = normal(9, 6).mul(0.3)
        self.teacher = TeacherStates(normal(num_positions, 9), Projection(normal(ids, 9), chunk_positions=4))
        self.weights_P = torch.rand(num_positions, generator=generator, dtype=torch.float64)
        self.projection = Projection(self.weight_VH, chunk_positions=5)

    def loss(self, **settings):
        maps = Affine(self.weight_A), Affine(self.weight_B)
        student = self.hidden_PH, self.projection
        return dual_space_loss(student, self.teacher, maps, self.weights_P, DualSpaceSettings(**settings))

    def sides(self) -> tuple[Side, Side]:
        student = Side(self.hidden_PH.detach().numpy(), self.weight_VH.detach().numpy())
        return student, Side(self.teacher.hidden_PH.numpy(), self.teacher.projection.weight_VH.numpy())


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
@pytest.mark.parametrize("agreement", ["counted", "averaged", "ignored"])
def test_parts_and_gradients_are_those_of_the_definition(name: str, agreement: str) -> None:
    case = Case()
    found = case.loss(divergence=name, temperature=2.0, agreement=agreement)
    student, teacher = case.sides()
    weight_A, weight_B = case.weight_A.detach().numpy(), case.weight_B.numpy()
    parts, (top_PV, student_PV, teacher_PV) = reference.dual_space(
        student, teacher, (weight_A, weight_B), whole_divergence(name), 2.0
    )
    w_P = case.weights_P.numpy()
    kept_P = w_P if agreement == "ignored" else w_P * parts.agrees_P
    kept_P = kept_P * (w_P.sum() / kept_P.sum() if agreement == "averaged" else 1)
    assert 0 < parts.agrees_P.sum() < len(w_P)
    assert found.agreement.item() == pytest.approx((w_P * parts.agrees_P).sum() / w_P.sum())
    for value, losses_P, weights_P in (
        (found.top, parts.top_P, w_P),
        (found.to_student, parts.to_student_P, kept_P),
        (found.to_teacher, parts.to_teacher_P, w_P),
    ):
        assert value.item() == pytest.approx((weights_P * losses_P).sum(), rel=1e-12)
    own, head, _ = reference.through_head(student, kept_P[:, None] * student_PV)
    back, _, _ = reference.through_head(reference.mapped(teacher, student, weight_B), w_P[:, None] * teacher_PV)
    to_A, _, _ = reference.through_head(reference.mapped(student, teacher, weight_A), w_P[:, None] * top_PV)
    found.total().backward()
    np.testing.assert_allclose(case.hidden_PH.grad, own + back @ weight_B, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(case.weight_VH.grad, head, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(case.weight_A.grad, to_A.T @ teacher.hidden_PH, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("objective", list(DSKDV2))
def test_equals_dskdv2s_criterion(objective: str) -> None:
    numbers = toy()
    hidden_PH, head_VH = numbers["hidden"].requires_grad_(), numbers["head"].requires_grad_()
    teacher_head = Projection(numbers["teacher_head"])
    weight_A = LogitSolver(Projection(head_VH)).solve(teacher_head).weight.requires_grad_()
    weight_B = LogitSolver(teacher_head).solve(Projection(head_VH)).weight
    found = dual_space_loss(
        (hidden_PH, Projection(head_VH)),
        TeacherStates(numbers["teacher_hidden"], teacher_head),
        (Affine(weight_A), Affine(weight_B)),
        torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]),
        DualSpaceSettings(divergence=objective, temperature=2.0, squared_temperature=False, agreement="averaged"),
    )
    top, to_student, to_teacher, agreement, *norms = DSKDV2[objective]
    assert [found.top.item() / 4, found.to_student.item() / 4, found.to_teacher.item() / 4] == pytest.approx(
        [top, to_student, to_teacher], rel=1e-6
    )
    assert found.agreement.item() == agreement
    (found.total() / 4).backward()
    gradients = [hidden_PH.grad, head_VH.grad, weight_A.grad]
    assert [float(g.norm()) for g in gradients if g is not None] == pytest.approx(norms, rel=1e-6)


def test_one_space_and_maps_that_do_nothing_are_plain_distillation() -> None:
    """H_t = H_s, W_t = W_s, A = B = I: both comparisons are the exact KL."""
    hidden_PH = torch.randn((7, 5), dtype=torch.float64)
    weight_VH, same = torch.randn((23, 5), dtype=torch.float64), Affine(torch.eye(5, dtype=torch.float64))
    teacher = TeacherStates(torch.randn((7, 5), dtype=torch.float64), Projection(weight_VH))
    found = dual_space_loss((hidden_PH, Projection(weight_VH)), teacher, (same, same))
    plain = exact_kd_loss(hidden_PH, weight_VH, teacher, reduction="sum").item()
    assert found.to_student.item() == pytest.approx(plain, rel=1e-12)
    assert found.to_teacher.item() == pytest.approx(plain, rel=1e-12)
    assert found.agreement.item() == 1


def test_golden_start() -> None:
    """W_s^+ W_t = M where W_t = W_s M."""
    weight_VH = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    start = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    found = LogitSolver(Projection(weight_VH)).solve(Projection(weight_VH @ start)).weight
    torch.testing.assert_close(found, start, atol=1e-14, rtol=0)


def test_a_teacher_that_is_a_map_away_is_kept_whole() -> None:
    """W_t = W_s M, with biases and scales: the start gives the teacher's own logits, and agrees everywhere."""
    case = Case()
    weight_VH, bias_V = case.weight_VH.detach(), torch.randn(41, dtype=torch.float64)
    away = torch.randn((6, 9), dtype=torch.float64)
    shift_V = weight_VH @ torch.randn(6, dtype=torch.float64)
    student = Projection(weight_VH, bias_V, Head(logit_scale=0.5))
    head = Projection(weight_VH @ away, (bias_V + shift_V) / 4, Head(logit_scale=2.0))
    # 0.5 (W (M' h + a) + b) with M' = 4 M is 2 (W M h + (W a + b) / 4).
    affine = LogitSolver(student).solve(head)
    states_PH = case.teacher.hidden_PH
    logits_PV = 2.0 * (states_PH @ head.weight_VH.T + head.bias_V)
    mapped_PV = 0.5 * (affine(states_PH) @ weight_VH.T + bias_V)
    torch.testing.assert_close(mapped_PV, logits_PV, rtol=1e-10, atol=1e-10)
    maps = affine, LogitSolver(head).solve(student)
    found = dual_space_loss((case.hidden_PH, student), TeacherStates(states_PH, head), maps)
    assert found.agreement.item() == 1
    exact = exact_kd_loss(case.hidden_PH, student, TeacherStates(states_PH, head), reduction="sum").item()
    assert found.to_student.item() == pytest.approx(exact, rel=1e-9)


def test_maps_are_the_least_squares_of_a_decomposition() -> None:
    case = Case()
    for mine, other in ((case.projection, case.teacher.projection), (case.teacher.projection, case.projection)):
        right = reference.least_squares(mine.weight_VH.detach().numpy(), other.weight_VH.detach().numpy())
        np.testing.assert_allclose(LogitSolver(mine).solve(other).weight, right, rtol=1e-9, atol=1e-12)


def test_a_projection_of_dependent_columns_has_its_smallest_solution() -> None:
    weight_VH = torch.randn((30, 4), dtype=torch.float64)
    twice_VH, other_VH = torch.cat([weight_VH, weight_VH], dim=1), torch.randn((30, 3), dtype=torch.float64)
    found = LogitSolver(Projection(twice_VH)).solve(Projection(other_VH)).weight
    np.testing.assert_allclose(found, reference.least_squares(twice_VH.numpy(), other_VH.numpy()), rtol=1e-7, atol=1e-9)


def test_coordinates_of_a_low_rank_are_the_states_that_they_stand_for() -> None:
    case = Case()
    basis = torch.linalg.qr(torch.randn((9, 3), dtype=torch.float64))[0].T
    center = torch.randn(9, dtype=torch.float64)
    coordinates = torch.randn((13, 3), dtype=torch.float64)
    folded = low_rank(case.teacher.projection, basis, center)
    whole = TeacherStates(coordinates @ basis + center, case.teacher.projection)
    affine = LogitSolver(case.projection).solve(folded)
    whole_affine = LogitSolver(case.projection).solve(case.teacher.projection)
    torch.testing.assert_close(affine(coordinates), whole_affine(whole.hidden_PH), rtol=1e-9, atol=1e-9)
    back = LogitSolver(folded).solve(case.projection)
    found = dual_space_loss((case.hidden_PH, case.projection), TeacherStates(coordinates, folded), (affine, back))
    exact = dual_space_loss((case.hidden_PH, case.projection), whole, (whole_affine, Affine(case.weight_B)))
    assert found.to_student.item() == pytest.approx(exact.to_student.item(), rel=1e-9)
    assert found.top.item() == pytest.approx(exact.top.item(), rel=1e-9)


def test_gradients_go_where_they_should() -> None:
    """None to the teacher and B, none from the label to the student, none from the student's comparison to A."""
    for part, reached in (("top", "A"), ("to_student", "hidden weight"), ("to_teacher", "hidden")):
        case = Case()
        teacher = replace(case.teacher.projection, weight_VH=case.teacher.projection.weight_VH.requires_grad_())
        case.teacher = TeacherStates(case.teacher.hidden_PH.requires_grad_(), teacher)
        getattr(case.loss(), part).backward()
        leaves = {"A": case.weight_A, "hidden": case.hidden_PH, "weight": case.weight_VH}
        assert {name for name, leaf in leaves.items() if leaf.grad is not None and leaf.grad.any()} == set(reached.split())
        assert teacher.weight_VH.grad is None
        assert case.teacher.hidden_PH.grad is None


def test_without_its_square_the_temperature_makes_both_comparisons_smaller() -> None:
    with_square, without = (Case().loss(temperature=2.0, squared_temperature=square) for square in (True, False))
    assert with_square.to_student.item() == pytest.approx(4 * without.to_student.item())
    assert with_square.to_teacher.item() == pytest.approx(4 * without.to_teacher.item())
    assert with_square.top.item() == without.top.item()


def test_vocabularies_of_other_sizes() -> None:
    case = Case()
    wider = Projection(torch.cat([case.teacher.projection.weight_VH, torch.zeros((5, 9), dtype=torch.float64)]))
    solver = LogitSolver(case.projection)
    torch.testing.assert_close(solver.solve(wider).weight, solver.solve(case.teacher.projection).weight)
    case.teacher = TeacherStates(case.teacher.hidden_PH, wider)
    assert case.loss().total().isfinite()


def test_no_position() -> None:
    case = Case(num_positions=0)
    found = case.loss()
    assert found.total().item() == 0
    assert found.agreement.item() == 1


def test_refusals() -> None:
    with pytest.raises(LossError, match="agreement is 'some', but must be one of 'counted'"):
        DualSpaceSettings(agreement="some")
    case = Case()
    case.weight_A = case.weight_A.detach().T
    with pytest.raises(LossError, match=r"map A has the shape \(9, 6\).* must have \(6, 9\)"):
        case.loss()
