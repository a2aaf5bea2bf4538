"""The definition: sparse distillation losses and their gradients in plain NumPy, float64. Slow, [P, V] temporaries.

Notation of one position. Student: logits z, q = softmax(z). Teacher: p on a support S (|S| <= K), m = sum over S of p,
r = the stored tail mass. Buckets: each i in S is one, with student mass Q_i = q_i; all ids outside S together are one more,
the tail, with Q_tail = 1 - sum over S of q.

Any divergence L that is a function of the bucket masses has, with h_b = dL / d log Q_b and H = sum over all buckets of h_b,
the gradient (chain rule through softmax)

    dL/dz_j = h_j                - H q_j     for j in S
            = h_tail q_j/Q_tail  - H q_j     for j outside S

that is, a dense part (outside S, one scalar per position times q_j) and a sparse part (K values). A divergence is therefore
only its O(K) part: a function of log P_b and log Q_b giving L and h, in `divergences.reference`. Written with h, the derivative
by log Q, and not with g = dL/dQ, because p/Q overflows where Q underflows while h = -p does not. A loss on differences of the
support's logits is of this form too, since z_i - z_j = log Q_i - log Q_j; it has H = 0 and no dense part.

Forward KL, sum over buckets of P_b log(P_b / Q_b), has h_b = -P_b. The tail policies differ in P only:

    drop         P = p on S, no tail bucket.      H = -m,      gradient  m q_j - p_j. Sparse KD as most code has it:
                 biased, its optimum is q = p/m on S and 0 elsewhere, and its value may be negative. For unbiased entries,
                 which stand for the tail too, it is the right one.
    renormalize  P = p/m on S, no tail bucket.    H = -1,      gradient  q_j - p_j/m. Same optimum. Zero where m = 0.
    bucket       P = p on S and r in the tail.    H = -(m+r),  gradient  (m+r) q_j - p_j on S, q_j (m+r - r/Q_tail) outside.
                 With m + r = 1, as in any proper record: q_j - p_j on S exactly as in the dense KL. The K+1 bucket or
                 "ghost token" KL; by the data processing inequality a lower bound of the dense KL.
    uniform      P = p on S, and r/n on each of the n ids outside S, instead of a bucket: the loss has
                 r log(r/n) - r (mean of log q outside S), and the gradient there is (m+r) q_j - r/n. It pulls the student
                 towards a flat tail, which no language has; here for comparison.

The other divergences are given S and the tail bucket (`bucket`); see the table in README.md.

Several divergences of the same logits: losses and gradients add up, and so do their h, weighted; the dense part stays one pass.

Temperature T: student q = softmax(z/T), teacher masses at T (`make_kernel_inputs` is given those), L is multiplied by T^2,
and so the gradient with respect to the logits is T dL/d(z/T). The target id's cross entropy stays at temperature 1.

Sources: Hinton et al., arXiv 1503.02531 (KL, its gradient, and T^2); the ghost token of Megatron-LM's cached-logits
distillation (tail bucket); Sparse Logit Sampling, arXiv 2503.16870, section 3 (bias of truncation, uniform smoothing).

Conventions. 0 log 0 = 0: entries with p = 0 and tails with r = 0 add nothing, whatever the student gives them. Where the
support is the whole vocabulary the tail bucket is missing, and r (rounding of 1 - m) is ignored. p > 0 where q = 0 gives +inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.kernels.base import NO_TARGET, PADDING_ID, KernelInputs, Objective, Summand, SumOutputs, exact_counts
from kdcache.kernels.divergences import reference as divergences
from kdcache.kernels.divergences.reference import Floats, logsumexp


def loss_and_gradient(
    logits_PV: Floats, inputs: KernelInputs, objective: Objective, dtype: type[np.floating[Any]] = np.float64
) -> tuple[Floats, Floats]:
    """The loss of each position, and the gradient of sum(weights * losses) with respect to the logits.

    loss = alpha * T^2 * L(teacher, student) + (1 - alpha) * CE(target id). The CE term is 0 without a target id; the first
    keeps its factor alpha there, so that a position's share of the teacher does not depend on whether it has a target id.

    Args:
        logits_PV: (P, V), unnormalised.
        inputs: what the positions are compared with.
        objective: divergence, tail policy, temperature and alpha.
        dtype: of the arithmetic; float32 shows how well a float32 kernel can be expected to do.

    Returns:
        (P,) losses, not multiplied by the weights, and (P, V) gradients.
    """
    read_P = inputs.weights_P > 0
    z_PV = np.where(read_P[:, None], logits_PV, 0).astype(dtype)
    losses_P = np.zeros(len(z_PV), dtype)
    gradients_PV = np.zeros_like(z_PV)
    with np.errstate(all="ignore"):
        # Not computed at alpha 0: an infinite loss times 0 would be NaN.
        for weight, term in ((objective.alpha, _teacher_term), (1 - objective.alpha, _target_term)):
            if weight > 0:
                term_P, term_PV = term(z_PV, inputs, objective)
                losses_P += dtype(weight) * term_P
                gradients_PV += dtype(weight) * term_PV
        gradients_PV *= inputs.weights_P.astype(dtype)[:, None]
    losses_P[~read_P] = 0
    gradients_PV[~read_P] = 0
    return losses_P, gradients_PV


def position_losses(
    logits_PV: NDArray[Any], inputs: KernelInputs, objective: Objective, losses_P: NDArray[np.float64], num_threads: int = 1
) -> None:
    """See `kdcache.kernels.base.KernelBackend`; one thread whatever is asked."""
    del num_threads
    losses_P[:] = loss_and_gradient(_widen(logits_PV), inputs, objective)[0]


def position_losses_and_gradients(
    logits_PV: NDArray[Any], inputs: KernelInputs, objective: Objective, losses_P: NDArray[np.float64], num_threads: int = 1
) -> None:
    """See `kdcache.kernels.base.KernelBackend`; one thread whatever is asked."""
    del num_threads
    losses_P[:], gradients_PV = loss_and_gradient(_widen(logits_PV), inputs, objective)
    logits_PV[:] = _narrow(gradients_PV) if logits_PV.dtype == np.uint16 else gradients_PV


def summed_losses(
    logits_PV: NDArray[Any], summands: Sequence[Summand], outputs: SumOutputs, num_threads: int = 1, *, want_gradient: bool
) -> None:
    """See `kdcache.kernels.base.KernelBackend`: each function by itself, then added up."""
    del num_threads
    total_P, total_PV = np.zeros(len(logits_PV)), np.zeros(logits_PV.shape)
    outputs.values_PD1[:] = 0
    for column, summand in enumerate(summands):
        losses_P, gradients_PV = loss_and_gradient(_widen(logits_PV), summand.inputs, summand.objective)
        factor_P = np.ones(len(total_P)) if summand.factor_P is None else summand.factor_P
        total_P += np.where(factor_P > 0, factor_P * losses_P, 0)
        total_PV += np.where(factor_P[:, None] > 0, factor_P[:, None] * gradients_PV, 0)
        if summand.objective.alpha > 0:
            alone = replace(summand.objective, alpha=1.0)
            outputs.values_PD1[:, column] = loss_and_gradient(_widen(logits_PV), summand.inputs, alone)[0]
        if summand.objective.alpha < 1:
            alone = replace(summand.objective, alpha=0.0)
            values_P = loss_and_gradient(_widen(logits_PV), summand.inputs, alone)[0]
            outputs.values_PD1[:, -1] = np.where(factor_P > 0, values_P, outputs.values_PD1[:, -1])
    outputs.losses_P[:] = total_P
    if want_gradient:
        logits_PV[:] = _narrow(total_PV) if logits_PV.dtype == np.uint16 else total_PV


def teacher_buckets(inputs: KernelInputs, objective: Objective, dtype: type[np.floating[Any]] = np.float64) -> Floats:
    """(P, K+1) log masses of the teacher under a tail policy, the tail last; see the module's docstring."""
    stored_PK, tail = inputs.token_ids_PK != PADDING_ID, objective.tail
    log_p_PK = np.where(stored_PK, inputs.logprobs_PK, -np.inf).astype(dtype)
    log_tail_P = np.full(len(log_p_PK), -np.inf, dtype)
    if tail == "renormalize":
        log_m_P1 = logsumexp(log_p_PK)[:, None]
        log_p_PK = np.where(log_m_P1 > -np.inf, log_p_PK - log_m_P1, -np.inf)
    if tail == "bucket":
        has_tail_P = (stored_PK & ~estimates(inputs, objective)[:, :-1]).sum(axis=1) < inputs.vocab_size
        log_tail_P = np.where(has_tail_P, np.log(inputs.tail_mass_P.astype(dtype)), -np.inf)
    return np.concatenate([log_p_PK, log_tail_P[:, None]], axis=1)


def estimates(inputs: KernelInputs, objective: Objective) -> NDArray[np.bool_]:
    """(P, K+1) which buckets are entries that are estimates, for divergences that distinguish them."""
    columns_K1 = np.arange(inputs.token_ids_PK.shape[1] + 1)
    estimates_PK1 = columns_K1 >= exact_counts(inputs, objective.divergence)[:, None]
    estimates_PK1[:, :-1] &= inputs.token_ids_PK != PADDING_ID
    estimates_PK1[:, -1] = False
    return estimates_PK1


def target_buckets(inputs: KernelInputs) -> NDArray[np.bool_]:
    """(P, K+1) which bucket holds the target id: an entry, or the tail; none without a target id."""
    is_target_PK = (inputs.token_ids_PK == inputs.target_ids_P[:, None]) & (inputs.token_ids_PK != PADDING_ID)
    in_tail_P = (inputs.target_ids_P != NO_TARGET) & ~is_target_PK.any(axis=1)
    return np.concatenate([is_target_PK, in_tail_P[:, None]], axis=1)


def num_outside(inputs: KernelInputs) -> NDArray[np.int64]:
    """(P,) how many ids are outside the support."""
    return inputs.vocab_size - (inputs.token_ids_PK != PADDING_ID).sum(axis=1)


def _teacher_term(logits_PV: Floats, inputs: KernelInputs, objective: Objective) -> tuple[Floats, Floats]:
    z_PV = logits_PV / logits_PV.dtype.type(objective.temperature)
    positions, columns = np.nonzero(inputs.token_ids_PK != PADDING_ID)
    ids = inputs.token_ids_PK[positions, columns]
    in_support_PV = np.zeros(z_PV.shape, bool)
    in_support_PV[positions, ids] = True
    # The tail's mass is summed over the tail: 1 - sum(q) would cancel where the support holds nearly everything.
    lse_P, tail_lse_P = logsumexp(z_PV), logsumexp(np.where(in_support_PV, -np.inf, z_PV))
    log_q_PK1 = np.full((len(z_PV), inputs.token_ids_PK.shape[1] + 1), -np.inf, z_PV.dtype)
    log_q_PK1[positions, columns] = z_PV[positions, ids] - lse_P[positions]
    log_q_PK1[:, -1] = tail_lse_P - lse_P
    log_p_PK1 = teacher_buckets(inputs, objective, z_PV.dtype.type)
    losses_P, h_PK1 = divergences.compute(
        objective.divergence, log_p_PK1, log_q_PK1, estimates(inputs, objective), target_buckets(inputs)
    )
    # q_j/Q_tail; where every id outside the support has logit -inf it would be 0/0, and is 0 here.
    within_tail_PV = np.where(in_support_PV | np.isneginf(z_PV), 0, np.exp(z_PV - tail_lse_P[:, None]))
    q_PV = np.exp(z_PV - lse_P[:, None])
    gradients_PV = h_PK1[:, -1:] * within_tail_PV - h_PK1.sum(axis=1, keepdims=True) * q_PV
    gradients_PV[positions, ids] += h_PK1[positions, columns]
    if objective.tail == "uniform":
        losses_P, gradients_PV = _add_uniform_tail((losses_P, gradients_PV), inputs, in_support_PV, z_PV - lse_P[:, None])
    t = z_PV.dtype.type(objective.temperature)
    return t * t * losses_P, t * gradients_PV


def _add_uniform_tail(
    terms: tuple[Floats, Floats], inputs: KernelInputs, in_support_PV: NDArray[np.bool_], log_q_PV: Floats
) -> tuple[Floats, Floats]:
    """The forward KL's part outside the support, with p = r / n on each of the n ids there."""
    n_P = num_outside(inputs)
    r_P1 = np.where(n_P > 0, inputs.tail_mass_P, 0).astype(log_q_PV.dtype)[:, None]
    share_PV = np.where(in_support_PV, 0, r_P1 / np.maximum(n_P, 1)[:, None]).astype(log_q_PV.dtype)
    losses_PV = np.where(share_PV > 0, share_PV * (np.log(share_PV) - log_q_PV), 0)
    return terms[0] + losses_PV.sum(axis=1), terms[1] + r_P1 * np.exp(log_q_PV) - share_PV


def _target_term(z_PV: Floats, inputs: KernelInputs, objective: Objective) -> tuple[Floats, Floats]:
    del objective
    positions = np.flatnonzero(inputs.target_ids_P != NO_TARGET)
    log_q_PV = z_PV - logsumexp(z_PV)[:, None]
    losses_P, gradients_PV = np.zeros(len(z_PV), z_PV.dtype), np.zeros_like(z_PV)
    losses_P[positions] = -log_q_PV[positions, inputs.target_ids_P[positions]]
    gradients_PV[positions] = np.exp(log_q_PV[positions])
    gradients_PV[positions, inputs.target_ids_P[positions]] -= 1
    return losses_P, gradients_PV


def _widen(logits_PV: NDArray[Any]) -> Floats:
    return (logits_PV.astype(np.uint32) << 16).view(np.float32) if logits_PV.dtype == np.uint16 else logits_PV


def _narrow(values_PV: Floats) -> NDArray[np.uint16]:
    """bfloat16 bits, rounded to nearest, ties to even; NaN stays NaN."""
    bits_PV = values_PV.astype(np.float32).view(np.uint32)
    rounded_PV = (bits_PV + (((bits_PV >> 16) & 1) + 0x7FFF).astype(np.uint32)) >> 16
    return np.where(np.isnan(values_PV), 0x7FC0, rounded_PV).astype(np.uint16)
