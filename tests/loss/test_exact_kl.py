"""Exact distillation from states: equal to its definition, to the sparse loss over whole supports, and made in chunks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdcache.errors import LossError
from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.divergences import DIVERGENCES, get_divergence
from kdcache.loss.chunks import Head
from kdcache.loss.fused import Projection, fused_sparse_kd_loss
from kdcache.loss.states import dense_reference as reference
from kdcache.loss.states.dense_reference import Side
from kdcache.loss.states.exact_kl import OVER_IDS, TeacherStates, exact_kd_loss, low_rank, whole_divergence

NAMES = [kind.name for kind in OVER_IDS]
PLAIN, SHAPED = Head(), Head(logit_scale=0.7, softcap=3.0)


class Case:
    """Two models with states, weights and biases of their own."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, *, heads: tuple[Head, Head] = (PLAIN, PLAIN), ids: tuple[int, int] = (53, 53)
    ) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.leaves = (normal(19, 8).requires_grad_(), normal(ids[0], 8).requires_grad_(), normal(ids[0]).requires_grad_())
        self.teacher = TeacherStates(normal(19, 12), Projection(normal(ids[1], 12), normal(ids[1]), heads[1]))
        self.projection = Projection(self.leaves[1], self.leaves[2], heads[0], chunk_positions=5)
        self.weights_P = torch.rand(19, generator=generator, dtype=torch.float64)
        self.weights_P[4] = 0

    def loss(self, **options) -> torch.Tensor:
        return exact_kd_loss(self.leaves[0], self.projection, self.teacher, weights=self.weights_P, **options)

    def sides(self) -> tuple[Side, Side]:
        return _side(self.leaves[0], self.projection), _side(self.teacher.hidden_PH, self.teacher.projection)

    def expected(self, name: str, temperature: float) -> tuple[float, list[np.ndarray]]:
        """The mean, and the gradients of hidden states, weight and bias."""
        student, teacher = self.sides()
        losses_P, gradient_PV = reference.exact_losses(student.logits(), teacher.logits(), whole_divergence(name), temperature)
        shares_P = (self.weights_P / self.weights_P.sum()).numpy()
        return float((shares_P * losses_P).sum()), list(reference.through_head(student, shares_P[:, None] * gradient_PV))


def _side(hidden_PH: torch.Tensor, projection: Projection) -> Side:
    head, bias_V = projection.head or PLAIN, projection.bias_V
    weight_VH = projection.weight_VH.detach().double().numpy()
    bias = None if bias_V is None else bias_V.detach().double().numpy()
    return Side(hidden_PH.detach().double().numpy(), weight_VH, bias, head.logit_scale, head.softcap)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("heads", [(PLAIN, PLAIN), (SHAPED, replace(SHAPED, softcap=5.0))], ids=["plain", "shaped"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_the_definition(name: str, heads: tuple[Head, Head], temperature: float) -> None:
    case = Case(heads=heads)
    loss = case.loss(divergence=name, temperature=temperature)
    gradients = torch.autograd.grad(loss, case.leaves)
    value, expected = case.expected(name, temperature)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    for found, right in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), right, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_the_definition_agrees_with_finite_differences(name: str) -> None:
    case = Case(heads=(SHAPED, PLAIN))
    (hidden_PH, weight_VH, bias_V), inputs = case.leaves, case.leaves

    def loss(hidden_PH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor) -> torch.Tensor:
        projection = replace(case.projection, weight_VH=weight_VH, bias_V=bias_V)
        return exact_kd_loss(hidden_PH, projection, case.teacher, divergence=name, temperature=1.5)

    del hidden_PH, weight_VH, bias_V
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_sparse_loss_whose_support_is_the_vocabulary(name: str) -> None:
    """The same formula by another way: every id is an entry, and the tail is empty."""
    case = Case()
    teacher_PV = torch.from_numpy(case.sides()[1].logits()).log_softmax(dim=1)
    ids_PV = torch.arange(53).expand(19, 53)
    soft = SoftTargets.of(ids_PV, teacher_PV, torch.zeros(19), entries="exact", vocab_size=53)
    divergence = whole_divergence(name)
    sparse = fused_sparse_kd_loss(case.leaves[0], case.projection, soft, divergence=divergence, weights=case.weights_P)
    assert case.loss(divergence=divergence).item() == pytest.approx(sparse.item(), rel=1e-6)


@pytest.mark.parametrize("ids", [(53, 60), (60, 53)], ids=["the teacher", "the student"])
def test_padding_of_either_side(ids: tuple[int, int]) -> None:
    """The teacher's further ids do not exist; to the student's it gives nothing."""
    case = Case(ids=ids)
    loss = case.loss()
    value, expected = case.expected("forward_kl", 1.0)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(torch.autograd.grad(loss, case.leaves)[1].numpy(), expected[1], atol=1e-13)
    for name in NAMES:
        assert math.isfinite(case.loss(divergence=name).item())


def test_padding_that_the_students_head_leaves_out() -> None:
    case = Case(ids=(60, 53))
    projection = replace(case.projection, head=Head(vocab_size=53))
    trimmed = exact_kd_loss(case.leaves[0], projection, case.teacher, weights=case.weights_P)
    narrow = Projection(case.leaves[1][:53], case.leaves[2][:53])
    right = exact_kd_loss(case.leaves[0], narrow, case.teacher, weights=case.weights_P)
    assert trimmed.item() == pytest.approx(right.item(), rel=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_model_on_both_sides_loses_nothing(name: str) -> None:
    hidden_PH = torch.randn((7, 6), dtype=torch.float64, requires_grad=True)
    weight_VH = torch.randn((31, 6), dtype=torch.float64)
    loss = exact_kd_loss(hidden_PH, weight_VH, TeacherStates(hidden_PH, Projection(weight_VH)), divergence=name)
    (gradient_PH,) = torch.autograd.grad(loss, hidden_PH)
    assert abs(loss.item()) < 1e-14
    assert float(gradient_PH.abs().max()) < 1e-15


def test_float32_and_bfloat16_are_within_their_rounding() -> None:
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        case = Case(dtype)
        loss = case.loss()
        value, expected = case.expected("forward_kl", 1.0)
        assert loss.item() == pytest.approx(value, rel=tolerance)
        assert loss.dtype == torch.float32
        for found, right in zip(torch.autograd.grad(loss, case.leaves), expected, strict=True):
            np.testing.assert_allclose(found.float().numpy(), right, atol=tolerance * np.abs(right).max())


def test_states_of_a_low_rank_and_of_another_dtype() -> None:
    """Coordinates with the basis folded into the projection are the states that they stand for."""
    case = Case()
    basis = torch.linalg.qr(torch.randn((12, 4), dtype=torch.float64))[0].T
    mean_H = torch.randn(12, dtype=torch.float64)
    coordinates_PR = torch.randn((19, 4), dtype=torch.float64)
    projection = replace(case.teacher.projection, head=Head(vocab_size=50, softcap=4.0))
    whole = TeacherStates(coordinates_PR @ basis + mean_H, projection)
    folded = TeacherStates(coordinates_PR, low_rank(projection, basis, mean_H))
    losses = [exact_kd_loss(case.leaves[0], case.projection, teacher).item() for teacher in (whole, folded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    half = TeacherStates(
        case.teacher.hidden_PH.half(), replace(case.teacher.projection, weight_VH=projection.weight_VH.bfloat16())
    )
    assert exact_kd_loss(case.leaves[0].float(), case.leaves[1].float(), half).dtype == torch.float32


def test_nothing_of_the_teacher_at_a_position_of_weight_0_is_read() -> None:
    case = Case()
    before = torch.autograd.grad(case.loss(), case.leaves)
    with torch.no_grad():
        case.teacher.hidden_PH[4] = torch.inf
    for found, right in zip(torch.autograd.grad(case.loss(), case.leaves), before, strict=True):
        assert torch.equal(found, right)


def test_no_gradient_reaches_the_teacher() -> None:
    case = Case()
    projection = replace(case.teacher.projection, weight_VH=case.teacher.projection.weight_VH.requires_grad_())
    teacher = TeacherStates(case.teacher.hidden_PH.requires_grad_(), projection)
    exact_kd_loss(case.leaves[0], case.projection, teacher).backward()
    assert teacher.hidden_PH.grad is None
    assert projection.weight_VH.grad is None


def test_a_frozen_projection_costs_no_gradient_and_no_position_costs_nothing() -> None:
    case = Case()
    exact_kd_loss(case.leaves[0], case.leaves[1].detach(), case.teacher).backward()
    assert case.leaves[0].grad is not None
    assert case.leaves[1].grad is None
    empty = TeacherStates(case.teacher.hidden_PH[:0], case.teacher.projection)
    assert exact_kd_loss(case.leaves[0][:0], case.projection, empty).item() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"divergence": "soft_spearman"}, "between whole distributions there are 'forward_kl'"),
        ({"divergence": "forwards"}, "must be one of"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be above 0"),
        ({"reduction": "none"}, "must be 'mean' or 'sum'"),
    ],
)
def test_refusals(change: dict, words: str) -> None:
    with pytest.raises(LossError, match=words):
        Case().loss(**change)


def test_states_that_do_not_fit() -> None:
    case = Case()
    states, projection = case.teacher.hidden_PH, case.teacher.projection
    for teacher, words in (
        (TeacherStates(states[:3], projection), "states at 3 positions, but the student at 19"),
        (TeacherStates(states[:, :5], projection), "states of a low rank need"),
        (TeacherStates(states.to("meta"), projection), "move them there"),
    ):
        with pytest.raises(LossError, match=words):
            exact_kd_loss(case.leaves[0], case.projection, teacher)


def test_the_list_of_divergences_over_ids_is_of_ours() -> None:
    assert all(get_divergence(name) for name in NAMES)
    assert set(NAMES) < set(DIVERGENCES)
