"""Attention transfer from the teacher's top keys of each head (arXiv 1612.03928, 1909.10351).

The student's attention is computed from its queries and keys, as its own attention function gets them: after the rotary
embedding, with the layer's scale, soft cap, window and sinks. All keys that are not kept are one more key, the tail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.errors import LossError
from kdcache.loss.states.relations import in_blocks, later_keys
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
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None

    def masked(self, query: Tensor, key: Tensor, start: int) -> Tensor:
        """(heads, queries, keys) scores, `_MASKED` where a query does not see a key.

        Args:
            query: (heads, queries, width); start: the index of the first of them.
            key: (heads, keys, width).
        """
        scores = query @ key.transpose(1, 2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        num_queries, num_keys = scores.shape[1:]
        is_hidden = later_keys(num_queries, num_keys, start, scores.device)
        if self.window is not None:
            is_hidden = is_hidden | ~later_keys(num_queries, num_keys, start - self.window, scores.device)
        return scores.masked_fill(is_hidden, _MASKED)

    def log_totals(self, scores: Tensor) -> Tensor:
        """(heads, queries) the logs of the softmax's denominators."""
        if self.sinks is not None:
            sinks = self.sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, sinks], dim=2)
        return scores.logsumexp(dim=2)


def attention_probabilities(query: Tensor, key: Tensor, scores: AttentionScores) -> Tensor:
    """(heads, N, N) the whole attention of one sequence, for checks; the losses never hold it.

    Args:
        query: (heads, N, width).
        key: (key heads, N, width); each serves heads / key heads queries' heads.
    """
    found = scores.masked(widened(query), _repeated(widened(key), len(query)), 0)
    return (found - scores.log_totals(found)[..., None]).exp()


@dataclass(frozen=True, slots=True, eq=False)
class TopKeys:
    """The teacher's attention at its top keys, for one sequence.

    Attributes:
        probabilities: (heads, N, kept) in [0, 1], over ALL keys that a query sees; 0 without an entry.
        distances: the same shape, integers: the query's position minus the key's.
    """

    probabilities: Tensor
    distances: Tensor


def attention_loss(
    name: str,
    student: tuple[Tensor, Tensor],
    teacher: TopKeys,
    scores: AttentionScores,
    weights_N: Tensor | None = None,
) -> Tensor:
    """The sum over one sequence's tokens of weight * loss, the mean over heads.

    Args:
        name: `kl`, in nats, over the kept keys and the tail; or `normalized_mse`, |s/|s| - t/|t||^2 over the same, from 0 to 2.
        student: (heads, N, width) queries and (key heads, N, width) keys.
        teacher: for each of the student's heads.
        scores: of the student's layer.
        weights_N: of the tokens; None for 1.

    Raises:
        LossError: another name, or other numbers of heads or tokens.
    """
    query, key = student
    if name not in ATTENTION_LOSSES:
        raise LossError(f"the loss of attention is {name!r}, but must be one of {', '.join(ATTENTION_LOSSES)}")
    if teacher.probabilities.shape[:2] != query.shape[:2] or teacher.distances.shape != teacher.probabilities.shape:
        raise LossError(
            f"the teacher's top keys are {tuple(teacher.probabilities.shape)} and the student's queries {tuple(query.shape)}; "
            "the first two must be the same numbers of heads and tokens"
        )
    loss, told = ATTENTION_LOSSES[name], widened(teacher.probabilities)
    weights_N = query.new_ones(query.shape[1]) if weights_N is None else weights_N

    def loss_of(queries: Tensor, keys: Tensor, start: int) -> Tensor:
        some = slice(start, start + queries.shape[1])
        block = TopKeys(told[:, some], teacher.distances[:, some])
        found = loss(*_log_masses(scores.masked(queries, keys, start), scores, block, start))
        return found.mean(dim=0) @ weights_N[some].to(found.dtype)

    return in_blocks(loss_of, widened(query), _repeated(widened(key), len(query)))


def _repeated(key: Tensor, num_heads: int) -> Tensor:
    if num_heads % len(key):
        raise LossError(f"{len(key)} heads of keys do not divide {num_heads} heads of queries")
    return key.repeat_interleave(num_heads // len(key), dim=0)


def _log_masses(scores: Tensor, rule: AttentionScores, block: TopKeys, start: int) -> tuple[Tensor, Tensor]:
    """The teacher's masses and the logs of the student's, (heads, queries, kept + 1) each: the last one is the tail."""
    queries = torch.arange(start, start + scores.shape[1], device=scores.device)[:, None]
    is_kept = block.probabilities > 0
    keys = (queries - block.distances).clamp(0, scores.shape[2] - 1).long()
    log_totals = rule.log_totals(scores)[..., None]
    # A query's entries of mass 0 are at a key that may be kept too: they must not hide it, so they point nowhere.
    others = torch.cat([scores, scores.new_full((*scores.shape[:2], 1), _MASKED)], dim=2)
    others = others.scatter(2, torch.where(is_kept, keys, scores.shape[2]), _MASKED)
    if rule.sinks is not None:
        others = torch.cat([others, rule.sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)], dim=2)
    has_others = (others > _MASKED / 2).any(dim=2, keepdim=True)
    log_tail = others.logsumexp(dim=2, keepdim=True) - log_totals
    log_kept = scores.gather(2, keys).masked_fill(~is_kept, _MASKED) - log_totals
    tail = (1 - block.probabilities.sum(dim=2, keepdim=True)).clamp_min(0) * has_others
    masses = torch.cat([block.probabilities, tail], dim=2)
    student = torch.cat([log_kept, log_tail], dim=2)
    # Stored masses are rounded: they are brought to the sum 1, or equal models would not have the loss 0.
    return masses / masses.sum(dim=2, keepdim=True).clamp_min(1e-30), student


def _kl(teacher: Tensor, student_logs: Tensor) -> Tensor:
    logs = teacher.clamp_min(1e-30).log()
    return torch.where(teacher > 0, teacher * (logs - student_logs), 0).sum(dim=2)


def _normalized_mse(teacher: Tensor, student_logs: Tensor) -> Tensor:
    student, teacher = (functional.normalize(values, dim=2, eps=1e-12) for values in (student_logs.exp(), teacher))
    return (student - teacher).square().sum(dim=2)


ATTENTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": _kl, "normalized_mse": _normalized_mse}
"""name -> the loss of each head and query, of the teacher's masses and the logs of the student's."""
