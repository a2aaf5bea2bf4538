"""The codec protocol: Distributions <-> Arrow columns, pure functions of arrays, one codec per file.

Contract (tests/contracts/codec.py runs it for every codec):

- `decode(encode(d))` gives `d` back: ids, offsets and their order exactly; each number within `max_error_nats`.
- `encode` is deterministic: equal distributions and parameters give equal bytes.
- `decode` of hostile columns raises CorruptCacheError: it never crashes, never allocates more than its arguments imply,
  never returns ids outside the vocabulary.
- The id and the parameters (JSON scalars) are all that a reader needs; both are in the shard's metadata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.format.record import Distributions

ColumnValues = Mapping[str, NDArray[Any]]
"""One sequence's values of the codec's columns: list columns as typed arrays, binary columns as uint8 arrays."""


class Codec(Protocol):
    """See the module's docstring for the contract."""

    codec_id: ClassVar[str]

    def params(self) -> dict[str, Any]:
        """JSON scalars that, with the id, rebuild this codec."""
        ...

    def fields(self) -> list[pa.Field]:
        """The codec's columns, in order."""
        ...

    def encode(self, sequences: Sequence[Distributions]) -> list[pa.Array]:
        """One array per field, one value per sequence."""
        ...

    def decode(self, columns: ColumnValues, offsets_P1: NDArray[np.int64]) -> Distributions:
        """One sequence back.

        Args:
            columns: its values, by field name; views of a memory map: not to be written.
            offsets_P1: (P+1,) where each position's entries start, from the record's `num_entries`.

        Raises:
            CorruptCacheError: lengths that do not fit offsets_P1, or ids outside the vocabulary.
        """
        ...

    def max_error_nats(self, logprob: float) -> float:
        """Bound on |decoded - stored| for a logprob of this size; 0.0 for an exact codec."""
        ...
