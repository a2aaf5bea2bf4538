"""First fit in a compiled loop, GIL released; `packing.first_fit_reference` defines it."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from kdcache.compiled import compiled

_LENGTHS = numba.types.Array(numba.int64, 1, "C", readonly=True)


def first_fit(lengths_S: NDArray[np.int64], seq_len: int, buffer: int) -> NDArray[np.int64]:
    """First fit of buffers one after another, each with rows of its own.

    Args:
        lengths_S: (S,) tokens, in [1, seq_len].
        seq_len: room in a row.
        buffer: W; the last buffer may be shorter.

    Returns:
        (S,) int64, the row that each sequence goes to; rows are numbered through all buffers.
    """
    rows_S = np.empty(len(lengths_S), np.int64)
    _first_fit(np.ascontiguousarray(lengths_S), seq_len, buffer, np.empty(min(buffer, len(lengths_S)), np.int64), rows_S)
    return rows_S


@compiled(numba.void(_LENGTHS, numba.int64, numba.int64, numba.int64[::1], numba.int64[::1]))
def _first_fit(lengths, seq_len, buffer, room, rows):
    first_row = 0
    for start in range(0, lengths.shape[0], buffer):
        num_open = 0
        for i in range(start, min(start + buffer, lengths.shape[0])):
            row = 0
            while row < num_open and room[row] < lengths[i]:
                row += 1
            if row == num_open:
                room[row] = seq_len
                num_open += 1
            room[row] -= lengths[i]
            rows[i] = first_row + row
        first_row += num_open
