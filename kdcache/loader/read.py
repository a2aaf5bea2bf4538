"""From the sequences of some rows to their batch: the one file in which the loader touches records.

A batch is read in one of two ways. Where all its sequences can be mapped, one compiled call per cache checks and decodes them,
without an object per record. Otherwise, and wherever that call finds something wrong, the batch is assembled from records:
`assemble` is the definition, and says what is wrong. Records are needed for a mask that chooses positions, hidden states,
roles, caches in object stores, and codecs without an `entry_format`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kdcache.config.loader import MaskConfig
from kdcache.format.selection import most_entries
from kdcache.loader.batches.assemble import BatchLayout, assemble, blank_batch
from kdcache.loader.batches.batch import Batch
from kdcache.loader.batches.buffers import BufferPool
from kdcache.loader.caches import CacheSet
from kdcache.loader.order.pairs import pairs_in
from kdcache.store.records.mapped import MappedSequences

Part = tuple[NDArray[np.int64] | slice, MappedSequences]
"""The sequences of one cache: which of the batch's they are, and how they are read."""


def read_rows(
    caches: CacheSet, rows: Sequence[NDArray[np.int64]], seq_len: int, mask: MaskConfig, pool: BufferPool | None = None
) -> Batch:
    """The batch of these rows of sequences.

    Args:
        caches: that the sequences are of.
        rows: for each row of the batch, the indices of its sequences.
        seq_len: T.
        mask: which positions are trained on.
        pool: gives the memory of the two large arrays; None for fresh memory.

    Raises:
        CorruptCacheError: a damaged record, or one that is not as long as the index says.
    """
    layout = BatchLayout(
        tuple(len(row) for row in rows),
        seq_len,
        caches.columns,
        mask,
        caches.features,
        caches.logprob_dtype,
        caches.with_roles,
    )
    domains = None
    batch = None if caches.with_domains else read_mapped(caches, rows, layout, pool)
    if batch is None:
        records = [caches.record(int(i)) for row in rows for i in row]
        batch = assemble(records, layout, pool)
        domains = tuple(record.sequence.domain for record in records) if caches.with_domains else None
    indices = np.concatenate(rows).astype(np.int64, copy=False) if rows else np.zeros(0, np.int64)
    pairs = None if caches.partners_S is None else pairs_in(indices, caches.partners_S)
    return replace(batch, sequence_indices_S=indices, pairs=pairs, domains=domains)


def read_mapped(
    caches: CacheSet, rows: Sequence[NDArray[np.int64]], layout: BatchLayout, pool: BufferPool | None
) -> Batch | None:
    """The same by compiled calls; None where the batch has to be assembled from records."""
    indices = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    needs_records = layout.features or layout.with_roles or layout.columns.has_target_logprobs
    if not layout.mask.is_all or needs_records or not len(indices):
        return None
    parts = _parts(caches, indices)
    num_columns = None if parts is None else _num_columns(parts, layout)
    if parts is None or num_columns is None:
        return None
    # Imported on use: numba takes 0.4 s.
    from kdcache.loader.batches._numba_tokens import fill_tokens, lay_out

    counts = np.empty((2, len(indices)), np.int64)
    for which, mapped in parts:
        counts[0, which], counts[1, which] = mapped.table["num_tokens"], mapped.table["num_positions"]
    laid_out = lay_out(counts[0], counts[1], layout.sequences_per_row, layout.seq_len)
    if laid_out.longest_row > layout.seq_len:
        return None
    sizes = len(indices), laid_out.num_positions, num_columns
    batch = blank_batch(layout, (laid_out.cu_seqlens_G1, laid_out.max_seqlen), sizes, pool)
    if not all(_is_filled(batch, part, laid_out.tokens) for part in parts):
        return None
    fill_tokens(batch, laid_out.tokens, laid_out.ends_B)
    return batch


def _parts(caches: CacheSet, indices: NDArray[np.int64]) -> list[Part] | None:
    parts: list[Part] = []
    for which, reader, own in caches.by_reader(indices):
        mapped = reader.mapped(own)
        if mapped is None:
            return None
        parts.append((which, mapped))
    return parts


def _num_columns(parts: Sequence[Part], layout: BatchLayout) -> int | None:
    """K; None where a sequence claims more than its cache's selection allows."""
    if layout.columns.num_columns is not None:
        return layout.columns.num_columns
    widest = [
        (mapped.most_entries(), most_entries(mapped.format.selection, mapped.format.entries.vocab_size)) for _, mapped in parts
    ]
    return None if any(found > most for found, most in widest) else max(found for found, _ in widest)


def _is_filled(batch: Batch, part: Part, tokens: NDArray[np.void]) -> bool:
    """Whether all sequences of a cache are whole, and now in the batch except for their tokens."""
    from kdcache.loader.batches._numba_entries import UNCHECKED, WHOLE, read_entries

    which, mapped = part
    own = tokens[which]
    status = read_entries(mapped, batch, own)
    if not isinstance(which, slice):
        tokens[which] = own
    others = np.flatnonzero(status != WHOLE).tolist()
    return all(status[s] == UNCHECKED and mapped.is_whole(s) for s in others)
