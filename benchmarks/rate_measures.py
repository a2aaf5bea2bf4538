"""How far what is read from a record is from the teacher: KL, squared error of the target, angle of the weight gradient.

Shape letters: P positions, V vocabulary, E entries of all positions, H features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

NUM_FEATURES = 32


@dataclass(frozen=True, eq=False)
class Reading:
    """A target per position: entries, and what becomes of the rest.

    Attributes:
        token_ids_E, masses_E: float64 probabilities.
        offsets_P1: as in `Distributions`.
        rest_P: mass beside the entries, spread over all other tokens: evenly for KL, as the student has it for the gradient (a
            tail bucket); zeros where a loss ignores it.
        has_kl: whether it is a distribution that may be compared by KL: not so of estimates.
    """

    token_ids_E: NDArray[np.int32]
    masses_E: NDArray[np.float64]
    offsets_P1: NDArray[np.int64]
    rest_P: NDArray[np.float64]
    has_kl: bool = True

    @cached_property
    def rows_E(self) -> NDArray[np.int64]:
        """(E,) the position of each entry."""
        return np.repeat(np.arange(len(self.rest_P)), np.diff(self.offsets_P1))

    def sums(self, values_E: NDArray[np.floating]) -> NDArray[np.float64]:
        """(P,) of the values of each position's entries."""
        return np.bincount(self.rows_E, values_E, minlength=len(self.rest_P))


@dataclass(frozen=True, eq=False)
class Truth:
    """The teacher p, a student q that is to learn from it, and features of the positions that stand for its hidden states.

    The student is p^0.8 m^0.2 e^n, normalised, m the mean of p over the positions and n normal noise of 0.7 nats for each token
    of each position: too general, and off everywhere, its tail among it.
    """

    logprobs_PV: NDArray[np.float32]
    ids_P: NDArray[np.int32]
    teacher_PV: NDArray[np.float32] = field(init=False)
    student_PV: NDArray[np.float32] = field(init=False)
    features_PH: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        teacher_PV = np.exp(self.logprobs_PV)
        student_PV = 0.7 * np.random.default_rng(1).standard_normal(self.logprobs_PV.shape, np.float32)
        student_PV += 0.8 * self.logprobs_PV + 0.2 * np.log(teacher_PV.mean(0) + 1e-12)
        np.exp(student_PV, out=student_PV)
        student_PV /= student_PV.sum(-1, keepdims=True)
        of_id_VH = np.random.default_rng(0).standard_normal((self.logprobs_PV.shape[1], NUM_FEATURES)).astype(np.float32)
        before_P = np.roll(self.ids_P, 1)
        for name, value in (
            ("teacher_PV", teacher_PV),
            ("student_PV", student_PV),
            ("features_PH", of_id_VH[self.ids_P] + 0.5 * of_id_VH[before_P][:, ::-1]),
        ):
            object.__setattr__(self, name, value)

    @cached_property
    def squares_3P(self) -> NDArray[np.float64]:
        """Sums over the vocabulary of pp, pq, qq."""
        p, q = self.teacher_PV, self.student_PV
        return np.stack([np.einsum("pv,pv->p", a, b, dtype=np.float64) for a, b in ((p, p), (p, q), (q, q))])

    @cached_property
    def negentropy_P(self) -> NDArray[np.float64]:
        """Sum of p log p."""
        return np.einsum("pv,pv->p", self.teacher_PV, self.logprobs_PV, dtype=np.float64)

    @property
    def student_kl(self) -> float:
        """Mean nats of KL(p || q)."""
        cross_P = np.einsum("pv,pv->p", self.teacher_PV, np.log(self.student_PV + 1e-30), dtype=np.float64)
        return float((self.negentropy_P - cross_P).mean())

    @cached_property
    def full_gradient_VH(self) -> NDArray[np.float32]:
        """Of full distillation."""
        return (self.student_PV - self.teacher_PV).T @ self.features_PH

    def kl(self, reading: Reading) -> float:
        """Mean nats of KL(p || reading), the rest spread evenly, but no token below 1e-4 / V."""
        num_tokens = self.logprobs_PV.shape[1]
        masses_E = 0.9999 * reading.masses_E / np.maximum(reading.sums(reading.masses_E) + reading.rest_P, 1e-9)[reading.rows_E]
        p_E = self.teacher_PV[reading.rows_E, reading.token_ids_E].astype(np.float64)
        counts_P = np.diff(reading.offsets_P1)
        rest_P = np.maximum(1.0 - reading.sums(masses_E), 1e-12) / np.maximum(num_tokens - counts_P, 1)
        missed_P = np.maximum(1.0 - reading.sums(p_E), 0.0)
        cross_P = reading.sums(p_E * np.log(masses_E + 1e-4 / num_tokens)) + missed_P * np.log(rest_P)
        return float((self.negentropy_P - cross_P).mean())

    def error(self, reading: Reading) -> float:
        """Mean over positions of the squared distance between target and p."""
        p_E, q_E = (x[reading.rows_E, reading.token_ids_E].astype(np.float64) for x in (self.teacher_PV, self.student_PV))
        share_P = self._tail_share(reading, q_E)
        pp, pq, qq = self.squares_3P
        off_P = pp - reading.sums(p_E * p_E) - 2 * share_P * (pq - reading.sums(p_E * q_E))
        off_P += share_P**2 * (qq - reading.sums(q_E * q_E))
        return float((reading.sums((reading.masses_E - p_E) ** 2) + np.maximum(off_P, 0)).mean())

    def angle(self, reading: Reading) -> float:
        """Degrees between the gradient by the output weight of all positions together and that of full distillation."""
        q_E = self.student_PV[reading.rows_E, reading.token_ids_E].astype(np.float64)
        share_P = self._tail_share(reading, q_E)
        mass_P = reading.sums(reading.masses_E) + reading.rest_P
        gradient_VH = self.student_PV.T @ (self.features_PH * (mass_P - share_P)[:, None].astype(np.float32))
        weights_E = (reading.masses_E - share_P[reading.rows_E] * q_E).astype(np.float32)
        np.subtract.at(gradient_VH, reading.token_ids_E, weights_E[:, None] * self.features_PH[reading.rows_E])
        full_VH = self.full_gradient_VH
        cosine = np.vdot(gradient_VH, full_VH) / (np.linalg.norm(gradient_VH) * np.linalg.norm(full_VH))
        return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))

    def _tail_share(self, reading: Reading, q_E: NDArray[np.float64]) -> NDArray[np.float64]:
        return reading.rest_P / np.maximum(1.0 - reading.sums(q_E), 1e-9)
