"""Dual-space distillation, version 2: teacher and student are compared in the student's space and in the teacher's.

Two linear maps between the last hidden states: A takes the teacher's to the student's size, B the student's to the teacher's.

- top: CE(W_s A h_t, the teacher's most probable id). Trains A alone.
- to_student: D(softmax(W_s A h_t), q), the first a constant, where A keeps the teacher's most probable id. Trains the
  student.
- to_teacher: D(p, softmax(W_t B h_s)). Trains the student's body.

A starts where W_s A = W_t in the sense of least squares, B is that of W_t B = W_s, made again while the student's projection
changes: both of Gram matrices in float64, (W^T W)^+ W^T W', with no decomposition of a (V, H) matrix. Biases, scales and
coordinates of a low rank are in these equations too.

songmzhang/DSKDv2, arXiv 2504.11426. Definition: `dense_reference.dual_space`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.kernels.divergences import Divergence
from kdcache.loss.chunks import Product
from kdcache.loss.fused import PLAIN_HEAD, Projection, check_projection, run_fused
from kdcache.loss.prepare import position_scales
from kdcache.loss.states.dense_steps import DenseStep, TokenStep
from kdcache.loss.states.exact_kl import TeacherStates, check_teacher, check_temperature, student_product, whole_divergence

AGREEMENTS = ("counted", "averaged", "ignored")

# Elements of a weight that are widened to float64 at a time.
_GRAM_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """x -> weight x + bias.

    Attributes:
        weight: (size after, size before).
        bias: (size after,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(states.dtype)
        return torch.nn.functional.linear(states, self.weight.to(states.dtype), bias)


def gram(left_VH: Tensor, right_VH: Tensor) -> Tensor:
    """left^T right in float64, some ids at a time."""
    num_ids = max(1, _GRAM_ELEMENTS // (left_VH.shape[1] + right_VH.shape[1]))
    total = left_VH.new_zeros((left_VH.shape[1], right_VH.shape[1]), dtype=torch.float64)
    for start in range(0, len(left_VH), num_ids):
        total.addmm_(left_VH[start : start + num_ids].double().T, right_VH[start : start + num_ids].double())
    return total


class LogitSolver:
    """Finds the states of one projection whose logits are nearest to those of another's states, over the ids of both.

    Args:
        projection: whose states are wanted; its Gram matrix is inverted here, once, at the cost of V H^2 + H^3.
    """

    def __init__(self, projection: Projection) -> None:
        self._weight_VH, self._bias_V, self._scale = _parts(projection)
        self._inverses: dict[int, Tensor] = {}

    def solve(self, other: Projection) -> Affine:
        """The map of the other's states, float64: scale (W (A h + a) + b) = its scale (W' h + b') as nearly as can be.

        Costs V H H' for the product of both weights, as much as a projection of H' positions does.
        """
        weight_VH, bias_V, scale = _parts(other)
        num_ids, ratio = min(len(self._weight_VH), len(weight_VH)), scale / self._scale
        mine_VH, inverse_HH = self._weight_VH[:num_ids], self._inverse(num_ids)
        weight = ratio * (inverse_HH @ gram(mine_VH, weight_VH[:num_ids]))
        if bias_V is None and self._bias_V is None:
            return Affine(weight)
        shift_V = weight.new_zeros(num_ids)
        if bias_V is not None:
            shift_V += ratio * bias_V[:num_ids].double()
        if self._bias_V is not None:
            shift_V -= self._bias_V[:num_ids].double()
        return Affine(weight, inverse_HH @ gram(mine_VH, shift_V[:, None])[:, 0])

    def _inverse(self, num_ids: int) -> Tensor:
        if num_ids not in self._inverses:
            weight_VH = self._weight_VH[:num_ids]
            self._inverses = {num_ids: torch.linalg.pinv(gram(weight_VH, weight_VH), hermitian=True)}
        return self._inverses[num_ids]


def _parts(projection: Projection) -> tuple[Tensor, Tensor | None, float]:
    weight_VH, bias_V = projection.without_padding()
    scale = (projection.head or PLAIN_HEAD).logit_scale
    return weight_VH.detach(), None if bias_V is None else bias_V.detach(), scale


@dataclass(frozen=True, slots=True)
class DualSpaceSettings:
    """What is compared, and how.

    Attributes:
        divergence: of both comparisons; one that is a sum over ids.
        temperature: of both comparisons; the cross entropy is at 1.
        squared_temperature: whether both are multiplied by T^2; DSKD does not.
        agreement: where `to_student` is asked for. `counted`: where A keeps the teacher's most probable id, and the mean is
            over all positions, so that a batch is the sum of its parts. `averaged`: likewise, and the mean is over those
            positions alone, of each batch for itself, as DSKDv2 does. `ignored`: at all positions.

    Raises:
        LossError: an unknown agreement, or a temperature that is not above 0.
    """

    divergence: str | Divergence = "forward_kl"
    temperature: float = 1.0
    squared_temperature: bool = True
    agreement: str = "counted"

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.agreement not in AGREEMENTS:
            raise LossError(f"agreement is {self.agreement!r}, but must be one of {', '.join(map(repr, AGREEMENTS))}")


@dataclass(frozen=True, slots=True, eq=False)
class DualSpaceLoss:
    """The three parts, each a sum of weight * loss over positions, and how often A keeps the teacher's most probable id.

    Attributes:
        top, to_student, to_teacher: scalars with gradients; see the module.
        agreement: the share of the weight at positions where it does, a scalar; 1 where nothing counts.
    """

    top: Tensor
    to_student: Tensor
    to_teacher: Tensor
    agreement: Tensor

    def total(self) -> Tensor:
        """The sum of the three."""
        return self.top + self.to_student + self.to_teacher


def dual_space_loss(
    student: tuple[Tensor, Projection],
    teacher: TeacherStates,
    maps: tuple[Affine, Affine],
    weights: Tensor | None = None,
    settings: DualSpaceSettings = DualSpaceSettings(),
) -> DualSpaceLoss:
    """The parts of the loss over P positions. No gradient reaches the teacher, B, or the projection through A's part.

    Nine products of (P, H) and (V, H) matrices, where the fused sparse loss has three; (P, V) never exists.

    Args:
        student: (P, H) last hidden states, and what makes logits of them.
        teacher: at the same positions; its projection of the student's dtype, since the student's gradients pass through it.
        maps: A, of which gradients are wanted, and B, a constant.
        weights: (P,) >= 0; None for 1.

    Raises:
        LossError: an argument does not fit the others.
    """
    hidden_PH, projection = student
    check_teacher(hidden_PH, teacher)
    _check_maps(hidden_PH, teacher, maps)
    scales_P = position_scales(hidden_PH, weights, "sum")
    kd_scales_P = scales_P if settings.squared_temperature else scales_P / settings.temperature**2
    tops_P = torch.zeros(len(hidden_PH), dtype=torch.int64, device=hidden_PH.device)
    to_teacher = _compared_with_teacher(maps[1](hidden_PH), teacher, kd_scales_P, settings, tops_P)
    mapped_PH = maps[0](teacher.hidden_PH.detach().to(hidden_PH.dtype))
    top, agrees_P = _top_loss(mapped_PH, projection, tops_P, scales_P)
    total, agreeing = scales_P.sum(), (scales_P * agrees_P).sum()
    if settings.agreement != "ignored":
        kd_scales_P = kd_scales_P * agrees_P
    if settings.agreement == "averaged":
        kd_scales_P = kd_scales_P * (total / agreeing.clamp_min(torch.finfo(torch.float64).tiny))
    to_student = _compared_with_mapped(student, mapped_PH.detach(), kd_scales_P, settings)
    return DualSpaceLoss(top, to_student, to_teacher, torch.where(total > 0, agreeing / total, 1.0))


def _compared_with_teacher(
    mapped_PH: Tensor, teacher: TeacherStates, scales_P: Tensor, settings: DualSpaceSettings, tops_P: Tensor
) -> Tensor:
    """D(p, softmax(W_t B h_s)); `tops_P` gets the teacher's most probable ids."""
    projection = teacher.projection
    frozen = replace(
        projection,
        weight_VH=projection.weight_VH.detach().to(mapped_PH.dtype),
        bias_V=None if projection.bias_V is None else projection.bias_V.detach().to(mapped_PH.dtype),
    )
    product = student_product(mapped_PH, frozen)
    if projection.bias_V is not None and frozen.bias_V is not None and projection.bias_V.dtype != frozen.bias_V.dtype:
        product = replace(product, bias_V=_wide_bias(projection), head=replace(product.head, float32_logits=True))
    divergence = whole_divergence(settings.divergence)
    step = DenseStep(teacher.product(len(product.weight_VH)), divergence, settings.temperature, scales_P, tops_P)
    return run_fused(product, step, projection.chunk_positions or 0)


def _wide_bias(projection: Projection) -> Tensor | None:
    """In float32: rounded as the states are, it would move both models' logits, and the teacher's are not rounded."""
    bias_V = projection.without_padding()[1]
    return None if bias_V is None else bias_V.detach().float()


def _top_loss(mapped_PH: Tensor, projection: Projection, tops_P: Tensor, scales_P: Tensor) -> tuple[Tensor, Tensor]:
    """CE(W_s A h_t, the teacher's most probable ids), and whether each is A's as well.

    An id that the student does not have is not learned.
    """
    product = _detached(mapped_PH, projection)
    exists_P = tops_P < len(product.weight_VH)
    found_P = torch.zeros_like(tops_P)
    step = TokenStep(tops_P, torch.where(exists_P, scales_P, 0.0), tops_P=found_P)
    loss = run_fused(product, step, projection.chunk_positions or 0)
    return loss, (found_P == tops_P) & exists_P


def _compared_with_mapped(
    student: tuple[Tensor, Projection], mapped_PH: Tensor, scales_P: Tensor, settings: DualSpaceSettings
) -> Tensor:
    """D(softmax(W_s A h_t), q)."""
    hidden_PH, projection = student
    product, mapped = student_product(hidden_PH, projection), _detached(mapped_PH, projection)
    mapped = replace(mapped, head=replace(mapped.head, float32_logits=True))
    step = DenseStep(mapped, whole_divergence(settings.divergence), settings.temperature, scales_P)
    return run_fused(product, step, projection.chunk_positions or 0)


def _detached(hidden_PH: Tensor, projection: Projection) -> Product:
    """Logits of states by a projection that gets no gradient: a tied one would move the embeddings."""
    check_projection(hidden_PH, projection.weight_VH, projection.bias_V)
    weight_VH, bias_V = projection.without_padding()
    return Product(hidden_PH, weight_VH.detach(), None if bias_V is None else bias_V.detach(), projection.head or PLAIN_HEAD)


def _check_maps(hidden_PH: Tensor, teacher: TeacherStates, maps: tuple[Affine, Affine]) -> None:
    own, other = hidden_PH.shape[1], teacher.hidden_PH.shape[1]
    for name, affine, shape in (("A", maps[0], (own, other)), ("B", maps[1], (other, own))):
        if tuple(affine.weight.shape) != shape:
            raise LossError(
                f"map {name} has the shape {tuple(affine.weight.shape)}, but between states of the teacher's size {other} and "
                f"the student's size {own} it must have {shape}"
            )
