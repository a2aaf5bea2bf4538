"""Batches of one sequence per row, cut by length: grouped, padded to their longest, bounded in tokens. Pure functions.

Each buffer of the epoch's order is cut by itself. Its sequences come in the order, or with `group_by_length` by rising length.
`batch_rows` at a time they make a group; a batch is one group, or with `max_batch_tokens` as many as fit. Grouped batches are
then shuffled, so that an epoch does not run from short to long; only a buffer's last group may be smaller than `batch_rows`,
only that of the epoch's last buffer is, and its batch stays the last.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.config.loader import LoaderConfig
from kdcache.loader.order.shuffle import Order, derived_seed, sequences_at
from kdcache.loader.rows.packing import Packing, Rows

_BATCHES = 4


def batch_block(
    sequences_S: NDArray[np.int64], lengths_S: NDArray[np.int64], config: LoaderConfig, *, epoch: int, block: int
) -> Rows:
    """The rows of one block of the epoch, one sequence each, and its batches.

    Args:
        sequences_S: (S,) the sequences at the block's ranks of the order.
        lengths_S: (S,) their tokens, each in [1, seq_len].
        config: of the loader.
        epoch, block: key the shuffle of grouped batches.
    """
    width = Packing.of(config).buffer
    rows: list[NDArray[np.int64]] = []
    sizes: list[int] = []
    for buffer, start in enumerate(range(0, len(sequences_S), width)):
        batches = buffer_batches(lengths_S[start : start + width], config)
        if config.group_by_length and config.shuffle:
            batches = _shuffled(batches, config, epoch, (block << 16) + buffer)
        rows += [start + batch for batch in batches]
        sizes += [len(batch) for batch in batches]
    picked_S = np.concatenate([*rows, np.zeros(0, np.int64)])
    return Rows(sequences_S[picked_S], np.arange(len(picked_S) + 1), np.append(0, np.cumsum(sizes, dtype=np.int64)))


def buffer_batches(lengths_S: NDArray[np.int64], config: LoaderConfig) -> list[NDArray[np.int64]]:
    """The batches of one buffer before they are shuffled, each the ranks of its sequences within the buffer."""
    picked_S = np.argsort(lengths_S, kind="stable") if config.group_by_length else np.arange(len(lengths_S))
    groups = [picked_S[i : i + config.batch_rows] for i in range(0, len(picked_S), config.batch_rows)]
    batches: list[list[NDArray[np.int64]]] = []
    longest = 0
    for group in groups:
        longest = max(longest, int(lengths_S[group].max()))
        num_rows = (len(batches[-1]) + 1 if batches else 1) * config.batch_rows
        if (
            batches
            and config.max_batch_tokens is not None
            and num_rows * row_length(longest, config) <= config.max_batch_tokens
        ):
            batches[-1].append(group)
        else:
            batches.append([group])
            longest = int(lengths_S[group].max())
    return [np.concatenate(batch) for batch in batches]


def row_length(longest: int, config: LoaderConfig) -> int:
    """T of a batch whose longest sequence, over all ranks, has this many tokens."""
    if config.pad_to == "seq_len":
        return config.seq_len
    return min(config.seq_len, -(-longest // config.pad_multiple) * config.pad_multiple)


def _shuffled(batches: list[NDArray[np.int64]], config: LoaderConfig, epoch: int, key: int) -> list[NDArray[np.int64]]:
    """The batches in another order; one whose rows are not a multiple of batch_rows stays where it is, at the end."""
    num_whole = len(batches) - (len(batches[-1]) % config.batch_rows > 0)
    order = sequences_at(Order(num_whole, derived_seed(config.seed, _BATCHES, key), epoch), 0, num_whole)
    return [batches[i] for i in order] + batches[num_whole:]
