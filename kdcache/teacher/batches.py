"""Cut sequences into groups that bound memory, and batches that waste little padding. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from kdcache.format.record import TokenSequence


def groups_of_tokens(sequences: Sequence[TokenSequence], group_tokens: int) -> Iterator[Sequence[TokenSequence]]:
    """Cut sequences into groups of at most `group_tokens` tokens; a longer sequence is a group of its own."""
    start, tokens = 0, 0
    for end, sequence in enumerate(sequences):
        if end > start and tokens + sequence.num_tokens > group_tokens:
            yield sequences[start:end]
            start, tokens = end, 0
        tokens += sequence.num_tokens
    if start < len(sequences):
        yield sequences[start:]


def batches_by_length(
    lengths: Sequence[int], tokens_per_forward: int, sharing: Literal["any", "equal", "alone"] = "any"
) -> Iterator[list[int]]:
    """Batches of indices, longest first, of at most `tokens_per_forward` tokens with their padding, or of one
    sequence.

    Args:
        lengths: in tokens.
        tokens_per_forward: of a batch.
        sharing: whether a batch may hold any lengths, equal ones only, or one sequence only.
    """
    # Longest first: what does not fit in memory fails at once and not at the end.
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        size = max(1, tokens_per_forward // lengths[order[0]]) if sharing != "alone" else 1
        if sharing == "equal":
            size = min(size, sum(lengths[index] == lengths[order[0]] for index in order))
        yield order[:size]
        order = order[size:]
