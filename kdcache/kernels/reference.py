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
only its O(K) part: a function of log P_b and log Q_b giving L and h, in `reference_divergences`. Written with h, the derivative
by log Q, and not with g = dL/dQ, because p/Q overflows where Q underflows while h = -p does not. A loss on differences of the
support's logits is of this form too, since z_i - z_j = log Q_i - log Q_j; it has H = 0 and no dense part.

Forward KL, sum over buckets of P_b log(P_b / Q_b), has h_b = -P_b. The tail policies differ in P only:

    drop         P = p on S, no tail bucket.      H = -m,      gradient  m q_j - p_j. Sparse KD as most code has it:
                 biased, its optimum is q = p/m on S and 0 elsewhere, and its value may be negative. For unbiased targets,
                 whose entries stand for the tail too, it is the right one.
    renormalize  P = p/m on S, no tail bucket.    H = -1,      gradient  q_j - p_j/m. Same optimum. Zero where m = 0.
    bucket       P = p on S and r in the tail.    H = -(m+r),  gradient  (m+r) q_j - p_j on S, q_j (m+r - r/Q_tail) outside.
                 With m + r = 1, as in any proper record: q_j - p_j on S exactly as in the dense KL. The K+1 bucket or
                 "ghost token" KL; by the data processing inequality a lower bound of the dense KL.
    uniform      P = p on S, and r/n on each of the n ids outside S, which are no bucket then: the loss has
                 r log(r/n) - r (mean of log q outside S), and the gradient there is (m+r) q_j - r/n. It pulls the student
                 towards a flat tail, which no language has; here for comparison.

The other divergences are given S and the tail bucket (`bucket`); see the table in README.md.

Temperature T: student q = softmax(z/T), teacher masses at T (`make_targets` is given those), L is multiplied by T^2, and so
the gradient by the logits is T dL/d(z/T). The label's cross entropy stays at temperature 1.

Sources: Hinton et al., arXiv 1503.02531 (KL, its gradient, and T^2); the ghost token of Megatron-LM's cached-logits
distillation (tail bucket); Sparse Logit Sampling, arXiv 2503.16870, section 3 (bias of truncation, uniform smoothing).

Conventions. 0 log 0 = 0: entries with p = 0 and tails with r = 0 add nothing, whatever the student gives them. Where the
support is the whole vocabulary there is no tail bucket, and r (rounding of 1 - m) is ignored. p > 0 where q = 0 gives +inf.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.kernels import reference_divergences
from kdcache.kernels.base import NO_TARGET, PADDING_ID, Objective, Targets, exact_counts
from kdcache.kernels.reference_divergences import Floats, logsumexp


def loss_and_gradient(
    logits_PV: Floats, targets: Targets, objective: Objective, dtype: type[np.floating[Any]] = np.float64
) -> tuple[Floats, Floats]:
    """The loss of each row, and the gradient of sum(weights * losses) by the logits.

    loss = alpha * T^2 * L(teacher, student) + (1 - alpha) * CE(label). The CE term is 0 where there is no label; the first
    keeps its factor alpha there, so that a row's share of the teacher does not depend on whether it has a label.

    Args:
        logits_PV: (P, V), unnormalised.
        targets: what the rows are compared with.
        objective: divergence, tail policy, temperature and alpha.
        dtype: of the arithmetic; float32 shows how well a float32 kernel can be expected to do.

    Returns:
        (P,) losses, not multiplied by the weights, and (P, V) gradients.
    """
    read_P = targets.weights_P > 0
    z_PV = np.where(read_P[:, None], logits_PV, 0).astype(dtype)
    losses_P = np.zeros(len(z_PV), dtype)
    gradients_PV = np.zeros_like(z_PV)
    with np.errstate(all="ignore"):
        # Not computed at alpha 0: an infinite loss times 0 would be NaN.
        for weight, term in ((objective.alpha, _teacher_term), (1 - objective.alpha, _label_term)):
            if weight > 0:
                term_P, term_PV = term(z_PV, targets, objective)
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


def teacher_buckets(targets: Targets, objective: Objective, dtype: type[np.floating[Any]] = np.float64) -> Floats:
    """(P, B) log masses of the teacher under a tail policy, the tail last; see the module's docstring."""
    stored_PK, tail = targets.token_ids_PK != PADDING_ID, objective.tail
    log_p_PK = np.where(stored_PK, targets.logprobs_PK, -np.inf).astype(dtype)
    log_tail_P = np.full(len(log_p_PK), -np.inf, dtype)
    if tail == "renormalize":
        log_m_P1 = logsumexp(log_p_PK)[:, None]
        log_p_PK = np.where(log_m_P1 > -np.inf, log_p_PK - log_m_P1, -np.inf)
    if tail == "bucket":
        has_tail_P = (stored_PK & ~estimates(targets, objective)[:, :-1]).sum(axis=1) < targets.vocab_size
        log_tail_P = np.where(has_tail_P, np.log(targets.tail_mass_P.astype(dtype)), -np.inf)
    return np.concatenate([log_p_PK, log_tail_P[:, None]], axis=1)


def estimates(targets: Targets, objective: Objective) -> NDArray[np.bool_]:
    """(P, B) which buckets are entries that are estimates, for divergences that distinguish them."""
    columns_B = np.arange(targets.token_ids_PK.shape[1] + 1)
    estimates_PB = columns_B >= exact_counts(targets, objective.divergence)[:, None]
    estimates_PB[:, :-1] &= targets.token_ids_PK != PADDING_ID
    estimates_PB[:, -1] = False
    return estimates_PB


def num_outside(targets: Targets) -> NDArray[np.int64]:
    """(P,) how many ids are outside the support."""
    return targets.vocab_size - (targets.token_ids_PK != PADDING_ID).sum(axis=1)


def _teacher_term(logits_PV: Floats, targets: Targets, objective: Objective) -> tuple[Floats, Floats]:
    z_PV = logits_PV / logits_PV.dtype.type(objective.temperature)
    rows, columns = np.nonzero(targets.token_ids_PK != PADDING_ID)
    ids = targets.token_ids_PK[rows, columns]
    in_support_PV = np.zeros(z_PV.shape, bool)
    in_support_PV[rows, ids] = True
    # The tail's mass is summed over the tail: 1 - sum(q) would cancel where the support holds nearly everything.
    lse_P, tail_lse_P = logsumexp(z_PV), logsumexp(np.where(in_support_PV, -np.inf, z_PV))
    log_q_PB = np.full((len(z_PV), targets.token_ids_PK.shape[1] + 1), -np.inf, z_PV.dtype)
    log_q_PB[rows, columns] = z_PV[rows, ids] - lse_P[rows]
    log_q_PB[:, -1] = tail_lse_P - lse_P
    log_p_PB = teacher_buckets(targets, objective, z_PV.dtype.type)
    losses_P, h_PB = reference_divergences.compute(objective.divergence, log_p_PB, log_q_PB, estimates(targets, objective))
    # q_j/Q_tail; where every id outside the support has logit -inf it would be 0/0, and is 0 here.
    within_tail_PV = np.where(in_support_PV | np.isneginf(z_PV), 0, np.exp(z_PV - tail_lse_P[:, None]))
    q_PV = np.exp(z_PV - lse_P[:, None])
    gradients_PV = h_PB[:, -1:] * within_tail_PV - h_PB.sum(axis=1, keepdims=True) * q_PV
    gradients_PV[rows, ids] += h_PB[rows, columns]
    if objective.tail == "uniform":
        losses_P, gradients_PV = _add_uniform_tail((losses_P, gradients_PV), targets, in_support_PV, z_PV - lse_P[:, None])
    t = z_PV.dtype.type(objective.temperature)
    return t * t * losses_P, t * gradients_PV


def _add_uniform_tail(
    terms: tuple[Floats, Floats], targets: Targets, in_support_PV: NDArray[np.bool_], log_q_PV: Floats
) -> tuple[Floats, Floats]:
    """The forward KL's part outside the support, with p = r / n on each of the n ids there."""
    n_P = num_outside(targets)
    r_P1 = np.where(n_P > 0, targets.tail_mass_P, 0).astype(log_q_PV.dtype)[:, None]
    share_PV = np.where(in_support_PV, 0, r_P1 / np.maximum(n_P, 1)[:, None]).astype(log_q_PV.dtype)
    losses_PV = np.where(share_PV > 0, share_PV * (np.log(share_PV) - log_q_PV), 0)
    return terms[0] + losses_PV.sum(axis=1), terms[1] + r_P1 * np.exp(log_q_PV) - share_PV


def _label_term(z_PV: Floats, targets: Targets, objective: Objective) -> tuple[Floats, Floats]:
    del objective
    rows = np.flatnonzero(targets.target_ids_P != NO_TARGET)
    log_q_PV = z_PV - logsumexp(z_PV)[:, None]
    losses_P, gradients_PV = np.zeros(len(z_PV), z_PV.dtype), np.zeros_like(z_PV)
    losses_P[rows] = -log_q_PV[rows, targets.target_ids_P[rows]]
    gradients_PV[rows] = np.exp(log_q_PV[rows])
    gradients_PV[rows, targets.target_ids_P[rows]] -= 1
    return losses_P, gradients_PV


def _widen(logits_PV: NDArray[Any]) -> Floats:
    return (logits_PV.astype(np.uint32) << 16).view(np.float32) if logits_PV.dtype == np.uint16 else logits_PV


def _narrow(values_PV: Floats) -> NDArray[np.uint16]:
    """bfloat16 bits, rounded to nearest, ties to even; NaN stays NaN."""
    bits_PV = values_PV.astype(np.float32).view(np.uint32)
    rounded_PV = (bits_PV + (((bits_PV >> 16) & 1) + 0x7FFF).astype(np.uint32)) >> 16
    return np.where(np.isnan(values_PV), 0x7FC0, rounded_PV).astype(np.uint16)
