"""A batch straight from mapped record batches, without an object per record: what `assemble` gives, or nothing.

Nothing is given where records have to be looked at one by one: a mask that chooses positions, hidden states, caches in object
stores, codecs that are not bit streams, and wherever something is wrong. `assemble` is the definition, and says what is wrong.

Shape letters: as in batch.py; R sequences of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.into import EntryFormat, entry_format
from kdcache.format.selection import most_entries
from kdcache.loader.assemble import BatchLayout, blank_batch
from kdcache.loader.batch import Batch
from kdcache.loader.buffers import BufferPool
from kdcache.loader.caches import CacheSet
from kdcache.store.row_table import MappedRows


def read_direct(
    caches: CacheSet, rows: Sequence[NDArray[np.int64]], layout: BatchLayout, pool: BufferPool | None
) -> Batch | None:
    """The batch of these rows of sequences; None where it has to be assembled from records.

    Args:
        caches: that the sequences' numbers are of.
        rows: of each row of the batch the sequences.
        layout: of these rows.
        pool: as for `assemble`.
    """
    numbers_R = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    if not layout.mask.is_all or layout.features or not len(numbers_R):
        return None
    parts = _parts(caches, numbers_R)
    num_columns = None if parts is None else _num_columns(parts, layout)
    if parts is None or num_columns is None:
        return None
    num_tokens_R, num_positions_R = (np.empty(len(numbers_R), np.int64) for _ in range(2))
    for where, mapped, _ in parts:
        num_tokens_R[where], num_positions_R[where] = mapped.num_tokens_R, mapped.num_positions_R
    places_RC, ends_B = _places(num_tokens_R, num_positions_R, np.array(layout.sequences_per_row))
    if (ends_B > layout.seq_len).any():
        return None
    batch = blank_batch(layout, num_tokens_R.tolist(), int(num_positions_R.sum()), num_columns, pool)
    return batch if _filled(batch, parts, places_RC, ends_B) else None


_Part = tuple[NDArray[np.int64], MappedRows, EntryFormat]
"""The sequences of one cache: which of the batch's they are, and how they are read."""


def _parts(caches: CacheSet, numbers_R: NDArray[np.int64]) -> list[_Part] | None:
    parts: list[_Part] = []
    for where, reader, numbers in caches.by_cache(numbers_R):
        mapped_rows = getattr(reader, "mapped_rows", None)
        mapped: MappedRows | None = None if mapped_rows is None else mapped_rows(numbers)
        entries = None if mapped is None else entry_format(mapped.codec)
        if mapped is None or entries is None:
            return None
        parts.append((where, mapped, entries))
    return parts


def _num_columns(parts: Sequence[_Part], layout: BatchLayout) -> int | None:
    """K; None where a row claims more than its cache's selection allows."""
    if layout.columns.num_columns is not None:
        return layout.columns.num_columns
    widest = [(mapped.most_entries(), most_entries(mapped.selection, entries.vocab_size)) for _, mapped, entries in parts]
    return None if any(found > most for found, most in widest) else max(found for found, _ in widest)


def _places(
    num_tokens_R: NDArray[np.int64], num_positions_R: NDArray[np.int64], sequences_B: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(R, 8) for `fill_tokens`, the addresses 0; and (B,) where each row ends."""
    row_R = np.repeat(np.arange(len(sequences_B)), sequences_B)
    before_B = np.cumsum(sequences_B) - sequences_B
    ends_R = np.append(0, np.cumsum(num_tokens_R))
    starts_B = ends_R[before_B]
    places_RC = np.zeros((len(num_tokens_R), 8), np.int64)
    places_RC[:, 3], places_RC[:, 4] = num_tokens_R, row_R
    places_RC[:, 5] = ends_R[:-1] - starts_B[row_R]
    places_RC[:, 6] = np.arange(1, len(row_R) + 1) - before_B[row_R]
    places_RC[:, 7] = np.cumsum(num_positions_R) - num_positions_R
    return places_RC, ends_R[before_B + sequences_B] - starts_B


def _filled(batch: Batch, parts: Sequence[_Part], places_RC: NDArray[np.int64], ends_B: NDArray[np.int64]) -> bool:
    # Imported on use: numba takes 0.4 s.
    from kdcache.loader._numba_rows import UNCHECKED, UNFIT, Places, read_rows
    from kdcache.loader._numba_tokens import fill_tokens

    for where, mapped, entries in parts:
        tokens_RC = places_RC[where]
        status_R = read_rows(mapped, entries, batch, Places(tokens_RC[:, 7], tokens_RC))
        if (status_R == UNFIT).any() or not all(map(mapped.is_whole, np.flatnonzero(status_R == UNCHECKED).tolist())):
            return False
        places_RC[where] = tokens_RC
    fill_tokens(batch, places_RC, ends_B)
    return True
