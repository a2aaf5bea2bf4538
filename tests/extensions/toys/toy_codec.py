"""A codec in one file: ids as 64-bit integers, exact logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec.base import Codec, ColumnValues, check_vocab_size, checked_column, list_array
from kdcache.codec.scalars import EXACT_TOP_K, decode_scalars, encode_scalars, scalar_fields
from kdcache.errors import CorruptCacheError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions

FLOATS = {"logprobs": "logprobs_E", "tail_mass": "tail_mass_P", "outside_target_logprobs": "outside_target_logprobs"}


@dataclass(frozen=True, kw_only=True)
class ToyCodec(Codec):
    """Exact, and larger than it need be."""

    codec_id: ClassVar[str] = "toy"
    vocab_size: int
    selection: SelectionInfo = EXACT_TOP_K

    def __post_init__(self) -> None:
        check_vocab_size(self.vocab_size)

    def params(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size}

    def fields(self) -> list[pa.Field]:
        floats = [pa.field(name, pa.list_(pa.float32()), nullable=False) for name in FLOATS]
        return [
            pa.field("token_ids", pa.list_(pa.int64()), nullable=False),
            *floats,
            *scalar_fields(self.selection, pa.float32()),
        ]

    def encode(self, sequences: Sequence[Distributions]) -> list[pa.Array]:
        return [
            list_array([d.token_ids_E.astype(np.int64) for d in sequences], pa.int64()),
            *(list_array([getattr(d, name) for d in sequences], pa.float32()) for name in FLOATS.values()),
            *encode_scalars(sequences, self.selection, pa.float32(), lambda values: values),
        ]

    def decode(self, columns: ColumnValues, offsets_P1: NDArray[np.int64]) -> Distributions:
        num_entries, num_positions = int(offsets_P1[-1]), len(offsets_P1) - 1
        ids_E = checked_column(columns, "token_ids", np.int64, num_entries)
        if ((ids_E < 0) | (ids_E >= self.vocab_size)).any():
            raise CorruptCacheError(f"a token id is outside the vocabulary of {self.vocab_size}")
        lengths = (num_entries, num_positions, len(columns["outside_target_logprobs"]))
        floats = {
            name: checked_column(columns, column, np.float32, length)
            for (column, name), length in zip(FLOATS.items(), lengths, strict=True)
        }
        scalars = decode_scalars(columns, self.selection, offsets_P1, np.float32)
        return Distributions(token_ids_E=ids_E.astype(np.int32), offsets_P1=offsets_P1, **floats, **scalars)

    def max_error_nats(self, logprobs: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.zeros(np.shape(logprobs))
