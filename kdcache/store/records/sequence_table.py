"""Where the values of a record batch's rows lie in memory, as numbers: what a compiled loop reads rows by.

Shape letters: S rows of a record batch, C columns of the digest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.store.records.column_view import ColumnView

NUM_TOKENS, NUM_POSITIONS, ROW_DIGEST, ROW_BYTES = range(4)
"""Places of a row's own numbers, behind two of each column."""
NUM_OF_ROW = 4
_LENGTH_BYTES = 8


def row_table(views: Mapping[str, ColumnView], numbers: Mapping[int, Sequence[int]]) -> NDArray[np.int64] | None:
    """(S, 2 C + 4) int64: of each column in order the address of the row's value and its number of bytes, NULL_BYTES for null;
    then its numbers of tokens and of positions, its digest (the bits of a uint64), and how many bytes that covers.

    The values stay where the views have them. None where one is not aligned, as no writer of ours leaves it.

    Args:
        views: of the columns, in the digest's order.
        numbers: the last four but for the bytes, (S,) each.
    """
    num_rows = len(numbers[NUM_TOKENS])
    table = np.empty((num_rows, 2 * len(views) + NUM_OF_ROW), np.int64)
    for column, view in enumerate(views.values()):
        table[:, 2 * column], table[:, 2 * column + 1] = view.places()
        if (table[:, 2 * column] % view.values.itemsize).any():
            return None
    own = table[:, 2 * len(views) :]
    for place, values in numbers.items():
        own[:, place] = np.asarray(values, np.uint64).view(np.int64)
    own[:, ROW_BYTES] = np.maximum(table[:, 1 : 2 * len(views) : 2], 0).sum(axis=1) + _LENGTH_BYTES * len(views)
    return table
