"""DPKD: of two answers to one prompt the student comes to prefer the one that the teacher prefers, by as much.

-log sigmoid(beta ((lq_w - lq_l) - (lp_w - lp_l))), where lq and lp are the mean logprobs of an answer's tokens, the student's
and the teacher's, w is the chosen and l the rejected answer: DPO with the teacher for its reference. Two numbers per sequence
of the teacher, which every cache has: `teacher.target_logprobs_P`. arXiv 2406.19774, as in jongwooko/distillm-2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.loss.chunks import Product, run_chunks
from kdcache.loss.fused import Projection, run_fused
from kdcache.loss.states.dense_steps import TokenStep
from kdcache.loss.states.exact_kl import student_product


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """The answers that a batch's positions are of, and which of them make pairs.

    Attributes:
        sequences_P: (P,) integers in [0, S): the sequence that each position is of.
        pairs: (number of pairs, 2) integers in [0, S): chosen and rejected answer of each.
        num_sequences: S.
    """

    sequences_P: Tensor
    pairs: Tensor
    num_sequences: int

    def means_S(self, values_P: Tensor, weights_P: Tensor) -> Tensor:
        """(S,) float64 weighted means over each sequence's positions; 0 where nothing counts."""
        total_S, weight_S = self._sums(values_P.double() * weights_P), self._sums(weights_P.double())
        return total_S / torch.where(weight_S > 0, weight_S, 1.0)

    def shares_P(self, weights_P: Tensor) -> Tensor:
        """(P,) float64 derivative of a sequence's mean with respect to each of its values."""
        weight_S = self._sums(weights_P.double())
        return weights_P.double() / torch.where(weight_S > 0, weight_S, 1.0)[self.sequences_P]

    def is_counted(self, weights_P: Tensor) -> Tensor:
        """(number of pairs,) whether both answers have a position that counts."""
        return (self._sums(weights_P.double()) > 0)[self.pairs].all(dim=1)

    def _sums(self, values_P: Tensor) -> Tensor:
        return values_P.new_zeros(self.num_sequences).index_add(0, self.sequences_P, values_P)


def pair_losses(student: Tensor, teacher: Tensor, beta: float = 0.1) -> Tensor:
    """(number of pairs,) losses, nats.

    Args:
        student, teacher: (number of pairs, 2) mean logprobs of the chosen and of the rejected answer.
        beta: above 0; how soon a student that prefers as the teacher does is left alone.
    """
    margin = (student[:, 0] - student[:, 1]) - (teacher[:, 0] - teacher[:, 1])
    return torch.nn.functional.softplus(-beta * margin)


def dpkd_loss(
    hidden_PH: Tensor,
    projection: Tensor | Projection,
    target_ids_P: Tensor,
    teacher_logprobs_P: Tensor,
    answers: Answers,
    weights_P: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """The sum of `pair_losses` over a batch's pairs, fused with the output projection: (P, V) logits never exist.

    A first pass over the positions gives the student's logprobs, the second the gradients of their weighted sum: four matrix
    products where the fused cross entropy has three. Gradients can be differentiated once.

    Args:
        hidden_PH: (P, H) the student's last hidden states.
        projection: the student's.
        target_ids_P: (P,) the tokens that came; negative where there is none.
        teacher_logprobs_P: (P,) nats, the teacher's logprobs of them; anything where there is none.
        answers: which positions make an answer, and which answers a pair.
        weights_P: (P,) >= 0, of each position within its answer's mean.
        beta: see `pair_losses`.

    Raises:
        LossError: beta is not above 0, or a tensor has another number of positions.
    """
    if not beta > 0:
        raise LossError(f"beta is {beta!r}, but must be above 0")
    projection = projection if isinstance(projection, Projection) else Projection(projection)
    product = student_product(hidden_PH, projection)
    _check_lengths(hidden_PH, target_ids_P, teacher_logprobs_P, answers.sequences_P, weights_P)
    weights_P = torch.where(target_ids_P >= 0, weights_P.detach().double(), 0.0)
    student_P = _logprobs(product, target_ids_P, weights_P, projection.chunk_positions or 0)
    teacher_P = torch.where(weights_P > 0, teacher_logprobs_P.detach().double(), 0.0)
    is_counted = answers.is_counted(weights_P)
    with torch.enable_grad():
        means_S = answers.means_S(student_P, weights_P).requires_grad_()
        losses = pair_losses(means_S[answers.pairs], answers.means_S(teacher_P, weights_P)[answers.pairs], beta)
        total = torch.where(is_counted, losses, 0.0).sum()
        (slopes_S,) = torch.autograd.grad(total, means_S)
    # The derivative of the loss by each logprob; that by the cross entropy has the other sign.
    scales_P = -slopes_S[answers.sequences_P] * answers.shares_P(weights_P)
    linear = run_fused(product, TokenStep(target_ids_P, scales_P), projection.chunk_positions or 0)
    return total.detach().to(linear.dtype) + (linear - linear.detach())


def _logprobs(product: Product, target_ids_P: Tensor, weights_P: Tensor, chunk_positions: int) -> Tensor:
    """(P,) float64 the student's logprobs of the targets; 0 where the weight is 0."""
    found_P = torch.zeros_like(weights_P)
    run_chunks(product, TokenStep(target_ids_P, weights_P, logprobs_P=found_P), (False, False, False), chunk_positions)
    return torch.where(weights_P > 0, found_P, 0.0)


def _check_lengths(hidden_PH: Tensor, *several_P: Tensor) -> None:
    for values_P in several_P:
        if tuple(values_P.shape) != (len(hidden_PH),):
            raise LossError(
                f"a tensor with one number per position has the shape {tuple(values_P.shape)}, but must have "
                f"({len(hidden_PH)},)"
            )
