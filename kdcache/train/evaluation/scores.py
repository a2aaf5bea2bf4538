"""Models measured on held-out sequences, each next to the live teacher over the FULL vocabulary.

KL(teacher || student) at a position is sum_v p_v (log p_v - log q_v), in nats, at temperature 1 (Hinton et al., arXiv
1503.02531); a student whose vocabulary is larger keeps its own normalisation, so its mass on ids that the teacher does not know
counts against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.errors import MismatchError, NotFiniteError
from kdcache.loss.chunks import Head
from kdcache.train.body import hidden_states, output_projection, vocab_size
from kdcache.train.evaluation.heldout import HeldoutSequence
from kdcache.train.packed import apply_head, has_head, logits_head

TEACHER = "teacher"


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Sums over the predicted tokens of each sequence.

    Attributes:
        nll_S: (S,) float64, nats, -log q(the token that in fact came).
        kl_S: (S,) float64, nats, KL(teacher || this model).
        agreement_S: (S,) float64, positions whose most probable token is the teacher's.
        correct_S: (S,) float64, positions whose most probable token in fact came.
    """

    nll_S: NDArray[np.float64]
    kl_S: NDArray[np.float64]
    agreement_S: NDArray[np.float64]
    correct_S: NDArray[np.float64]


@torch.no_grad()
def score_models(
    teacher: PreTrainedModel,
    students: Mapping[str, PreTrainedModel],
    sequences: Sequence[HeldoutSequence],
    *,
    chunk_positions: int = 256,
    on_sequence: Callable[[HeldoutSequence], object] = lambda _: None,
    num_tokens: int | None = None,
) -> dict[str, Scores]:
    """Score the teacher (under the name `teacher`) and every student on the same tokens.

    Args:
        teacher, students: models in evaluation mode, on one device.
        sequences: what they read, one at a time.
        chunk_positions: positions whose float32 distributions exist at once, for two models at a time.
        on_sequence: called after each sequence, for progress.
        num_tokens: ids of the tokenizer; None for all of the teacher's.

    Raises:
        MismatchError: a student's vocabulary is smaller than the tokenizer's.
        NotFiniteError: a model whose loss or KL on some text is not a finite number.
    """
    known = common_vocabulary(teacher, students, num_tokens)
    models = {TEACHER: teacher, **students}
    heads = {name: head if has_head(model, head := logits_head(model)) else None for name, model in models.items()}
    sums = {name: np.zeros((len(sequences), 4)) for name in models}
    for row, sequence in enumerate(sequences):
        ids_T = torch.from_numpy(sequence.input_ids_N).to(teacher.device)
        chunks = {
            name: _logprob_chunks(model, ids_T, chunk_positions, heads[name], known if name == TEACHER else None)
            for name, model in models.items()
        }
        for targets_P in ids_T[1:].split(chunk_positions):
            teacher_PV = next(chunks[TEACHER])
            for name in models:
                own_PV = teacher_PV if name == TEACHER else next(chunks[name])
                sums[name][row] += _chunk_sums(teacher_PV, own_PV, targets_P)
        _check_finite({name: table[row] for name, table in sums.items()}, sequence)
        on_sequence(sequence)
    return {name: Scores(*np.ascontiguousarray(table.T)) for name, table in sums.items()}


@torch.no_grad()
def heldout_nats_per_token(
    model: PreTrainedModel, sequences: Sequence[HeldoutSequence], *, chunk_positions: int = 256
) -> float:
    """Mean of -log q(the token that came) over all predicted tokens, in nats; leaves the model in the mode it was in."""
    was_training = model.training
    model.eval()
    total = 0.0
    for sequence in sequences:
        ids_T = torch.from_numpy(sequence.input_ids_N).to(model.device)
        chunks = _logprob_chunks(model, ids_T, chunk_positions, logits_head(model))
        for targets_P, logprobs_PV in zip(ids_T[1:].split(chunk_positions), chunks, strict=True):
            total -= float(_gather(logprobs_PV, targets_P).double().sum())
    model.train(was_training)
    return total / sum(sequence.num_targets for sequence in sequences)


def _logprob_chunks(
    model: PreTrainedModel, ids_T: Tensor, chunk_positions: int, head: Head | None, known: int | None = None
) -> Iterator[Tensor]:
    """(P, V) float32 logprobs of positions 0..T-2, a chunk at a time; with a head that nobody knows (None) of whole logits.

    Over the first `known` ids, normalised there; None for all.
    """
    ids_1T = ids_T[None, :-1]
    positions_1T = torch.arange(ids_1T.shape[1], device=ids_T.device)[None]
    if head is None:
        for logits_PV in model(input_ids=ids_1T, use_cache=False).logits[0].split(chunk_positions):
            yield torch.log_softmax(logits_PV[:, :known].float(), dim=-1)
        return
    projection = output_projection(model)
    for hidden_PH in hidden_states(model, ids_1T, positions_1T)[0].split(chunk_positions):
        yield torch.log_softmax(apply_head(head, projection(hidden_PH)[:, :known].float()), dim=-1)


def _chunk_sums(teacher_PV: Tensor, own_PV: Tensor, targets_P: Tensor) -> NDArray[np.float64]:
    """(4,) nll, kl, agreement, correct, summed over the chunk in float64; in the order of the fields of `Scores`."""
    overlap_PV = own_PV[:, : teacher_PV.shape[1]]
    # xlogy-like: a teacher probability of 0 adds 0, not 0 * inf.
    terms_PV = torch.where(teacher_PV == -torch.inf, 0.0, teacher_PV.exp() * (teacher_PV - overlap_PV))
    best_P, teacher_best_P = own_PV.argmax(dim=-1), teacher_PV.argmax(dim=-1)
    return np.array(
        [
            -float(_gather(own_PV, targets_P).double().sum()),
            float(terms_PV.sum(dim=-1).double().sum()),
            float((best_P == teacher_best_P).sum()),
            float((best_P == targets_P).sum()),
        ]
    )


def _check_finite(sums: Mapping[str, NDArray[np.float64]], sequence: HeldoutSequence) -> None:
    for name, added in sums.items():
        if not np.isfinite(added).all():
            raise NotFiniteError(
                f"{name!r} cannot be scored: on held-out text {sequence.text} (from 0) its loss is {added[0]} and its KL to "
                f"the teacher {added[1]} nats; its logits are NaN, or it gives a token no probability at all"
            )


def _gather(logprobs_PV: Tensor, ids_P: Tensor) -> Tensor:
    return logprobs_PV.gather(1, ids_P[:, None])[:, 0]


def common_vocabulary(teacher: PreTrainedModel, students: Mapping[str, PreTrainedModel], num_tokens: int | None = None) -> int:
    """The teacher's ids that every student has: all, or those without some of its padding.

    The teacher is normalised over them, so that a student without the teacher's padding is not infinitely far from it.

    Raises:
        MismatchError: a student lacks the id of a token.
    """
    size = vocab_size(teacher)
    needed = size if num_tokens is None else min(size, num_tokens)
    for name, model in students.items():
        if vocab_size(model) < needed:
            raise MismatchError(
                f"student {name!r} has a vocabulary of {vocab_size(model)}, the teacher one of {needed} tokens: the KL over "
                "the teacher's vocabulary is not defined"
            )
    return min([size, *(vocab_size(model) for model in students.values())])
