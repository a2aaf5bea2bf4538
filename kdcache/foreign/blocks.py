"""Rows of one sequence as rectangles of bounded size, with their logprobs and the targets that each shift would give them.

Shape letters: N tokens, R rows, K entries per row (padded), E entries (ragged), S shifts.
"""

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
    """Rows of one sequence as a rectangle. Padding: id -1, value and logprob -inf. targets_SR is -1 where there is none; rows_R
    are the rows' numbers in the sequence."""

    ids_RK: NDArray[np.int64]
    values_RK: NDArray[np.float64]
    logprobs_RK: NDArray[np.float64]
    filled_RK: NDArray[np.bool_]
    counts_R: NDArray[np.int64]
    targets_SR: NDArray[np.int64]
    rows_R: NDArray[np.int64]


def blocks(sequence: ForeignSequence, values: ValueKind, cells_at_once: int = CELLS_AT_ONCE) -> Iterator[Block]:
    """The rows that have entries, as rectangles of at most so many cells, or of one row."""
    kept = np.flatnonzero(sequence.counts_R)
    offsets_R1 = sequence.offsets_R1
    start = 0
    while start < len(kept):
        widest_R = np.maximum.accumulate(sequence.counts_R[kept[start:]])
        cells_R = widest_R * np.arange(1, len(widest_R) + 1)
        num_rows = max(1, int(np.searchsorted(cells_R, cells_at_once, side="right")))
        yield _block(sequence, values, kept[start : start + num_rows], offsets_R1)
        start += num_rows


def _block(sequence: ForeignSequence, kind: ValueKind, rows: NDArray[np.int64], offsets_R1: NDArray[np.int64]) -> Block:
    counts_R = sequence.counts_R[rows]
    filled_RK = np.arange(int(counts_R.max())) < counts_R[:, None]
    places_RK = np.where(filled_RK, offsets_R1[rows][:, None] + np.arange(filled_RK.shape[1]), 0)
    values_RK = np.where(filled_RK, sequence.values_E[places_RK], -np.inf)
    log_z_R = None if sequence.log_z_R is None else sequence.log_z_R[rows]
    logprobs_RK = as_logprobs(values_RK, kind, log_z_R)
    return Block(
        ids_RK=np.where(filled_RK, sequence.token_ids_E[places_RK], -1),
        values_RK=values_RK,
        logprobs_RK=np.where(filled_RK, logprobs_RK, -np.inf),
        filled_RK=filled_RK,
        counts_R=counts_R,
        targets_SR=_targets(sequence, rows),
        rows_R=rows,
    )


def as_logprobs(values_RK: NDArray[np.float64], kind: ValueKind, log_z_R: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Logprobs of values of this kind; logits without a normaliser stay as they are. Sentinels become -inf."""
    if kind == "probs":
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(values_RK)
    if kind == "nll":
        return -values_RK
    if kind == "logits" and log_z_R is not None:
        with np.errstate(invalid="ignore"):
            return values_RK - log_z_R[:, None]
    return np.where(values_RK <= SENTINEL, -np.inf, values_RK) if kind == "logprobs" else values_RK


def _targets(sequence: ForeignSequence, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    if sequence.input_ids_N is None:
        return np.full((len(SHIFTS), len(rows)), -1, np.int64)
    ids_N = sequence.input_ids_N
    index_SR = sequence.positions_R[rows] + 1 + np.array(SHIFTS)[:, None]
    inside_SR = (index_SR >= 0) & (index_SR < len(ids_N))
    return np.where(inside_SR, ids_N[np.clip(index_SR, 0, max(len(ids_N) - 1, 0))] if len(ids_N) else -1, -1)


def extra_rows(sequence: ForeignSequence, values: ValueKind) -> NDArray[np.bool_]:
    """(R,) rows whose least entry the text may have chosen: it is no part of a top k.

    Engines add the text's own token to the top k: rows of two widths, of which the wider have it; or first in the row, though
    it is the least. What is left is cut by the teacher alone. Rows that are merely unsorted lose their least entry too.
    """
    counts_R = sequence.counts_R
    sizes = np.unique(counts_R[counts_R > 0])
    if len(sizes) == 2 and sizes[1] == sizes[0] + 1:
        return counts_R == sizes[1]
    filled = np.flatnonzero(counts_R)
    extra_R = np.zeros(len(counts_R), np.bool_)
    if len(filled):
        starts = sequence.offsets_R1[:-1][filled]
        scores_E = -sequence.values_E if values == "nll" else sequence.values_E
        is_first_least_R = (scores_E[starts] <= np.minimum.reduceat(scores_E, starts)) & (counts_R[filled] > 1)
        extra_R = (counts_R > 1) & bool(is_first_least_R.any())
    return extra_R


def has_duplicates(ids_RK: NDArray[np.int64], filled_RK: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(R,) whether an id stands twice in the row."""
    # Padding gets ids of its own, so that it never equals anything.
    distinct_RK = np.where(filled_RK, ids_RK, -2 - np.arange(ids_RK.shape[1]) - (1 << 40))
    sorted_RK = np.sort(distinct_RK, axis=1)
    return (sorted_RK[:, 1:] == sorted_RK[:, :-1]).any(axis=1)


def logsumexp(values_RK: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R,) log of the sum of exp over the last axis; -inf for rows of -inf."""
    top_R = values_RK.max(axis=-1, initial=-np.inf)
    safe_R = np.where(np.isfinite(top_R), top_R, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values_RK - safe_R[..., None]).sum(axis=-1)) + safe_R
