"""Fixed-width ids and logprobs of 4 to 8 bits, on levels that are finer the more probable a token is (see `levels.py`).

Ids as in `packed`. Logprobs of exact entries are a bit stream of the same kind, b bits each; tails and targets outside the
support one byte each, on the levels of 8 bits. Of a random selection only what it does not imply is stored, counts of draws in
as many bits as the number of draws needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec import estimates
from kdcache.codec.base import (
    Codec,
    ColumnValues,
    EntryFormat,
    binary_array,
    check_vocab_size,
    checked_column,
    list_array,
)
from kdcache.codec.bit_stream import packed_size
from kdcache.codec.levels import (
    LEAST_BITS,
    MOST_BITS,
    TAIL_BITS,
    level_logprobs,
    level_masses,
    max_level_error,
    nearest_codes,
)
from kdcache.codec.scalars import EXACT_TOP_K, decode_scalars, encode_scalars, scalar_fields
from kdcache.errors import CorruptCacheError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions
from kdcache.format.record_checks import ids_fit
from kdcache.format.selection import has_estimates


@dataclass(frozen=True, kw_only=True)
class QuantizedCodec(Codec):
    """Ids exact; a logprob x within about 2 sqrt(|x| 4 b) / (2^b - 2) nats, in falling order, -inf and 0 exact; sums within 1.

    Bytes per position: (w + b) / 8 per exact entry, w / 8 and the count of draws per estimate, 1, and 1 for a target outside.

    Attributes:
        vocab_size: ids are in [0, vocab_size); from 1 to 2^31.
        bits: b, of an exact entry's logprob; from 4 to 8.
        selection: what is kept of each distribution.
    """

    codec_id: ClassVar[str] = "quantized"
    vocab_size: int
    bits: int = 8
    selection: SelectionInfo = EXACT_TOP_K

    def __post_init__(self) -> None:
        check_vocab_size(self.vocab_size)
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not LEAST_BITS <= self.bits <= MOST_BITS:
            raise ValueError(f"bits is {self.bits!r}, expected an integer from {LEAST_BITS} to {MOST_BITS}")

    @property
    def id_bits(self) -> int:
        """w, the width of an id in bits."""
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def _count_bits(self) -> int:
        return int(self.selection.params["num_draws"]).bit_length()

    def params(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "bits": self.bits}

    def fields(self) -> list[pa.Field]:
        streams, lists = self._columns()
        return [
            *[pa.field(name, pa.large_binary(), nullable=False) for name in streams],
            *[pa.field(name, pa.list_(pa.uint8()), nullable=False) for name in lists],
            *scalar_fields(self.selection, pa.float16()),
        ]

    def _columns(self) -> tuple[dict[str, int], list[str]]:
        """Bit streams, with their widths, and lists of bytes."""
        has_logprobs = estimates.stores_logprobs(self.selection)
        streams = {
            "token_ids_packed": self.id_bits,
            **({"logprob_codes": self.bits} if has_logprobs else {}),
            **({"estimate_counts": self._count_bits} if estimates.stores_counts(self.selection) else {}),
        }
        return streams, [*(["tail_codes"] if estimates.stores_tail(self.selection) else []), "outside_target_codes"]

    def encode(self, sequences: Sequence[Distributions]) -> list[pa.Array]:
        from kdcache.codec._numba import pack_bits

        scalars = encode_scalars(sequences, self.selection, pa.float16(), lambda values: values.astype(np.float16))
        encoded = [self._values(d) for d in sequences]
        streams, lists = self._columns()
        return [
            *[binary_array([pack_bits(n[name], width) for n in encoded]) for name, width in streams.items()],
            *[list_array([n[name] for n in encoded], pa.uint8()) for name in lists],
            *scalars,
        ]

    def _values(self, d: Distributions) -> dict[str, NDArray[Any]]:
        from kdcache.codec._numba_levels import codes_within_one

        exact = estimates.exact_logprobs(d, self.selection)
        num_exact_P = d.num_entries_P if d.num_exact_P is None else d.num_exact_P
        codes, tail_codes_P = codes_within_one(exact, num_exact_P, d.tail_mass_P, self.bits)
        values: dict[str, NDArray[Any]] = {
            "token_ids_packed": d.token_ids_E,
            "logprob_codes": codes.astype(np.int32),
            "tail_codes": tail_codes_P,
            "outside_target_codes": nearest_codes(d.outside_target_logprobs, TAIL_BITS),
        }
        if estimates.stores_counts(self.selection):
            values["estimate_counts"] = estimates.draw_counts(d, self.selection).astype(np.int32)
        return values

    def decode(self, columns: ColumnValues, offsets_P1: NDArray[np.int64]) -> Distributions:
        num_entries, num_positions = int(offsets_P1[-1]), len(offsets_P1) - 1
        token_ids_E = self._stream(columns, "token_ids_packed", num_entries)
        if not ids_fit(token_ids_E, self.vocab_size):
            raise CorruptCacheError(f"a token id is outside the vocabulary of {self.vocab_size}")
        scalars = decode_scalars(columns, self.selection, offsets_P1, np.float16)
        tail_mass_P = np.ones(num_positions, np.float32)
        if estimates.stores_tail(self.selection):
            tail_codes_P = checked_column(columns, "tail_codes", np.uint8, num_positions)
            tail_mass_P = level_masses(TAIL_BITS).astype(np.float32)[tail_codes_P]
        outside = columns["outside_target_codes"]
        outside_codes = checked_column(columns, "outside_target_codes", np.uint8, len(outside))
        return Distributions(
            token_ids_E=token_ids_E,
            logprobs_E=self._logprobs(columns, offsets_P1, scalars["num_exact_P"], tail_mass_P),
            offsets_P1=offsets_P1,
            tail_mass_P=tail_mass_P,
            outside_target_logprobs=level_logprobs(TAIL_BITS)[outside_codes],
            **scalars,
        )

    def entry_format(self) -> EntryFormat | None:
        """The packed ids and codes; None for a selection with estimates."""
        if has_estimates(self.selection):
            return None
        names = "token_ids_packed", "logprob_codes", "tail_codes"
        return EntryFormat(*names, self.id_bits, self.bits, self.vocab_size, level_masses(TAIL_BITS).astype(np.float32))

    def _logprobs(
        self,
        columns: ColumnValues,
        offsets_P1: NDArray[np.int64],
        num_exact_P: NDArray[np.int64] | None,
        tail_mass_P: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        num_entries = int(offsets_P1[-1])
        num_exact = num_entries if num_exact_P is None else int(num_exact_P.sum())
        exact, counts = np.zeros(0, np.float32), None
        if estimates.stores_logprobs(self.selection):
            exact = level_logprobs(self.bits)[self._stream(columns, "logprob_codes", num_exact)]
        if estimates.stores_counts(self.selection):
            counts = self._stream(columns, "estimate_counts", num_entries - num_exact)
        return estimates.all_logprobs(exact, counts, (offsets_P1, num_exact_P, tail_mass_P), self.selection)

    def _stream(self, columns: ColumnValues, name: str, length: int) -> NDArray[np.int32]:
        from kdcache.codec._numba import unpack_bits

        width = self._columns()[0][name]
        return unpack_bits(checked_column(columns, name, np.uint8, packed_size(length, width)), length, width)

    def max_error_nats(self, logprobs: NDArray[np.floating]) -> NDArray[np.float64]:
        return max_level_error(logprobs, self.bits)
