"""What need not be stored of a random selection's estimates: they are all at tau, or whole counts of draws."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError, FormatError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions
from kdcache.format.selection import fixed_exact

MOST_OFF = 0.02
"""Nats between an estimate in float32 and what it stands for: a teacher's rounding, far below one draw of many."""


def stores_logprobs(selection: SelectionInfo) -> bool:
    """Whether there are exact entries, whose logprobs have to be stored."""
    return fixed_exact(selection) != 0


def stores_counts(selection: SelectionInfo) -> bool:
    """Whether estimates are counts of draws."""
    return selection.kind in ("sampled", "top_k_sampled")


def stores_tail(selection: SelectionInfo) -> bool:
    """Whether the tail mass is not known beforehand: of `sampled` it is 1."""
    return stores_logprobs(selection)


def count_type(selection: SelectionInfo) -> pa.DataType:
    """The smallest integers that hold a count of draws."""
    return pa.uint8() if selection.params["num_draws"] <= 255 else pa.uint16()


def exact_logprobs(d: Distributions, selection: SelectionInfo) -> NDArray[np.float32]:
    """The logprobs that have to be stored: those of exact entries, position by position.

    Raises:
        FormatError: estimates that are not at the selection's tau, or a tail other than the selection's.
    """
    if not stores_tail(selection) and not (np.abs(d.tail_mass_P - 1.0) <= 1e-3).all():
        raise FormatError(
            f"selection {selection.kind!r} has no exact entries, so the tail mass is 1; the record says otherwise"
        )
    if d.num_exact_P is None:
        return d.logprobs_E
    is_exact_E = d.is_exact_E
    if selection.kind == "threshold":
        errors = np.abs(d.logprobs_E[~is_exact_E] - math.log(selection.params["tau"]))
        if not (errors <= MOST_OFF).all():
            raise FormatError(f"an estimate of selection 'threshold' is not at tau = {selection.params['tau']}")
    return d.logprobs_E[is_exact_E]


def draw_counts(d: Distributions, selection: SelectionInfo) -> NDArray[np.int64]:
    """How many of the draws gave each estimate, position by position.

    Raises:
        FormatError: an estimate is not a whole number of draws.
    """
    num_draws, is_estimate_E = selection.params["num_draws"], ~d.is_exact_E
    positions = np.repeat(np.arange(d.num_positions), d.num_entries_P)[is_estimate_E]
    shares = np.exp(d.logprobs_E[is_estimate_E].astype(np.float64))
    draws = shares * num_draws
    if stores_tail(selection):
        draws /= np.maximum(d.tail_mass_P, 2.0**-149)[positions]
        # A tail near 0 is mostly rounding; the draws' own sum is not.
        if not _are_draws(draws, num_draws):
            draws = shares * num_draws / np.bincount(positions, shares, minlength=d.num_positions)[positions]
    if not _are_draws(draws, num_draws):
        raise FormatError(f"an estimate of selection {selection.kind!r} is not a whole number of {num_draws} draws")
    return np.rint(draws).astype(np.int64)


def _are_draws(draws: NDArray[np.float64], num_draws: int) -> bool:
    counts = np.rint(draws)
    return bool(((counts >= 1) & (counts <= num_draws) & (np.abs(draws - counts) <= MOST_OFF * counts)).all())


def all_logprobs(
    exact: NDArray[np.float32],
    counts: NDArray[np.integer] | None,
    record: tuple[NDArray[np.int64], NDArray[np.int64] | None, NDArray[np.float32]],
    selection: SelectionInfo,
) -> NDArray[np.float32]:
    """(E,) the logprobs of all entries, from those that were stored.

    Args:
        exact: see `exact_logprobs`.
        counts: see `draw_counts`; None where the selection has none.
        record: offsets_P1, num_exact_P and tail_mass_P, as in `Distributions`.

    Raises:
        CorruptCacheError: a count that no number of draws gives.
    """
    offsets_P1, num_exact_P, tail_mass_P = record
    if num_exact_P is None:
        return exact
    is_exact_E = is_exact(offsets_P1, num_exact_P)
    logprobs_E = np.empty(len(is_exact_E), np.float32)
    logprobs_E[is_exact_E] = exact
    if counts is None:
        logprobs_E[~is_exact_E] = math.log(selection.params["tau"])
        return logprobs_E
    num_draws = selection.params["num_draws"]
    if len(counts) and not (counts.min() >= 1 and counts.max() <= num_draws):
        raise CorruptCacheError(f"an estimate stands for a number of draws that is not from 1 to {num_draws}")
    with np.errstate(divide="ignore"):
        log_tail_P = np.log(tail_mass_P.astype(np.float64))
    positions = np.repeat(np.arange(len(tail_mass_P)), np.diff(offsets_P1) - num_exact_P)
    logprobs_E[~is_exact_E] = np.log(counts / num_draws) + log_tail_P[positions]
    return logprobs_E


def is_exact(offsets_P1: NDArray[np.int64], num_exact_P: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(E,) whether an entry is exact: the first num_exact_P of each position are."""
    counts_P = np.diff(offsets_P1)
    return np.arange(int(offsets_P1[-1])) - np.repeat(offsets_P1[:-1], counts_P) < np.repeat(num_exact_P, counts_P)
