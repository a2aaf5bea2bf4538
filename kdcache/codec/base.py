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

from kdcache.errors import CorruptCacheError
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

    def max_error_nats(self, logprobs: NDArray[np.floating]) -> NDArray[np.float64]:
        """Elementwise bound on |decoded - stored| for logprobs (or log tail masses) of this size; zeros for an exact codec."""
        ...


def list_array(arrays: Sequence[NDArray[Any]], value_type: pa.DataType) -> pa.Array:
    """An Arrow list column with one list per array."""
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    values = np.concatenate([*arrays, np.zeros(0, value_type.to_pandas_dtype())], dtype=value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, value_type))


def checked_column(columns: ColumnValues, name: str, dtype: Any, length: int) -> NDArray[Any]:
    """A column's values, if they are of this type and number.

    Raises:
        CorruptCacheError: they are not.
    """
    values = columns[name]
    if values.dtype != np.dtype(dtype) or len(values) != length:
        raise CorruptCacheError(
            f"column {name!r} holds {len(values)} values of {values.dtype}, expected {length} of {np.dtype(dtype)}"
        )
    return values
