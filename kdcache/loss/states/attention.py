"""Attention transfer from the teacher's top keys of each head (arXiv 1612.03928, 1909.10351).

The student's attention is computed from its queries and keys, as its own attention function gets them: after the rotary
embedding, with the layer's scale, soft cap, window and sinks. All keys that are not kept are one more key, the tail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.errors import LossError
from kdcache.loss.states.relations import in_blocks
from kdcache.loss.states.vectors import widened

_MASKED = -1e30
"""A score whose mass is 0; infinities would give NaN in the gradient of what is left out."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionScores:
    """What a layer does with the products of its queries and keys before the softmax.

    Attributes:
        scale: multiplies them.
        softcap: then bounds them, as softcap * tanh(score / softcap); None for no bound.
        window: a query sees this many keys, itself included; None for all earlier ones.
        sinks: (heads,) the score of a further key per head whose mass is lost; None without.
        mask: (1 or heads, N, N) bool, True where a query sees a key, or what is added to the scores; None for all earlier keys
            within the window.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None
    mask: Tensor | None = None

    def masked(self, query: Tensor, key: Tensor, positions: Tensor) -> Tensor:
        """(heads, queries, keys) scores, `_MASKED` where a query does not see a key.

        Args:
            query: (heads, queries, width).
            key: (heads, keys, width), from the sequence's first.
            positions: (queries,) of the queries in the sequence.
        """
        scores = query @ key.transpose(1, 2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        keys = torch.arange(key.shape[1], device=key.device)
        if self.mask is not None:
            mask = self.mask[:, positions][:, :, : len(keys)]
            return scores.masked_fill(~mask, _MASKED) if mask.dtype == torch.bool else (scores + mask).clamp_min(_MASKED)
        distances = positions[:, None] - keys
        is_hidden = distances < 0
        if self.window is not None:
            is_hidden = is_hidden | (distances >= self.window)
        return scores.masked_fill(is_hidden, _MASKED)

    def log_totals(self, scores: Tensor) -> Tensor:
        """(heads, queries, 1) the logs of the softmax's denominators."""
        return self.with_sinks(scores).logsumexp(dim=2, keepdim=True)

    def with_sinks(self, scores: Tensor) -> Tensor:
        """The scores and, if there are sinks, theirs as one more key."""
        if self.sinks is None:
            return scores
        return torch.cat([scores, self.sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)], dim=2)


def attention_probabilities(query: Tensor, key: Tensor, scores: AttentionScores) -> Tensor:
    """(heads, N, N) the whole attention of one sequence, for checks; the losses never hold it.

    Args:
        query: (heads, N, width).
        key: (key heads, N, width); each serves heads / key heads queries' heads.
        scores: of the layer.
    """
    positions = torch.arange(query.shape[1], device=query.device)
    found = scores.masked(widened(query), _repeated(widened(key), len(query)), positions)
    return (found - scores.log_totals(found)).exp()


@dataclass(frozen=True, slots=True, eq=False)
class TopKeys:
    """The teacher's attention at its top keys, for some positions of one sequence.

    Attributes:
        probabilities: (heads, queries, kept) in [0, 1], over ALL keys that a query sees; 0 without an entry.
        distances: the same shape, integers: the query's position minus the key's.
        positions: of the queries in the sequence, ascending.
    """

    probabilities: Tensor
    distances: Tensor
    positions: Sequence[int]


def attention_loss(
    name: str,
    student: tuple[Tensor, Tensor],
    teacher: TopKeys,
    scores: AttentionScores,
    weights: Tensor | None = None,
) -> Tensor:
    """The sum over the teacher's positions of weight * loss, the mean over heads.

    Args:
        name: `kl`, in nats, over the kept keys and the tail; or `normalized_mse`, |s/|s| - t/|t||^2 over the same, from 0 to 2.
        student: (heads, N, width) queries and (key heads, N, width) keys of the whole sequence.
        teacher: for each of the student's heads.
        scores: of the student's layer.
        weights: of the teacher's positions; None for 1.

    Raises:
        LossError: another name, or other numbers of heads.
    """
    query, key = student
    if name not in ATTENTION_LOSSES:
        raise LossError(f"the loss of attention is {name!r}, but must be one of {', '.join(ATTENTION_LOSSES)}")
    expected = len(query), len(teacher.positions)
    if teacher.probabilities.shape[:2] != expected or teacher.distances.shape != teacher.probabilities.shape:
        raise LossError(
            f"the teacher's top keys are {tuple(teacher.probabilities.shape)} and their distances "
            f"{tuple(teacher.distances.shape)}, but there are {expected[0]} heads and {expected[1]} positions"
        )
    loss, told = ATTENTION_LOSSES[name], widened(teacher.probabilities)
    positions = torch.tensor(teacher.positions, dtype=torch.int64, device=query.device)
    weights = query.new_ones(len(positions)) if weights is None else weights

    def loss_of(queries: Tensor, keys: Tensor, start: int) -> Tensor:
        some = slice(start, start + queries.shape[1])
        kept = told[:, some], teacher.distances[:, some]
        found = loss(*_log_masses(scores.masked(queries, keys, positions[some]), scores, kept, positions[some]))
        return found.mean(dim=0) @ weights[some].to(found.dtype)

    queries = widened(query).index_select(1, positions)
    return in_blocks(loss_of, queries, _repeated(widened(key), len(query)), lambda stop: teacher.positions[stop - 1] + 1)


def _repeated(key: Tensor, num_heads: int) -> Tensor:
    if num_heads % len(key):
        raise LossError(f"{len(key)} heads of keys do not divide {num_heads} heads of queries")
    return key.repeat_interleave(num_heads // len(key), dim=0)


def _log_masses(scores: Tensor, rule: AttentionScores, kept: tuple[Tensor, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's masses and the logs of the student's, (heads, queries, kept + 1) each: the last one is the tail."""
    probabilities, distances = kept
    is_kept = probabilities > 0
    keys = (positions[:, None] - distances).clamp(0, scores.shape[2] - 1).long()
    log_totals = rule.log_totals(scores)
    # Entries of mass 0 stand at a key that may be kept too: they must not hide it, so they point at one more key.
    others = torch.cat([scores, scores.new_full((*scores.shape[:2], 1), _MASKED)], dim=2)
    others = rule.with_sinks(others.scatter(2, torch.where(is_kept, keys, scores.shape[2]), _MASKED))
    has_others = (others > _MASKED / 2).any(dim=2, keepdim=True)
    log_tail = others.logsumexp(dim=2, keepdim=True) - log_totals
    log_kept = scores.gather(2, keys).masked_fill(~is_kept, _MASKED) - log_totals
    tail = (1 - probabilities.sum(dim=2, keepdim=True)).clamp_min(0) * has_others
    masses = torch.cat([probabilities, tail], dim=2)
    # Stored masses are rounded: they are brought to the sum 1, or equal models would not have the loss 0.
    return masses / masses.sum(dim=2, keepdim=True).clamp_min(1e-30), torch.cat([log_kept, log_tail], dim=2)


def _kl(teacher: Tensor, student_logs: Tensor) -> Tensor:
    logs = teacher.clamp_min(1e-30).log()
    return torch.where(teacher > 0, teacher * (logs - student_logs), 0).sum(dim=2)


def _normalized_mse(teacher: Tensor, student_logs: Tensor) -> Tensor:
    student, teacher = (functional.normalize(values, dim=2, eps=1e-12) for values in (student_logs.exp(), teacher))
    return (student - teacher).square().sum(dim=2)


ATTENTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": _kl, "normalized_mse": _normalized_mse}
"""name -> the loss of each head and query, of the teacher's masses and the logs of the student's."""
