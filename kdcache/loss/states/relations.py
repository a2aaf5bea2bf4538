"""MiniLMv2's relations: how alike the queries, keys or values of a sequence's tokens are (arXiv 2012.15828).

A relation is a softmax over a sequence's earlier tokens, so the two models may differ in hidden size and in heads. One sequence
is computed at a time: packed documents cannot see each other, and the largest temporary is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdcache.errors import LossError
from kdcache.loss.states.vectors import full_precision, widened

MOST_ELEMENTS = 1 << 20
"""Numbers of one temporary on a CPU, heads * queries * keys: 4 MiB in float32, which stays in a cache."""

_DEVICE_TIMES = 16
"""On other devices this many times as many, so that launches do not count: 64 MiB."""


def relation_kl(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    num_heads: int,
    weights_N: Tensor | None = None,
    is_causal: bool = True,
) -> Tensor:
    """The sum over one sequence's tokens of weight * KL(teacher, student), the mean over relation heads, in nats.

    The student's part is computed again in the backward pass, so that no (heads, N, N) array is kept.

    Args:
        student: left and right (N, width), all heads of a token in one vector: (queries, queries), (queries, keys), ...
        teacher: the same, of any width; gets no gradient.
        num_heads: relation heads, into which the vectors are cut again.
        weights_N: of the tokens; None for 1.
        is_causal: a token is compared with itself and earlier ones only, as decoders read.

    Raises:
        LossError: a width that `num_heads` does not divide, left and right of other widths, or other numbers of tokens.
    """
    num_tokens = len(student[0])
    student_parts, teacher_parts = (_cut(*pair, num_heads, num_tokens) for pair in (student, teacher))
    weights_N = student[0].new_ones(num_tokens) if weights_N is None else weights_N

    def loss_of(left: Tensor, right: Tensor, start: int) -> Tensor:
        num_queries, num_keys = left.shape[1], right.shape[1]
        with torch.no_grad():
            told = teacher_parts[0][:, start : start + num_queries], teacher_parts[1][:, :num_keys]
            teacher_logs = _log_relations(*told, start, is_causal)
        found = (teacher_logs.exp() * (teacher_logs - _log_relations(left, right, start, is_causal))).sum(dim=2).mean(dim=0)
        return found @ weights_N[start : start + num_queries].to(found.dtype)

    return in_blocks(loss_of, *student_parts, lambda stop: stop if is_causal else num_tokens)


def in_blocks(
    loss_of: Callable[[Tensor, Tensor, int], Tensor], query: Tensor, key: Tensor, num_seen: Callable[[int], int]
) -> Tensor:
    """The sum of a loss over blocks of a sequence's queries, each computed again in the backward pass.

    Args:
        loss_of: takes queries (heads, some, width), the keys that they may see, and the index of the first query.
        query: (heads, queries, width).
        key: (heads, keys, width).
        num_seen: index of a query -> how many of the keys, from the first, the queries before it see at most.
    """
    most = MOST_ELEMENTS * (1 if query.device.type == "cpu" else _DEVICE_TIMES)
    step = max(most // max(len(query) * key.shape[1], 1), 1)
    total = query.new_zeros(())
    with full_precision(query):
        for start, block in zip(range(0, query.shape[1], step), query.split(step, dim=1), strict=True):
            seen = key[:, : num_seen(start + block.shape[1])]
            total = total + checkpoint(loss_of, block, seen, start, use_reentrant=False, preserve_rng_state=False)
    return total


def _cut(left_NH: Tensor, right_NH: Tensor, num_heads: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """(heads, N, width) each."""
    if left_NH.shape != right_NH.shape or len(left_NH) != num_tokens:
        raise LossError(
            f"a relation compares vectors of one width and one sequence, but got {tuple(left_NH.shape)} and "
            f"{tuple(right_NH.shape)} for {num_tokens} tokens; repeat the keys of grouped-query attention to the queries' width"
        )
    if left_NH.shape[1] % num_heads:
        raise LossError(
            f"{num_heads} relation heads do not divide the width {left_NH.shape[1]}; use a divisor of both models' widths"
        )
    left, right = (widened(values).unflatten(1, (num_heads, -1)).transpose(0, 1) for values in (left_NH, right_NH))
    return left, right


def _log_relations(left: Tensor, right: Tensor, start: int, is_causal: bool) -> Tensor:
    """(heads, queries, keys) logs of relations; a large negative number at masked keys, whose mass is 0."""
    scores = left @ right.transpose(1, 2) / math.sqrt(left.shape[2])
    if is_causal:
        queries = torch.arange(start, start + left.shape[1], device=left.device)
        scores = scores.masked_fill(torch.arange(right.shape[1], device=left.device) > queries[:, None], -1e30)
    return scores.log_softmax(dim=2)
