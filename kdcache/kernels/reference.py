"""The definition: sparse distillation losses and their gradients in plain NumPy, float64. Slow, [P, V] temporaries.

Shape letters: P positions (rows), K entries per position (padded), V the student's vocabulary.

Notation of one row. Student: logits z, q = softmax(z). Teacher: p on a support S (|S| <= K), m = sum over S of p,
r = the stored tail mass. Buckets: each i in S is one, with student mass Q_i = q_i; all ids outside S together are one more,
the tail, with Q_tail = 1 - sum over S of q.

Any divergence L that is a function of the bucket masses has, with h_b = dL / d log Q_b and H = sum over all buckets of h_b,
the gradient (chain rule through softmax)

    dL/dz_j = h_j                - H q_j     for j in S
            = h_tail q_j/Q_tail  - H q_j     for j outside S

that is, a dense part (outside S, one scalar per row times q_j) and a sparse part (K values). A divergence is therefore
only its O(K) part: a function of log P_b and log Q_b giving L and h. Written with h, the derivative by log Q, and not with
g = dL/dQ, because p/Q overflows where Q underflows while h = -p does not.

Forward KL, sum over buckets of P_b log(P_b / Q_b), has h_b = -P_b. The tail policies differ in P only:

    drop         P = p on S, no tail bucket.      H = -m,      gradient  m q_j - p_j. Sparse KD as most code has it:
                 biased, its optimum is q = p/m on S and 0 elsewhere, and its value may be negative.
    renormalize  P = p/m on S, no tail bucket.    H = -1,      gradient  q_j - p_j/m. Same optimum. Zero where m = 0.
    bucket       P = p on S and r in the tail.    H = -(m+r),  gradient  (m+r) q_j - p_j on S, q_j (m+r - r/Q_tail) outside.
                 With m + r = 1, as in any proper record: q_j - p_j on S exactly as in the dense KL. The K+1 bucket or
                 "ghost token" KL; by the data processing inequality a lower bound of the dense KL.

Sources: Hinton et al., arXiv 1503.02531 (KL and its gradient); the ghost token of Megatron-LM's cached-logits distillation
(tail bucket); Sparse Logit Sampling, arXiv 2503.16870, section 3 (bias of truncation).

Conventions. 0 log 0 = 0: entries with p = 0 and tails with r = 0 add nothing, whatever the student gives them. Where the
support is the whole vocabulary there is no tail bucket, and r (rounding of 1 - m) is ignored. p > 0 where q = 0 gives +inf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.kernels.base import NO_LABEL, PADDING_ID, Objective, Targets

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Buckets:
    """One side's masses: logs on the support (P, K), -inf at padding, and the log of the tail's mass (P,)."""

    log_mass_PK: Floats
    log_tail_P: Floats


def loss_and_gradient(
    logits_PV: Floats, targets: Targets, objective: Objective, dtype: type[np.floating[Any]] = np.float64
) -> tuple[Floats, Floats]:
    """The loss of each row, and the gradient of sum(weights * losses) by the logits.

    loss = alpha * KL(teacher || student) + (1 - alpha) * CE(label). The CE term is 0 where there is no label; the KL term
    keeps its factor alpha there, so that a row's share of the teacher does not depend on whether it has a label.

    Args:
        logits_PV: (P, V), unnormalised.
        targets: what the rows are compared with.
        objective: tail policy and alpha.
        dtype: of the arithmetic; float32 shows how well a float32 kernel can be expected to do.

    Returns:
        (P,) losses in nats, not multiplied by the weights, and (P, V) gradients.
    """
    read_P = targets.weights_P > 0
    z_PV = np.where(read_P[:, None], logits_PV, 0).astype(dtype)
    losses_P = np.zeros(len(z_PV), dtype)
    gradients_PV = np.zeros_like(z_PV)
    with np.errstate(all="ignore"):
        # Not computed at alpha 0: an infinite KL times 0 would be NaN.
        for weight, term in ((objective.alpha, _kl_term), (1 - objective.alpha, _label_term)):
            if weight > 0:
                term_P, term_PV = term(z_PV, targets, objective.tail)
                losses_P += dtype(weight) * term_P
                gradients_PV += dtype(weight) * term_PV
        gradients_PV *= targets.weights_P.astype(dtype)[:, None]
    losses_P[~read_P] = 0
    gradients_PV[~read_P] = 0
    return losses_P, gradients_PV


def row_losses(
    logits_PV: NDArray[Any], targets: Targets, objective: Objective, losses_P: NDArray[np.float64], num_threads: int = 1
) -> None:
    """See `kdcache.kernels.base.KernelBackend`; one thread whatever is asked."""
    del num_threads
    losses_P[:] = loss_and_gradient(_widen(logits_PV), targets, objective)[0]


def row_losses_and_gradients(
    logits_PV: NDArray[Any], targets: Targets, objective: Objective, losses_P: NDArray[np.float64], num_threads: int = 1
) -> None:
    """See `kdcache.kernels.base.KernelBackend`; one thread whatever is asked."""
    del num_threads
    losses_P[:], gradients_PV = loss_and_gradient(_widen(logits_PV), targets, objective)
    logits_PV[:] = _narrow(gradients_PV) if logits_PV.dtype == np.uint16 else gradients_PV


def forward_kl(teacher: Buckets, student: Buckets) -> tuple[Floats, Floats, Floats]:
    """Sum over buckets of P_b log(P_b / Q_b), and its derivative by log Q_b.

    Returns:
        (P,) losses; (P, K) h on the support; (P,) h of the tail.
    """
    mass_PK, tail_P = np.exp(teacher.log_mass_PK), np.exp(teacher.log_tail_P)
    losses_P = _p_log_p_over_q(mass_PK, teacher.log_mass_PK, student.log_mass_PK).sum(axis=1)
    losses_P += _p_log_p_over_q(tail_P, teacher.log_tail_P, student.log_tail_P)
    return losses_P, -mass_PK, -tail_P


def teacher_buckets(targets: Targets, tail: str, dtype: type[np.floating[Any]] = np.float64) -> Buckets:
    """The teacher's masses under a tail policy; see the module's docstring."""
    stored_PK = targets.token_ids_PK != PADDING_ID
    logprobs_PK = np.where(stored_PK, targets.logprobs_PK, -np.inf).astype(dtype)
    no_tail_P = np.full(len(logprobs_PK), -np.inf, dtype)
    if tail == "drop":
        return Buckets(logprobs_PK, no_tail_P)
    if tail == "renormalize":
        log_m_P = _logsumexp(logprobs_PK)
        return Buckets(np.where(log_m_P[:, None] > -np.inf, logprobs_PK - log_m_P[:, None], -np.inf), no_tail_P)
    has_tail_P = stored_PK.sum(axis=1) < targets.vocab_size
    return Buckets(logprobs_PK, np.where(has_tail_P, np.log(targets.tail_mass_P.astype(dtype)), no_tail_P))


def _kl_term(z_PV: Floats, targets: Targets, tail: str) -> tuple[Floats, Floats]:
    rows, columns = np.nonzero(targets.token_ids_PK != PADDING_ID)
    ids = targets.token_ids_PK[rows, columns]
    in_support_PV = np.zeros(z_PV.shape, bool)
    in_support_PV[rows, ids] = True
    # The tail's mass is summed over the tail: 1 - sum(q) would cancel where the support holds nearly everything.
    lse_P, tail_lse_P = _logsumexp(z_PV), _logsumexp(np.where(in_support_PV, -np.inf, z_PV))
    log_q_PK = np.full(targets.token_ids_PK.shape, -np.inf, z_PV.dtype)
    log_q_PK[rows, columns] = z_PV[rows, ids] - lse_P[rows]
    teacher = teacher_buckets(targets, tail, z_PV.dtype.type)
    losses_P, h_PK, h_tail_P = forward_kl(teacher, Buckets(log_q_PK, tail_lse_P - lse_P))
    total_P = h_PK.sum(axis=1) + h_tail_P
    # q_j/Q_tail; where every id outside the support has logit -inf it would be 0/0, and is 0 here.
    within_tail_PV = np.where(in_support_PV | np.isneginf(z_PV), 0, np.exp(z_PV - tail_lse_P[:, None]))
    gradients_PV = h_tail_P[:, None] * within_tail_PV - total_P[:, None] * np.exp(z_PV - lse_P[:, None])
    gradients_PV[rows, ids] += h_PK[rows, columns]
    return losses_P, gradients_PV


def _label_term(z_PV: Floats, targets: Targets, tail: str) -> tuple[Floats, Floats]:
    del tail
    rows = np.flatnonzero(targets.labels_P != NO_LABEL)
    log_q_PV = z_PV - _logsumexp(z_PV)[:, None]
    losses_P, gradients_PV = np.zeros(len(z_PV), z_PV.dtype), np.zeros_like(z_PV)
    losses_P[rows] = -log_q_PV[rows, targets.labels_P[rows]]
    gradients_PV[rows] = np.exp(log_q_PV[rows])
    gradients_PV[rows, targets.labels_P[rows]] -= 1
    return losses_P, gradients_PV


def _p_log_p_over_q(mass: Floats, log_p: Floats, log_q: Floats) -> Floats:
    return np.where(mass > 0, mass * (log_p - log_q), 0)


def _logsumexp(values_PX: Floats) -> Floats:
    """log(sum(exp(x))) of each row; -inf for a row without finite numbers or without columns."""
    top_P = values_PX.max(axis=1, initial=-np.inf)
    shift_P = np.where(np.isneginf(top_P), 0, top_P)
    return np.log(np.exp(values_PX - shift_P[:, None]).sum(axis=1)) + shift_P


def _widen(logits_PV: NDArray[Any]) -> Floats:
    return (logits_PV.astype(np.uint32) << 16).view(np.float32) if logits_PV.dtype == np.uint16 else logits_PV


def _narrow(values_PV: Floats) -> NDArray[np.uint16]:
    """bfloat16 bits, rounded to nearest, ties to even; NaN stays NaN."""
    bits_PV = values_PV.astype(np.float32).view(np.uint32)
    rounded_PV = (bits_PV + (((bits_PV >> 16) & 1) + 0x7FFF).astype(np.uint32)) >> 16
    return np.where(np.isnan(values_PV), 0x7FC0, rounded_PV).astype(np.uint16)
