"""Losses between two whole distributions, in float64 NumPy: the definitions of `exact_kl` and `dual_space`.

A side is (hidden, weight, bias or None, scale, softcap or None): logits = cap tanh(scale (hidden W^T + b) / cap), without the
cap where there is none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.kernels.divergences import Divergence
from kdcache.kernels.divergences.reference import compute, logsumexp

Floats = NDArray[np.floating[Any]]


class Side(NamedTuple):
    """One model's last states and what makes its logits of them."""

    hidden_PH: Floats
    weight_VH: Floats
    bias_V: Floats | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self) -> Floats:
        """(P, V)."""
        z_PV = self.scale * (self.hidden_PH @ self.weight_VH.T + (0.0 if self.bias_V is None else self.bias_V))
        return z_PV if self.softcap is None else self.softcap * np.tanh(z_PV / self.softcap)

    def slopes(self) -> Floats:
        """(P, V) derivative of the logits with respect to the product."""
        return np.full(self.logits().shape, self.scale) * (
            1.0 if self.softcap is None else 1 - (self.logits() / self.softcap) ** 2
        )


def exact_losses(
    student_PV: Floats, teacher_PV: Floats, divergence: Divergence, temperature: float = 1.0
) -> tuple[Floats, Floats]:
    """T^2 L(p_T, q_T) of each position over the whole vocabulary, and its gradient with respect to the student's logits.

    An id that only the student has gets probability 0 from the teacher; ids that only the teacher has do not exist.
    """
    num_ids, missing = student_PV.shape[1], max(0, student_PV.shape[1] - teacher_PV.shape[1])
    teacher_PV = np.pad(teacher_PV[:, :num_ids], ((0, 0), (0, missing)), constant_values=-np.inf)
    log_p_PV, log_q_PV = (z_PV / temperature - logsumexp(z_PV / temperature)[:, None] for z_PV in (teacher_PV, student_PV))
    with np.errstate(all="ignore"):
        losses_P, h_PV = compute(divergence, log_p_PV, log_q_PV)
    gradient_PV = h_PV - np.exp(log_q_PV) * h_PV.sum(axis=1, keepdims=True)
    return temperature**2 * losses_P, temperature * gradient_PV


def through_head(side: Side, gradient_PV: Floats) -> tuple[Floats, Floats, Floats]:
    """Gradients with respect to a side's hidden states, weight and bias, from those with respect to its logits."""
    product_PV = gradient_PV * side.slopes()
    return product_PV @ side.weight_VH, product_PV.T @ side.hidden_PH, product_PV.sum(axis=0)


class DualSpace(NamedTuple):
    """(P,) losses of the three parts, where A keeps the teacher's most probable id, and the gradients of weighted sums.

    `weights` of the gradients: (P,) of top and to_teacher, and of to_student.
    """

    top_P: Floats
    to_student_P: Floats
    to_teacher_P: Floats
    agrees_P: NDArray[np.bool_]


def dual_space(
    student: Side, teacher: Side, maps: tuple[Floats, Floats], divergence: Divergence, temperature: float = 1.0
) -> tuple[DualSpace, tuple[Floats, Floats, Floats]]:
    """DSKDv2's parts at each position, with T^2, and the gradient of each part by its own logits, (P, V).

    Args:
        student, teacher: both with all ids of the other.
        maps: A (H_s, H_t) and B (H_t, H_s).
    """
    u_PV, v_PV = mapped(student, teacher, maps[0]).logits(), mapped(teacher, student, maps[1]).logits()
    p_PV, tops_P = teacher.logits(), teacher.logits().argmax(axis=1)
    log_u_PV = u_PV - logsumexp(u_PV)[:, None]
    top_P = -log_u_PV[np.arange(len(u_PV)), tops_P]
    top_PV = np.exp(log_u_PV) - (np.arange(u_PV.shape[1]) == tops_P[:, None])
    to_student_P, to_student_PV = exact_losses(student.logits(), u_PV, divergence, temperature)
    to_teacher_P, to_teacher_PV = exact_losses(v_PV, p_PV, divergence, temperature)
    parts = DualSpace(top_P, to_student_P, to_teacher_P, u_PV.argmax(axis=1) == tops_P)
    return parts, (top_PV, to_student_PV, to_teacher_PV)


def mapped(into: Side, of: Side, weight: Floats) -> Side:
    """One side's projection over the other side's states, mapped."""
    return into._replace(hidden_PH=of.hidden_PH @ weight.T)


def least_squares(weight_VH: Floats, other_VH: Floats) -> Floats:
    """W^+ W', by a decomposition of W itself."""
    return np.linalg.pinv(weight_VH) @ other_VH
