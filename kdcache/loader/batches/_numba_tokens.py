"""The arrays of a batch that have a value per token, filled in one compiled call with the GIL released.

`assemble.assemble_reference` is the definition; tests compare.
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

TOKENS = np.dtype(
    [(name, np.int64) for name in ("input_ids", "supervised", "keep", "num_tokens", "row", "column", "segment", "position")]
)
"""One sequence of a batch: the addresses of its int32 ids, of its supervised flags and of the mask's flags for its positions
(bool; 0 for all); its number of tokens; the row, column and segment where it begins; its first index in flat_positions_P."""

SIZES = np.dtype([(name, np.int64) for name in ("num_segments", "max_seqlen", "num_positions", "longest_row")])


def fill_tokens(batch: Batch, tokens: NDArray[np.void], ends_B: NDArray[np.int64]) -> None:
    """Write input_ids, position_ids, segment_ids and target_ids, all of each, and flat_positions_P.

    Args:
        batch: to be written.
        tokens: of TOKENS, one for each sequence.
        ends_B: int64, the column after the last sequence of each row.
    """
    arrays_BT = batch.input_ids_BT, batch.position_ids_BT, batch.segment_ids_BT, batch.target_ids_BT
    _fill_tokens(tokens, ends_B, *arrays_BT, batch.flat_positions_P)


@dataclass(frozen=True, slots=True, eq=False)
class TokenLayout:
    """Which slots of a batch its sequences take, one after another in each row.

    Attributes:
        tokens, ends_B: for `fill_tokens`, with 0 for the addresses.
        cu_seqlens_G1, max_seqlen: as in Batch, if no row is longer than T.
        num_positions: P.
        longest_row: the largest of ends_B.
    """

    tokens: NDArray[np.void]
    ends_B: NDArray[np.int64]
    cu_seqlens_G1: NDArray[np.int32]
    max_seqlen: int
    num_positions: int
    longest_row: int


def lay_out(
    num_tokens_S: NDArray[np.int64], num_positions_S: NDArray[np.int64], sequences_B: Sequence[int], seq_len: int
) -> TokenLayout:
    """Lay sequences out in rows.

    Args:
        num_tokens_S, num_positions_S: of each sequence; int64.
        sequences_B: how many of them each row takes.
        seq_len: T. The caller refuses a row that is longer, see `longest_row`.
    """
    tokens, ends_B = np.zeros(len(num_tokens_S), TOKENS), np.empty(len(sequences_B), np.int64)
    tokens["num_tokens"] = num_tokens_S
    starts, found = np.zeros(len(num_tokens_S) + len(sequences_B) + 1, np.int32), np.zeros(1, SIZES)
    _lay_out(num_positions_S, np.array(sequences_B, np.int64), seq_len, (tokens, ends_B, starts), found)
    num_segments, *sizes = found[0].item()
    return TokenLayout(tokens, ends_B, starts[: num_segments + 1], *sizes)


_TOKENS, _IDS_BT = numba.from_dtype(TOKENS)[::1], numba.int32[:, ::1]
_OUT = types.Tuple((_TOKENS, numba.int64[::1], numba.int32[::1]))


@compiled(numba.void(numba.int64[::1], numba.int64[::1], numba.int64, _OUT, numba.from_dtype(SIZES)[::1]))
def _lay_out(num_positions, sequences, seq_len, out, sizes):
    tokens, ends, starts = out
    s, position, num_segments, longest, longest_row = 0, 0, 0, 0, 0
    for b in range(sequences.shape[0]):
        column = 0
        for segment in range(sequences[b]):
            own = tokens[s]
            own.row, own.column, own.segment, own.position = b, column, segment + 1, position
            column += own.num_tokens
            position += num_positions[s]
            num_segments += 1
            starts[num_segments] = np.int32(b * seq_len + column)
            longest = max(longest, own.num_tokens)
            s += 1
        ends[b] = column
        longest_row = max(longest_row, column)
        if column < seq_len:
            num_segments += 1
            starts[num_segments] = np.int32((b + 1) * seq_len)
            longest = max(longest, seq_len - column)
    found = sizes[0]
    found.num_segments, found.max_seqlen, found.num_positions, found.longest_row = num_segments, longest, position, longest_row


@compiled(numba.void(_TOKENS, numba.int64[::1], _IDS_BT, _IDS_BT, _IDS_BT, _IDS_BT, numba.int64[::1]))
def _fill_tokens(tokens, ends, input_ids, position_ids, segment_ids, target_ids, flat_positions):
    seq_len = input_ids.shape[1]
    for s in range(tokens.shape[0]):
        own = tokens[s]
        num_tokens, b, start, position = own.num_tokens, own.row, own.column, own.position
        ids = numba.carray(pointer(own.input_ids), (num_tokens,), np.int32)
        supervised = numba.carray(pointer(own.supervised), (num_tokens,), np.uint8)
        keep = numba.carray(pointer(own.keep), (num_tokens,), np.uint8)
        is_all, p = own.keep == 0, 0
        stop = start + num_tokens
        input_ids[b, start:stop] = ids
        segment_ids[b, start:stop] = own.segment
        for t in range(num_tokens):
            position_ids[b, start + t] = t
            target_ids[b, start + t] = NO_TARGET
            if supervised[t]:
                if is_all or keep[p]:
                    flat_positions[position] = b * seq_len + start + t
                    position += 1
                    # The token after the last position is another sequence's.
                    if t + 1 < num_tokens:
                        target_ids[b, start + t] = ids[t + 1]
                p += 1
    for b in range(ends.shape[0]):
        input_ids[b, ends[b] :] = 0
        position_ids[b, ends[b] :] = 0
        segment_ids[b, ends[b] :] = 0
        target_ids[b, ends[b] :] = NO_TARGET
