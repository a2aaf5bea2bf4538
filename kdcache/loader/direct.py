"""A batch straight from mapped record batches, without an object per record: what `assemble` gives, or nothing.

Nothing is given where records have to be looked at one by one: a mask that chooses positions, hidden states, roles, caches in
object stores, codecs that are not bit streams, and wherever something is wrong. `assemble` is the definition, and says what is
wrong.

Shape letters: as in batch.py; R sequences of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.base import EntryFormat
from kdcache.format.selection import most_entries
from kdcache.loader.batches.assemble import BatchLayout, blank_batch
from kdcache.loader.batches.batch import Batch
from kdcache.loader.batches.buffers import BufferPool
from kdcache.loader.caches import CacheSet
from kdcache.store.records.mapped import MappedRows, RowFormat


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
    # Imported on use: numba takes 0.4 s.
    from kdcache.loader.batches._numba_tokens import fill_tokens, place_sequences

    numbers_R = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    if not layout.mask.is_all or layout.features or layout.with_roles or not len(numbers_R):
        return None
    parts = _parts(caches, numbers_R)
    num_columns = None if parts is None else _num_columns(parts, layout)
    if parts is None or num_columns is None:
        return None
    counts_R2 = np.empty((len(numbers_R), 2), np.int64)
    for where, mapped, _ in parts:
        counts_R2[where] = mapped.places_RJ[:, 2:]
    placed = place_sequences(counts_R2, layout.sequences_per_row, layout.seq_len)
    if placed.longest_row > layout.seq_len:
        return None
    sizes = len(numbers_R), placed.num_positions, num_columns
    batch = blank_batch(layout, (placed.cu_seqlens_G1, placed.max_seqlen), sizes, pool)
    if not all(_is_filled(batch, part, placed.table_RC) for part in parts):
        return None
    fill_tokens(batch, placed.table_RC, placed.ends_B)
    return batch


_Part = tuple[NDArray[np.int64] | slice, MappedRows, EntryFormat]
"""The sequences of one cache: which of the batch's they are, and how they are read."""


def _parts(caches: CacheSet, numbers_R: NDArray[np.int64]) -> list[_Part] | None:
    parts: list[_Part] = []
    for where, reader, numbers in caches.by_cache(numbers_R):
        mapped_rows = getattr(reader, "mapped_rows", None)
        mapped: MappedRows | None = None if mapped_rows is None else mapped_rows(numbers)
        entries = None if mapped is None else _entries(mapped.format)
        if mapped is None or entries is None:
            return None
        parts.append((where, mapped, entries))
    return parts


@lru_cache(maxsize=64)
def _entries(rows: RowFormat) -> EntryFormat | None:
    return rows.codec.entry_format()


def _num_columns(parts: Sequence[_Part], layout: BatchLayout) -> int | None:
    """K; None where a row claims more than its cache's selection allows."""
    if layout.columns.num_columns is not None:
        return layout.columns.num_columns
    widest = [
        (mapped.most_entries(), most_entries(mapped.format.selection, entries.vocab_size)) for _, mapped, entries in parts
    ]
    return None if any(found > most for found, most in widest) else max(found for found, _ in widest)


def _is_filled(batch: Batch, part: _Part, tokens_RC: NDArray[np.int64]) -> bool:
    """Whether all rows of a cache are whole, and now in the batch but for their tokens."""
    from kdcache.loader.batches._numba_rows import UNCHECKED, WHOLE, read_rows

    where, mapped, entries = part
    part_RC = tokens_RC[where]
    status_R = read_rows(mapped, entries, batch, part_RC)
    if not isinstance(where, slice):
        tokens_RC[where] = part_RC
    others = np.flatnonzero(status_R != WHOLE).tolist()
    return all(status_R[r] == UNCHECKED and mapped.is_whole(r) for r in others)
