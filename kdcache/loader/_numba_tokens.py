"""The arrays of a batch that have a value per token, filled in one compiled call, GIL released.

`assemble.assemble_reference` is the definition; tests compare.

Shape letters: as in batch.py; N tokens of a sequence, R sequences of the batch.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from kdcache.codec._numba_compile import compiled
from kdcache.loader.batch import IGNORED_LABEL, Batch


def fill_tokens(batch: Batch, table_RC: NDArray[np.int64], ends_B: NDArray[np.int64]) -> None:
    """Write input_ids, position_ids, segment_ids and labels, all of each, and rows_P.

    Args:
        batch: to be written.
        table_RC: (R, 8) int64, for each sequence: addresses of its (N,) int32 ids, its (N,) bool supervised flags and its (P,)
            bool flags of what the mask keeps, 0 for all; N; its row b, first column and segment; its first place in rows_P.
        ends_B: (B,) int64, the column behind the last sequence of each row.
    """
    arrays_BT = batch.input_ids_BT, batch.position_ids_BT, batch.segment_ids_BT, batch.labels_BT
    _fill_tokens(table_RC.reshape(-1, 8), ends_B, *arrays_BT, batch.rows_P)


@intrinsic
def _pointer(typing_context, address):  # noqa: ARG001 - numba's calling convention
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), generate


_IDS_BT = numba.int32[:, ::1]


@compiled(numba.void(numba.int64[:, ::1], numba.int64[::1], _IDS_BT, _IDS_BT, _IDS_BT, _IDS_BT, numba.int64[::1]))
def _fill_tokens(table, ends, input_ids, position_ids, segment_ids, labels, rows):
    seq_len = input_ids.shape[1]
    for r in range(table.shape[0]):
        num_tokens, b, start, segment, position = table[r, 3], table[r, 4], table[r, 5], table[r, 6], table[r, 7]
        ids = numba.carray(_pointer(table[r, 0]), (num_tokens,), np.int32)
        supervised = numba.carray(_pointer(table[r, 1]), (num_tokens,), np.uint8)
        keep = numba.carray(_pointer(table[r, 2]), (num_tokens,), np.uint8)
        is_all, p = table[r, 2] == 0, 0
        stop = start + num_tokens
        input_ids[b, start:stop] = ids
        segment_ids[b, start:stop] = segment
        for t in range(num_tokens):
            position_ids[b, start + t] = t
            labels[b, start + t] = IGNORED_LABEL
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
        labels[b, ends[b] :] = IGNORED_LABEL
