"""Find the same sequences in several caches by their keys: pure functions of the caches' indexes.

In `indexes_SC`, C counts caches, one column for each; S counts sequences of the first cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.derive.choose import as_keys
from kdcache.errors import InputError

ABSENT = -1


def match_keys(keys: Sequence[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """(S, C) the index of each sequence of the first cache in each of the caches, ABSENT where it is missing.

    Sequences with equal keys are matched in order: the first with the first, the second with the second.

    Args:
        keys: of each cache, (its sequences, 16) uint8.
    """
    first_S = as_keys(keys[0])
    order_S = np.argsort(first_S, kind="stable")
    sorted_S = first_S[order_S]
    occurrence_S = np.empty(len(first_S), np.int64)
    occurrence_S[order_S] = np.arange(len(first_S)) - np.searchsorted(sorted_S, sorted_S)
    columns = [np.arange(len(first_S))]
    for other in keys[1:]:
        theirs = as_keys(other)
        order = np.argsort(theirs, kind="stable")
        rank_S = np.searchsorted(theirs[order], first_S) + occurrence_S
        is_there_S = rank_S < np.searchsorted(theirs[order], first_S, side="right")
        column_S = np.full(len(first_S), ABSENT, np.int64)
        column_S[is_there_S] = order[rank_S[is_there_S]]
        columns.append(column_S)
    return np.stack(columns, axis=-1).astype(np.int64)


def shared_sequences(
    keys: Sequence[NDArray[np.uint8]], names: Sequence[str], *, skip_missing: bool
) -> tuple[NDArray[np.int64], int]:
    """(S, C) indexes of the sequences that all caches have, in the first one's order; and how many are not in all.

    Raises:
        InputError: some are not, and are not to be skipped; or none are.
    """
    indexes_SC = match_keys(keys)
    in_all_S = (indexes_SC != ABSENT).all(axis=-1)
    num_shared = int(in_all_S.sum())
    num_missing = sum(len(cache) - num_shared for cache in keys)
    if not num_shared:
        raise InputError(
            f"mix: no sequence is in all of {', '.join(map(repr, names))}: captures of other texts, or other masks"
        )
    if num_missing and not skip_missing:
        sizes = ", ".join(f"{name!r} {len(cache):,}" for name, cache in zip(names, keys, strict=True))
        raise InputError(
            f"mix: {num_shared:,} sequences are in all of the caches, which hold {sizes}; --missing skip leaves the others out"
        )
    return indexes_SC[in_all_S], num_missing
