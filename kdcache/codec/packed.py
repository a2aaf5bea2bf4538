"""The default: fixed-width bit-packed ids, float16 logprobs. Reads at the speed of a memory map.

Ids are a little-endian bit stream: entry e of a sequence is bits [e*w, (e+1)*w) of its `token_ids_packed`, least significant
bit first, w = bits needed for vocab_size - 1 (at least 1); the stream is padded with zero bits to a multiple of 8 bytes.
Logprobs, tail (as its logarithm) and outside targets are float16 nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec.base import ColumnValues, check_ids_to_encode, check_vocab_size, checked_column, ids_fit, list_array
from kdcache.codec.bit_stream import packed_size
from kdcache.codec.scalars import EXACT_TOP_K, decode_scalars, encode_scalars, scalar_fields
from kdcache.errors import CorruptCacheError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions


@dataclass(frozen=True, kw_only=True)
class PackedCodec:
    """Ids exact; a logprob of size x within x * 2^-11 nats (float16 rounding), below -65504 it becomes -inf.

    Bytes per position: (w/8 + 2) per entry + 2, and 2 for a target outside the support.

    Attributes:
        vocab_size: ids are in [0, vocab_size); from 1 to 2^31.
        selection: what is kept of each distribution.
    """

    codec_id: ClassVar[str] = "packed"
    vocab_size: int
    selection: SelectionInfo = EXACT_TOP_K

    def __post_init__(self) -> None:
        check_vocab_size(self.vocab_size)

    @property
    def id_bits(self) -> int:
        """w, the width of an id in bits."""
        return max(1, (self.vocab_size - 1).bit_length())

    def params(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size}

    def fields(self) -> list[pa.Field]:
        return [
            pa.field("token_ids_packed", pa.large_binary(), nullable=False),
            pa.field("logprobs", pa.list_(pa.float16()), nullable=False),
            pa.field("tail_logprobs", pa.list_(pa.float16()), nullable=False),
            pa.field("outside_target_logprobs", pa.list_(pa.float16()), nullable=False),
            *scalar_fields(self.selection, pa.float16()),
        ]

    def encode(self, sequences: Sequence[Distributions]) -> list[pa.Array]:
        # Imported on use: numba takes 0.4 s, and reading a raw cache does not need it.
        from kdcache.codec._numba import pack_bits

        check_ids_to_encode(sequences, self.vocab_size)
        streams = [pack_bits(d.token_ids_E, self.id_bits) for d in sequences]
        with np.errstate(divide="ignore"):
            tails = [np.log(d.tail_mass_P) for d in sequences]
        return [
            _binary_array(streams),
            list_array([_half(d.logprobs_E) for d in sequences], pa.float16()),
            list_array([_half(tail) for tail in tails], pa.float16()),
            list_array([_half(d.outside_target_logprobs_M) for d in sequences], pa.float16()),
            *encode_scalars(sequences, self.selection, pa.float16(), _half),
        ]

    def decode(self, columns: ColumnValues, offsets_P1: NDArray[np.int64]) -> Distributions:
        from kdcache.codec._numba import unpack_bits

        num_entries, num_positions = int(offsets_P1[-1]), len(offsets_P1) - 1
        stream = checked_column(columns, "token_ids_packed", np.uint8, packed_size(num_entries, self.id_bits))
        token_ids_E = unpack_bits(stream, num_entries, self.id_bits)
        if not ids_fit(token_ids_E, self.vocab_size):
            raise CorruptCacheError(f"a token id is outside the vocabulary of {self.vocab_size}")
        outside = columns["outside_target_logprobs"]
        tail_logprobs_P = _single(checked_column(columns, "tail_logprobs", np.float16, num_positions))
        with np.errstate(over="ignore"):  # a hostile logarithm above 88; verify reports it as a tail mass above 1
            tail_mass_P = np.exp(tail_logprobs_P)
        return Distributions(
            token_ids_E=token_ids_E,
            logprobs_E=_single(checked_column(columns, "logprobs", np.float16, num_entries)),
            offsets_P1=offsets_P1,
            tail_mass_P=tail_mass_P,
            outside_target_logprobs_M=_single(checked_column(columns, "outside_target_logprobs", np.float16, len(outside))),
            **decode_scalars(columns, self.selection, offsets_P1, np.float16),
        )

    def max_error_nats(self, logprobs: NDArray[np.floating]) -> NDArray[np.float64]:
        size = np.abs(np.asarray(logprobs, np.float64))
        # Half a unit in the last place: 11 bits of precision for normal numbers, steps of 2^-24 below 2^-14.
        return np.where(size > 65504, np.inf, np.maximum(size * 2.0**-11, 2.0**-25))


def _half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def _single(values: NDArray[np.float16]) -> NDArray[np.float32]:
    return values.astype(np.float32)


def _binary_array(streams: Sequence[NDArray[np.uint8]]) -> pa.Array:
    offsets = np.zeros(len(streams) + 1, np.int64)
    np.cumsum([len(s) for s in streams], out=offsets[1:])
    data = np.concatenate([*streams, np.zeros(0, np.uint8)])
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(streams), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
