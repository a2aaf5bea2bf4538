"""Where the values of a record batch's sequences lie in memory, for a compiled loop that reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.store.records.column_view import ColumnView

VALUE = np.dtype([("address", np.int64), ("num_bytes", np.int64)])
"""One column's value of a sequence; NULL_BYTES for null."""

ABOUT_SEQUENCE = np.dtype(
    [("num_tokens", np.int64), ("num_positions", np.int64), ("digest", np.uint64), ("digested_bytes", np.int64)]
)
"""What a line of the table says of its sequence: what the record batch claims, and how many bytes the digest covers."""

_LENGTH_BYTES = 8


def line_type(num_columns: int) -> np.dtype[Any]:
    """A line of the table: ABOUT_SEQUENCE, then a VALUE for each column."""
    return np.dtype([("about", ABOUT_SEQUENCE), ("values", VALUE, (num_columns,))])


def sequence_table(
    views: Mapping[str, ColumnView], num_tokens_S: Sequence[int], num_positions_S: Sequence[int], digests_S: Sequence[int]
) -> NDArray[np.void] | None:
    """Make the table of a record batch: (S,) of `line_type`, a line per sequence; columns in the digest's order.

    The values stay where the views have them. None where one is not aligned, which no writer of ours leaves.
    """
    table = np.empty(len(num_tokens_S), line_type(len(views)))
    about, values = table["about"], table["values"]
    for column, view in enumerate(views.values()):
        values["address"][:, column], values["num_bytes"][:, column] = view.addresses()
        if (values["address"][:, column] % view.values.itemsize).any():
            return None
    about["num_tokens"], about["num_positions"], about["digest"] = num_tokens_S, num_positions_S, digests_S
    about["digested_bytes"] = np.maximum(values["num_bytes"], 0).sum(axis=1) + _LENGTH_BYTES * len(views)
    return table
