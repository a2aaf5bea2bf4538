"""From the sequences of some rows to their batch: the one place where the loader touches records."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.config.loader import MaskConfig
from kdcache.errors import CorruptCacheError
from kdcache.loader.batches.assemble import BatchLayout, Record, assemble
from kdcache.loader.batches.batch import Batch
from kdcache.loader.batches.buffers import BufferPool
from kdcache.loader.caches import CacheSet
from kdcache.loader.direct import read_direct
from kdcache.store.records.batch import EncodedRecord


def read_rows(
    caches: CacheSet, rows: Sequence[NDArray[np.int64]], seq_len: int, mask: MaskConfig, pool: BufferPool | None = None
) -> Batch:
    """The batch of these rows of sequences.

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
    direct = read_direct(caches, rows, layout, pool)
    if direct is not None:
        return direct
    return assemble([_read(caches, int(i)) for row in rows for i in row], layout, pool)


def _read(caches: CacheSet, number: int) -> Record:
    record = caches.record(number)
    if not isinstance(record, EncodedRecord):  # a CacheReader has compared it with its index
        reader, place = caches.locate(number)
        found, expected = record.sequence.num_tokens, reader.num_tokens_S[place]
        if found != expected:
            raise CorruptCacheError(f"sequence {place}: its record holds {found} tokens, the index says {expected}")
    return record
