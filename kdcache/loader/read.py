"""From the sequences of some rows to their batch: the one place where the loader touches records."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError
from kdcache.format.record import SequenceRecord
from kdcache.loader.base import Reader
from kdcache.loader.batch import Batch, BatchLayout, assemble


def read_rows(reader: Reader, rows: Sequence[NDArray[np.int64]], *, seq_len: int) -> Batch:
    """The batch of these rows of sequences.

    Raises:
        CorruptCacheError: a damaged record, or one that is not as long as the index says.
    """
    records = [_read(reader, int(i)) for row in rows for i in row]
    layout = BatchLayout(tuple(len(row) for row in rows), seq_len, _num_columns(reader))
    return assemble(records, layout)


def _read(reader: Reader, index: int) -> SequenceRecord:
    record = reader[index]
    found, expected = record.sequence.num_tokens, reader.num_tokens_S[index]
    if found != expected:
        raise CorruptCacheError(f"sequence {index}: its record holds {found} tokens, the index says {expected}")
    return record


def _num_columns(reader: Reader) -> int | None:
    """K where the selection fixes it, so that all batches of a cache have the same; else None."""
    selection = reader.manifest.identity.selection
    return int(selection.params["k"]) if selection.kind == "top_k" else None
