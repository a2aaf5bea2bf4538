"""The definition: int32 ids and float32 numbers, nothing lost, nothing clever. Every other codec is compared with it."""

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
from kdcache.format.record_checks import ids_fit


@dataclass(frozen=True, kw_only=True)
class RawCodec(Codec):
    """Exact. Bytes per position: 8 per entry + 4, and 4 for a target outside the support.

    Attributes:
        vocab_size: ids are in [0, vocab_size); from 1 to 2^31.
        selection: what is kept of each distribution.
    """

    codec_id: ClassVar[str] = "raw"
    vocab_size: int
    selection: SelectionInfo = EXACT_TOP_K

    def __post_init__(self) -> None:
        check_vocab_size(self.vocab_size)

    def params(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size}

    def fields(self) -> list[pa.Field]:
        return [
            pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
            pa.field("tail_mass", pa.list_(pa.float32()), nullable=False),
            pa.field("outside_target_logprobs", pa.list_(pa.float32()), nullable=False),
            *scalar_fields(self.selection, pa.float32()),
        ]

    def encode(self, sequences: Sequence[Distributions]) -> list[pa.Array]:
        return [
            list_array([d.token_ids_E for d in sequences], pa.int32()),
            list_array([d.logprobs_E for d in sequences], pa.float32()),
            list_array([d.tail_mass_P for d in sequences], pa.float32()),
            list_array([d.outside_target_logprobs for d in sequences], pa.float32()),
            *encode_scalars(sequences, self.selection, pa.float32(), lambda values: values),
        ]

    def decode(self, columns: ColumnValues, offsets_P1: NDArray[np.int64]) -> Distributions:
        num_entries = int(offsets_P1[-1])
        token_ids_E = checked_column(columns, "token_ids", np.int32, num_entries)
        if not ids_fit(token_ids_E, self.vocab_size):
            raise CorruptCacheError(f"a token id is outside the vocabulary of {self.vocab_size}")
        outside = columns["outside_target_logprobs"]
        return Distributions(
            token_ids_E=token_ids_E,
            logprobs_E=checked_column(columns, "logprobs", np.float32, num_entries),
            offsets_P1=offsets_P1,
            tail_mass_P=checked_column(columns, "tail_mass", np.float32, len(offsets_P1) - 1),
            outside_target_logprobs=checked_column(columns, "outside_target_logprobs", np.float32, len(outside)),
            **decode_scalars(columns, self.selection, offsets_P1, np.float32),
        )

    def max_error_nats(self, logprobs: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.zeros(np.shape(logprobs))
