"""The codec protocol: Distributions <-> Arrow columns, pure functions of arrays, one codec per file.

Contract (tests/contracts/codec.py runs it for every codec):

- `decode(encode(d))` gives `d` back: ids, offsets and their order exactly; each number within `max_error_nats`. Entries that a
  codec makes equal may stand by rising id again, as the record has it.
- `encode` is deterministic: equal distributions and parameters give equal bytes. It refuses ids outside the vocabulary.
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

from kdcache.errors import CorruptCacheError, FormatError
from kdcache.format.record import Distributions

MAX_LIST_VALUES = 2**31 - 1
MAX_VOCAB_SIZE = 2**31

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
        """One array per field, one value per sequence.

        Raises:
            FormatError: an id outside the vocabulary, or more values than a column's 31-bit offsets can count.
        """
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
        """Elementwise bound on |decoded - stored| for logprobs of this size; zeros for an exact codec. It holds for the
        logarithms of tail masses too, when float32's rounding of the mass itself is added."""
        ...


def list_array(arrays: Sequence[NDArray[Any]], value_type: pa.DataType) -> pa.Array:
    """An Arrow list column with one list per array.

    Raises:
        FormatError: more values than 31-bit offsets can count.
    """
    num_values = sum(len(a) for a in arrays)
    if num_values > MAX_LIST_VALUES:
        raise FormatError(f"a record batch would hold {num_values} values in one column, at most {MAX_LIST_VALUES} fit")
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    values = np.concatenate([*arrays, np.zeros(0, value_type.to_pandas_dtype())], dtype=value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, value_type))


def binary_array(streams: Sequence[NDArray[np.uint8]]) -> pa.Array:
    """An Arrow column of bytes with one value per stream."""
    offsets = np.zeros(len(streams) + 1, np.int64)
    np.cumsum([len(s) for s in streams], out=offsets[1:])
    data = np.concatenate([*streams, np.zeros(0, np.uint8)])
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(streams), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


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


def check_vocab_size(vocab_size: Any) -> None:
    """Raise ValueError unless a codec's parameter is a number of ids that int32 can hold."""
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size!r}, expected an integer from 1 to 2^31")


def ids_fit(token_ids_E: NDArray[np.int32], vocab_size: int) -> bool:
    """Whether every id is in [0, vocab_size)."""
    if len(token_ids_E) and token_ids_E.dtype == np.int32:
        return int(token_ids_E.view(np.uint32).max()) < vocab_size  # one pass: a negative id is a large one
    return len(token_ids_E) == 0 or bool(token_ids_E.min() >= 0 and token_ids_E.max() < vocab_size)


def check_ids_to_encode(sequences: Sequence[Distributions], vocab_size: int) -> None:
    """Raise FormatError if any id is outside the vocabulary: packed into too few bits it would change its neighbours."""
    for distributions in sequences:
        if not ids_fit(distributions.token_ids_E, vocab_size):
            raise FormatError(f"a token id is outside the vocabulary of {vocab_size}; nothing was encoded")
