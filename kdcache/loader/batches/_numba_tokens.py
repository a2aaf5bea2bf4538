"""The arrays of a batch that have a value per token, filled in one compiled call, GIL released.

`assemble.assemble_reference` is the definition; tests compare.

Shape letters: as in batch.py; N tokens of a sequence, R sequences of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from kdcache.compiled import compiled, pointer
from kdcache.loader.batches.batch import NO_TARGET, Batch

_IDS_BT, _TABLE = numba.int32[:, ::1], numba.int64[:, ::1]


def fill_tokens(batch: Batch, table_RC: NDArray[np.int64], ends_B: NDArray[np.int64]) -> None:
    """Write input_ids, position_ids, segment_ids and target_ids, all of each, and flat_positions_P.

    Args:
        batch: to be written.
        table_RC: (R, 8) int64, for each sequence: addresses of its (N,) int32 ids, its (N,) bool supervised flags and its (P,)
            bool flags of what the mask keeps, 0 for all; N; its row b, first column and segment; its first index in
            flat_positions_P.
        ends_B: (B,) int64, the column behind the last sequence of each row.
    """
    arrays_BT = batch.input_ids_BT, batch.position_ids_BT, batch.segment_ids_BT, batch.target_ids_BT
    _fill_tokens(table_RC.reshape(-1, 8), ends_B, *arrays_BT, batch.flat_positions_P)


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where sequences go that fill rows one behind the other.

    Attributes:
        table_RC, ends_B: for `fill_tokens`, the addresses 0.
        cu_seqlens_G1, max_seqlen: as in Batch, if no row passes T.
        num_positions: P.
        longest_row: the largest of ends_B.
    """

    table_RC: NDArray[np.int64]
    ends_B: NDArray[np.int64]
    cu_seqlens_G1: NDArray[np.int32]
    max_seqlen: int
    num_positions: int
    longest_row: int


def place_sequences(counts_R2: NDArray[np.int64], sequences_B: Sequence[int], seq_len: int) -> Placement:
    """Place R sequences.

    Args:
        counts_R2: (R, 2) int64, tokens and positions of each.
        sequences_B: how many of them each of the B rows takes.
        seq_len: T. What passes it is for the caller to see.
    """
    table_RC, ends_B = np.zeros((len(counts_R2), 8), np.int64), np.empty(len(sequences_B), np.int64)
    starts, found = np.zeros(len(counts_R2) + len(sequences_B) + 1, np.int32), np.zeros(4, np.int64)
    _place_sequences(counts_R2, np.array(sequences_B, np.int64), seq_len, (table_RC, ends_B, starts), found)
    num_segments, *numbers = found.tolist()
    return Placement(table_RC, ends_B, starts[: num_segments + 1], *numbers)


_PLACES = types.Tuple((_TABLE, numba.int64[::1], numba.int32[::1]))


@compiled(numba.void(_TABLE, numba.int64[::1], numba.int64, _PLACES, numba.int64[::1]))
def _place_sequences(counts, sequences, seq_len, places, found):
    table, ends, starts = places
    r, position, segments, longest, longest_row = 0, 0, 0, 0, 0
    for b in range(sequences.shape[0]):
        column = 0
        for segment in range(sequences[b]):
            table[r, 3], table[r, 4], table[r, 5], table[r, 6], table[r, 7] = counts[r, 0], b, column, segment + 1, position
            column += counts[r, 0]
            position += counts[r, 1]
            segments += 1
            starts[segments] = np.int32(b * seq_len + column)
            longest = max(longest, counts[r, 0])
            r += 1
        ends[b] = column
        longest_row = max(longest_row, column)
        if column < seq_len:
            segments += 1
            starts[segments] = np.int32((b + 1) * seq_len)
            longest = max(longest, seq_len - column)
    found[0], found[1], found[2], found[3] = segments, longest, position, longest_row


@compiled(numba.void(numba.int64[:, ::1], numba.int64[::1], _IDS_BT, _IDS_BT, _IDS_BT, _IDS_BT, numba.int64[::1]))
def _fill_tokens(table, ends, input_ids, position_ids, segment_ids, labels, rows):
    seq_len = input_ids.shape[1]
    for r in range(table.shape[0]):
        num_tokens, b, start, segment, position = table[r, 3], table[r, 4], table[r, 5], table[r, 6], table[r, 7]
        ids = numba.carray(pointer(table[r, 0]), (num_tokens,), np.int32)
        supervised = numba.carray(pointer(table[r, 1]), (num_tokens,), np.uint8)
        keep = numba.carray(pointer(table[r, 2]), (num_tokens,), np.uint8)
        is_all, p = table[r, 2] == 0, 0
        stop = start + num_tokens
        input_ids[b, start:stop] = ids
        segment_ids[b, start:stop] = segment
        for t in range(num_tokens):
            position_ids[b, start + t] = t
            labels[b, start + t] = NO_TARGET
            if supervised[t]:
                if is_all or keep[p]:
                    rows[position] = b * seq_len + start + t
                    position += 1
                    # The token behind the last position is another sequence's.
                    if t + 1 < num_tokens:
                        labels[b, start + t] = ids[t + 1]
                p += 1
    for b in range(ends.shape[0]):
        input_ids[b, ends[b] :] = 0
        position_ids[b, ends[b] :] = 0
        segment_ids[b, ends[b] :] = 0
        labels[b, ends[b] :] = NO_TARGET
