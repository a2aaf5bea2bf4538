"""What every row of a record batch is checked for, over all rows at once: reading a row is then slices.

It only says whether all rows pass. Where one does not, each is checked when it is read, so that the message is of the row
concerned and the others can be read.

Shape letters: S sequences of a record batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.archive.model import MOST_ENTRIES_PER_BYTE
from kdcache.format.record import FINISHES, ROLES
from kdcache.format.record_checks import ids_fit
from kdcache.format.schema import FINISH_FIELD
from kdcache.store.records.column_view import ColumnView


def num_positions(supervised: ColumnView) -> NDArray[np.int64]:
    """(S,) how many positions of each row are supervised."""
    sums = np.append(0, np.cumsum(supervised.values, dtype=np.int64))
    return sums[supervised.offsets_S1[1:]] - sums[supervised.offsets_S1[:-1]]


def all_sound(views: Mapping[str, ColumnView], num_positions_S: NDArray[np.int64], vocab_size: int, fixed: int | None) -> bool:
    """Whether `rows._sequence` and `rows._entry_offsets` accept every row. May say no of rows that they accept.

    Args:
        views: of the columns.
        num_positions_S: as above.
        vocab_size: of the shard.
        fixed: entries of every position by the selection, or None.
    """
    num_tokens_S = views["input_ids"].lengths_S
    finish = views[FINISH_FIELD.name].values if FINISH_FIELD.name in views else np.zeros(0, np.uint8)
    return bool(
        (num_tokens_S > 0).all()
        and (views["supervised"].lengths_S == num_tokens_S).all()
        and _null_or(views["roles"], num_tokens_S)
        and ids_fit(views["input_ids"].values, vocab_size)
        and views["roles"].values.max(initial=0) < len(ROLES)
        and finish.max(initial=0) < len(FINISHES)
        and _turns_rise(views["turn_starts"], num_tokens_S)
        and _null_or(views["num_entries"], num_positions_S)
        and (fixed is not None or views["num_entries"].valid_S is None)
        and (fixed is None or views["num_entries"].values.max(initial=0) <= fixed)
    )


def entries_fit(
    views: Mapping[str, ColumnView],
    codec_names: Sequence[str],
    num_positions_S: NDArray[np.int64],
    most: tuple[int | None, int],
) -> NDArray[np.bool_]:
    """(S,) whether each row's bytes can hold the entries that it claims: no array is made for more.

    Args:
        views: of the columns.
        codec_names: the columns that hold entries.
        num_positions_S: as above.
        most: entries of every position by the selection, or None; and the ids that there are.
    """
    fixed, vocab_size = most
    view = views["num_entries"]
    sums = np.append(0, np.cumsum(view.values, dtype=np.int64))
    num_entries_S = sums[view.offsets_S1[1:]] - sums[view.offsets_S1[:-1]]
    fits_S = np.ones(len(num_positions_S), np.bool_)
    if fixed is not None and view.valid_S is not None:
        # As float64: k x positions may leave int64.
        num_entries_S = np.where(view.valid_S, num_entries_S, num_positions_S * float(fixed))
        fits_S = view.valid_S | (fixed <= vocab_size) | (num_positions_S == 0)
    num_bytes_S = np.zeros(len(num_positions_S), np.int64)
    for name in codec_names:
        num_bytes_S += np.asarray(views[name].lengths_S, np.int64) * views[name].values.itemsize
    return fits_S & (num_entries_S <= MOST_ENTRIES_PER_BYTE * num_bytes_S)


def _null_or(view: ColumnView, lengths_S: NDArray[Any]) -> bool:
    fits_S = view.lengths_S == lengths_S
    return bool((fits_S if view.valid_S is None else fits_S | ~view.valid_S).all())


def _turns_rise(view: ColumnView, num_tokens_S: NDArray[Any]) -> bool:
    starts, row_of = (
        view.values[view.offsets_S1[0] : view.offsets_S1[-1]],
        np.repeat(np.arange(len(num_tokens_S)), view.lengths_S),
    )
    falls = (np.diff(starts) < 0) & (np.diff(row_of) == 0)
    return bool((starts >= 0).all() and (starts < num_tokens_S[row_of]).all() and not falls.any())
