"""What codes of `archive` stand for, as tables for its compiled loops, and where in a batch's arrays its positions go."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.levels import TAIL_BITS, level_masses

HALF_INFINITY = 0x7C00


def half_codes(logprobs: NDArray[np.floating]) -> NDArray[np.int32]:
    """The bits of float16 sizes of logprobs: they rise as the logprob falls."""
    with np.errstate(over="ignore"):
        return np.abs(logprobs).astype(np.float16).view(np.uint16).astype(np.int32)


def half_logprobs(codes: NDArray[np.int32]) -> NDArray[np.float32]:
    """What the bits of float16 sizes stand for."""
    return -codes.astype(np.uint16).view(np.float16).astype(np.float32)


@lru_cache(maxsize=16)
def log_counts(num_draws: int) -> NDArray[np.float64]:
    """(num_draws,) the logarithm of a count's share by its code."""
    return _fixed(np.log((num_draws - np.arange(num_draws)) / num_draws)) if num_draws else _fixed(np.zeros(0))


@lru_cache(maxsize=4)
def tail_tables(is_half: bool, is_stored: bool) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Tail masses and their logarithms, by code; of a tail that is not stored, which is 1, by code 0."""
    if not is_stored:
        masses = np.ones(1, np.float32)
    elif is_half:
        masses = np.exp(half_logprobs(np.arange(HALF_INFINITY + 1, dtype=np.int32)))
    else:
        masses = level_masses(TAIL_BITS).astype(np.float32)
    with np.errstate(divide="ignore"):
        return _fixed(masses), _fixed(np.log(masses.astype(np.float64)))


def _fixed(values: NDArray[Any]) -> NDArray[Any]:
    values.flags.writeable = False
    return values


def spans_of(
    ids_PK: NDArray[np.int32], logprobs_PK: NDArray[np.float32], num_positions: int, keep_P: NDArray[np.bool_] | None
) -> NDArray[np.int64]:
    """(P, 2) where in the flat arrays each position begins, -1 for nowhere, and where its padding ends.

    Raises:
        ValueError: arrays that are not contiguous, not alike, or not of as many positions as are kept.
    """
    num_kept = num_positions if keep_P is None else int(np.count_nonzero(keep_P))
    if not (ids_PK.flags.c_contiguous and logprobs_PK.flags.c_contiguous and ids_PK.shape == logprobs_PK.shape):
        raise ValueError("arrays that are decoded into must be C-contiguous and of one shape")
    if len(ids_PK) != num_kept:
        raise ValueError(f"arrays that are decoded into hold {len(ids_PK)} positions, but {num_kept} are kept")
    starts = np.arange(num_kept) * ids_PK.shape[1]
    kept_spans = np.stack([starts, starts + ids_PK.shape[1]], axis=1)
    if keep_P is None:
        return kept_spans
    spans_P2 = np.full((num_positions, 2), -1, np.int64)
    spans_P2[keep_P] = kept_spans
    return spans_P2
