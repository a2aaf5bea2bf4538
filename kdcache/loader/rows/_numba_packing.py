"""First fit in a compiled loop, GIL released; `packing.first_fit_reference` defines it.

Shape letters: M sequences of a block, W places of a window.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from kdcache.compiled import compiled

_LENGTHS = numba.types.Array(numba.int64, 1, "C", readonly=True)


def first_fit(lengths_M: NDArray[np.int64], seq_len: int, window: int) -> NDArray[np.int64]:
    """First fit of windows one after another, each with rows of its own.

    Args:
        lengths_M: (M,) tokens, in [1, seq_len].
        seq_len: room in a row.
        window: W; the last window may be shorter.

    Returns:
        (M,) int64, the row that each sequence goes to; rows are numbered through all windows.
    """
    rows_M = np.empty(len(lengths_M), np.int64)
    _first_fit(np.ascontiguousarray(lengths_M), seq_len, window, np.empty(min(window, len(lengths_M)), np.int64), rows_M)
    return rows_M


@compiled(numba.void(_LENGTHS, numba.int64, numba.int64, numba.int64[::1], numba.int64[::1]))
def _first_fit(lengths, seq_len, window, room, rows):
    first_row = 0
    for start in range(0, lengths.shape[0], window):
        num_open = 0
        for i in range(start, min(start + window, lengths.shape[0])):
            row = 0
            while row < num_open and room[row] < lengths[i]:
                row += 1
            if row == num_open:
                room[row] = seq_len
                num_open += 1
            room[row] -= lengths[i]
            rows[i] = first_row + row
        first_row += num_open
