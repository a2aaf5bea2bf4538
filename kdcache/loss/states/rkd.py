"""RKD: the student keeps the distances and the angles between the teacher's vectors (arXiv 1904.05068).

Nothing is projected: both sides' vectors are compared with one another only, so hidden sizes may differ, and the teacher's may
be random projections, which keep distances to about 1/sqrt(size).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.errors import LossError
from kdcache.loss.states.vectors import full_precision, zero_of

_RELATIVE_ZERO = 1e-12
"""Squared distances below this share of the vectors' squares are rounding: the vectors are taken for equal."""


def rkd(student_SH: Tensor, teacher_SH: Tensor, anchors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The distance term and the angle term, two scalars in float64 (float32 on devices without it).

    Both are means over all pairs and triplets of the vectors, one with itself too, where both sides are 0. Fewer than two
    vectors, or only equal ones, give 0. The angles take S^2 numbers for each anchor at once.

    Args:
        student_SH: (S, H) one vector per sequence.
        teacher_SH: (S, any size); gets no gradient.
        anchors: indices of the vectors at whose angles to look; None for all, which is O(S^3).

    Raises:
        LossError: the two have different numbers of vectors.
    """
    if len(student_SH) != len(teacher_SH):
        raise LossError(f"the student has {len(student_SH)} vectors and the teacher {len(teacher_SH)}; one each is compared")
    if len(student_SH) < 2:
        zero = zero_of(student_SH)
        return zero, zero
    with full_precision(student_SH):
        return _terms(student_SH, teacher_SH, range(len(student_SH)) if anchors is None else anchors.tolist())


def _terms(student_SH: Tensor, teacher_SH: Tensor, anchors: Iterable[int]) -> tuple[Tensor, Tensor]:
    squares = [_squared_distances(values) for values in (student_SH, teacher_SH.detach())]
    distances = [_root(values) for values in squares]
    student_SS, teacher_SS = (values / _mean_positive(values) for values in distances)
    distance = functional.smooth_l1_loss(student_SS, teacher_SS)
    angles = [_angle_at(anchor, squares, distances) for anchor in anchors]
    return distance, torch.stack(angles).mean()


def _squared_distances(vectors_SH: Tensor) -> Tensor:
    """(S, S), exactly 0 on the diagonal and between equal vectors."""
    is_mps = vectors_SH.device.type == "mps"
    # Centred, and in float64: pooled states have a large common part, whose square would drown the distances.
    vectors_SH = vectors_SH.to(torch.float32 if is_mps else torch.float64)
    vectors_SH = vectors_SH - vectors_SH.mean(dim=0)
    products_SS = vectors_SH @ vectors_SH.T
    norms_S = products_SS.diagonal()
    sums_SS = norms_S[:, None] + norms_S
    squares_SS = sums_SS - 2 * products_SS
    zero = 1e-5 if is_mps else _RELATIVE_ZERO
    is_equal = (squares_SS <= zero * sums_SS) | torch.eye(len(norms_S), dtype=torch.bool, device=norms_S.device)
    return squares_SS.masked_fill(is_equal, 0)


def _root(squares_SS: Tensor) -> Tensor:
    """The root, with gradient 0 where it is 0."""
    is_zero = squares_SS == 0
    return squares_SS.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)


def _mean_positive(distances_SS: Tensor) -> Tensor:
    return distances_SS.sum() / (distances_SS > 0).sum().clamp_min(1) + (distances_SS.sum() == 0)


def _angle_at(anchor: int, squares: list[Tensor], distances: list[Tensor]) -> Tensor:
    """The mean over all pairs of other vectors of smooth-L1 of the cosine of the angle under which the anchor sees them."""
    student_SS, teacher_SS = (_cosines(anchor, *values) for values in zip(squares, distances, strict=True))
    return functional.smooth_l1_loss(student_SS, teacher_SS)


def _cosines(anchor: int, squares_SS: Tensor, distances_SS: Tensor) -> Tensor:
    """(S, S) cosines by the law of cosines; 0 where a vector is equal to the anchor."""
    squares_S, distances_S = squares_SS[anchor], distances_SS[anchor]
    products_SS = (squares_S[:, None] + squares_S - squares_SS) / 2
    norms_SS = distances_S[:, None] * distances_S
    is_zero = norms_SS == 0
    return (products_SS / norms_SS.masked_fill(is_zero, 1)).masked_fill(is_zero, 0)
