"""Positions of one sequence as rectangles of bounded size, with their logprobs and the targets under each of the 3 shifts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.foreign.base import ForeignSequence, ValueKind

SHIFTS = (-1, 0, 1)
SENTINEL = -900.0
"""From here down a value stands for "no entry" (Megatron writes -1000): exp of it is 0 in every float."""

CELLS_AT_ONCE = 2**21


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Positions of one sequence as a rectangle.

    Padding has the id -1, and value and logprob -inf. targets_3P is -1 where there is none. index_P are the positions'
    indices among those of the sequence.
    """

    ids_PK: NDArray[np.int64]
    values_PK: NDArray[np.float64]
    logprobs_PK: NDArray[np.float64]
    filled_PK: NDArray[np.bool_]
    counts_P: NDArray[np.int64]
    targets_3P: NDArray[np.int64]
    index_P: NDArray[np.int64]


def blocks(sequence: ForeignSequence, values: ValueKind, cells_at_once: int = CELLS_AT_ONCE) -> Iterator[Block]:
    """Yield the positions that have entries, as rectangles of at most this many cells, or of one position."""
    kept = np.flatnonzero(sequence.counts_P)
    offsets_P1 = sequence.offsets_P1
    start = 0
    while start < len(kept):
        widest_P = np.maximum.accumulate(sequence.counts_P[kept[start:]])
        cells_P = widest_P * np.arange(1, len(widest_P) + 1)
        num_positions = max(1, int(np.searchsorted(cells_P, cells_at_once, side="right")))
        yield _block(sequence, values, kept[start : start + num_positions], offsets_P1)
        start += num_positions


def _block(sequence: ForeignSequence, kind: ValueKind, positions: NDArray[np.int64], offsets_P1: NDArray[np.int64]) -> Block:
    counts_P = sequence.counts_P[positions]
    filled_PK = np.arange(int(counts_P.max())) < counts_P[:, None]
    slots_PK = np.where(filled_PK, offsets_P1[positions][:, None] + np.arange(filled_PK.shape[1]), 0)
    values_PK = np.where(filled_PK, sequence.values_E[slots_PK], -np.inf)
    log_z_P = None if sequence.log_z_P is None else sequence.log_z_P[positions]
    logprobs_PK = as_logprobs(values_PK, kind, log_z_P)
    return Block(
        ids_PK=np.where(filled_PK, sequence.token_ids_E[slots_PK], -1),
        values_PK=values_PK,
        logprobs_PK=np.where(filled_PK, logprobs_PK, -np.inf),
        filled_PK=filled_PK,
        counts_P=counts_P,
        targets_3P=_targets(sequence, positions),
        index_P=positions,
    )


def as_logprobs(values_PK: NDArray[np.float64], kind: ValueKind, log_z_P: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Convert values of this kind to logprobs; logits without a normaliser stay as they are. Sentinels become -inf."""
    if kind == "probs":
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(values_PK)
    if kind == "nll":
        return -values_PK
    if kind == "logits" and log_z_P is not None:
        with np.errstate(invalid="ignore"):
            return values_PK - log_z_P[:, None]
    return np.where(values_PK <= SENTINEL, -np.inf, values_PK) if kind == "logprobs" else values_PK


def _targets(sequence: ForeignSequence, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    if sequence.input_ids_N is None:
        return np.full((len(SHIFTS), len(positions)), -1, np.int64)
    ids_N = sequence.input_ids_N
    index_3P = sequence.positions_P[positions] + 1 + np.array(SHIFTS)[:, None]
    inside_3P = (index_3P >= 0) & (index_3P < len(ids_N))
    return np.where(inside_3P, ids_N[np.clip(index_3P, 0, max(len(ids_N) - 1, 0))] if len(ids_N) else -1, -1)


def may_hold_extra(sequence: ForeignSequence, values: ValueKind) -> NDArray[np.bool_]:
    """Tell (P,) whether the text may have chosen a position's least entry, which then is not part of a top k.

    Engines add the text's own token to the top k: positions then have two widths, and the wider ones hold it; or it
    comes first, though it is the least. What is left is cut by the teacher alone. Positions that are merely unsorted lose
    their least entry too.
    """
    counts_P = sequence.counts_P
    sizes = np.unique(counts_P[counts_P > 0])
    if len(sizes) == 2 and sizes[1] == sizes[0] + 1:
        return counts_P == sizes[1]
    filled = np.flatnonzero(counts_P)
    extra_P = np.zeros(len(counts_P), np.bool_)
    if len(filled):
        starts = sequence.offsets_P1[:-1][filled]
        scores_E = -sequence.values_E if values == "nll" else sequence.values_E
        is_first_least_P = (scores_E[starts] <= np.minimum.reduceat(scores_E, starts)) & (counts_P[filled] > 1)
        extra_P = (counts_P > 1) & bool(is_first_least_P.any())
    return extra_P


def has_duplicates(ids_PK: NDArray[np.int64], filled_PK: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell (P,) whether a position names an id twice."""
    # Padding gets ids of its own, so that it never equals anything.
    distinct_PK = np.where(filled_PK, ids_PK, -2 - np.arange(ids_PK.shape[1]) - (1 << 40))
    sorted_PK = np.sort(distinct_PK, axis=1)
    return (sorted_PK[:, 1:] == sorted_PK[:, :-1]).any(axis=1)


def logsumexp(values_PK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (P,) the log of the sum of exp over the last axis; -inf for positions of -inf."""
    top_P = values_PK.max(axis=-1, initial=-np.inf)
    safe_P = np.where(np.isfinite(top_P), top_P, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values_PK - safe_P[..., None]).sum(axis=-1)) + safe_P
