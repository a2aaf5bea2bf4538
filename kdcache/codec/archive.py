"""The smallest: one adaptive arithmetic code for everything, learned anew in each sequence. For object stores and cold caches.

Ids are coded as sets, bit by bit from the leading one, each bit predicted from the leading bits of all ids of the sequence so
far (and of those of entries of its kind): frequent ids become short, wherever they stand in the vocabulary. Entries of equal
logprob are one set, whose order costs nothing. Logprobs are codes of levels as in `quantized`, or float16 as in `packed`, as
differences. `archive_reference.py` defines the stream; there is no state beyond a sequence, so that any can be read alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec import estimates
from kdcache.codec.archive_model import MOST_ENTRIES_PER_BYTE
from kdcache.codec.base import (
    ColumnValues,
    binary_array,
    check_ids_to_encode,
    check_vocab_size,
    checked_column,
    ids_fit,
)
from kdcache.codec.levels import (
    LEAST_BITS,
    MOST_BITS,
    TAIL_BITS,
    level_logprobs,
    level_masses,
    max_half_error,
    max_level_error,
    nearest_codes,
)
from kdcache.codec.scalars import EXACT_TOP_K, decode_floats, encode_scalars, scalar_fields
from kdcache.errors import CorruptCacheError, FormatError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions
from kdcache.format.selection import fixed_exact, stores_num_exact

HALF_BITS = 16
HALF_INFINITY = 0x7C00


@dataclass(frozen=True, kw_only=True)
class ArchiveCodec:
    """Ids exact, numbers as in `quantized` or (bits 16) in `packed`; entries that become equal stand in the order of their ids.

    Attributes:
        vocab_size: ids are in [0, vocab_size); from 1 to 2^31.
        bits: of an exact entry's logprob before it is coded: 4 to 8, or 16 for float16.
        selection: what is kept of each distribution.
    """

    codec_id: ClassVar[str] = "archive"
    vocab_size: int
    bits: int = 8
    selection: SelectionInfo = EXACT_TOP_K

    def __post_init__(self) -> None:
        check_vocab_size(self.vocab_size)
        if self.bits is True or self.bits not in (*range(LEAST_BITS, MOST_BITS + 1), HALF_BITS) or isinstance(self.bits, float):
            raise ValueError(f"bits is {self.bits!r}, expected an integer from {LEAST_BITS} to {MOST_BITS}, or {HALF_BITS}")

    def params(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "bits": self.bits}

    def fields(self) -> list[pa.Field]:
        return [
            pa.field("archive", pa.large_binary(), nullable=False),
            *scalar_fields(self.selection, pa.float16(), num_exact=False),
        ]

    def encode(self, sequences: Sequence[Distributions]) -> list[pa.Array]:
        check_ids_to_encode(sequences, self.vocab_size)
        floats = encode_scalars(
            sequences, self.selection, pa.float16(), lambda values: values.astype(np.float16), num_exact=False
        )
        return [binary_array([self._encode(d) for d in sequences]), *floats]

    def _encode(self, d: Distributions) -> NDArray[np.uint8]:
        from kdcache.codec._numba_archive import encode_stream

        if len(d.outside_target_logprobs_M) > d.num_positions:
            raise FormatError("there are more outside targets than positions")
        num_exact_P = d.num_entries_P if d.num_exact_P is None else d.num_exact_P.astype(np.int64)
        codes_E, tail_codes_P, outside_codes_M = self._codes(d, num_exact_P)
        order_E = self._order(d, codes_E)
        arrays = (
            np.array(d.offsets_P1, np.int64), np.array(num_exact_P, np.int64), np.array(d.token_ids_E[order_E], np.int32),
            codes_E, tail_codes_P, outside_codes_M,
        )  # fmt: skip
        room = 128 * d.num_entries + 256 * d.num_positions + 1024
        stream = np.empty(room, np.uint8)
        num_bytes = encode_stream(stream, arrays, self._about(d.num_entries, d.num_positions, len(outside_codes_M)))
        if num_bytes < 0:
            raise FormatError("a token id appears twice at a position")
        least = -(-d.num_entries // MOST_ENTRIES_PER_BYTE)
        return np.concatenate([stream[:num_bytes], np.zeros(max(0, least - num_bytes), np.uint8)])

    def _codes(
        self, d: Distributions, num_exact_P: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """(E,) codes that rise among a position's exact entries and among its estimates; of tails; of outside targets."""
        from kdcache.codec._numba_levels import codes_within_one

        exact_X = estimates.exact_logprobs(d, self.selection)
        if self.bits == HALF_BITS:
            with np.errstate(divide="ignore"):
                codes = (_half_codes(exact_X), _half_codes(np.log(d.tail_mass_P)))
            outside_codes_M = _half_codes(d.outside_target_logprobs_M)
        else:
            codes = codes_within_one(exact_X, num_exact_P, d.tail_mass_P, self.bits)
            outside_codes_M = nearest_codes(d.outside_target_logprobs_M, TAIL_BITS)
        codes_E = np.zeros(d.num_entries, np.int32)
        is_exact_E = d.is_exact_E
        codes_E[is_exact_E] = codes[0]
        if estimates.stores_counts(self.selection):
            codes_E[~is_exact_E] = self.selection.params["num_draws"] - estimates.draw_counts(d, self.selection)
        return codes_E, codes[1].astype(np.int32), outside_codes_M.astype(np.int32)

    @staticmethod
    def _order(d: Distributions, codes_E: NDArray[np.int32]) -> NDArray[np.int64]:
        """The entries' order once more, those of equal code by rising id."""
        rows_E = np.repeat(np.arange(d.num_positions), d.num_entries_P) * 2 + ~d.is_exact_E
        if ((np.diff(codes_E) < 0) & (np.diff(rows_E) == 0)).any():
            raise FormatError("logprobs are not in falling order")
        return np.lexsort((d.token_ids_E, codes_E, rows_E))

    def _about(self, num_entries: int, num_positions: int, num_outside: int) -> tuple[int, ...]:
        most_tail = HALF_INFINITY if self.bits == HALF_BITS else 2**TAIL_BITS - 1
        return (
            max(1, (self.vocab_size - 1).bit_length()),
            HALF_INFINITY if self.bits == HALF_BITS else 2**self.bits - 1,
            self.selection.params["num_draws"] if estimates.stores_counts(self.selection) else 0,
            int(stores_num_exact(self.selection)),
            most_tail if estimates.stores_tail(self.selection) else 0,
            most_tail,
            num_outside,
            (num_entries + 257 * num_positions) & 0xFFFF,
        )

    def decode(self, columns: ColumnValues, offsets_P1: NDArray[np.int64]) -> Distributions:
        from kdcache.codec._numba_archive import decode_stream

        stream = checked_column(columns, "archive", np.uint8, len(columns["archive"]))
        num_entries, num_positions = int(offsets_P1[-1]), len(offsets_P1) - 1
        if len(stream) < 8 or num_entries > MOST_ENTRIES_PER_BYTE * len(stream):
            raise CorruptCacheError(f"column 'archive' has {len(stream)} bytes for {num_entries} entries: too few")
        entries = _empty(num_entries, num_positions)
        arrays = (np.array(offsets_P1, np.int64), self._given_exact(offsets_P1), *entries)
        about = self._about(num_entries, num_positions, 0)
        num_outside, num_bytes = decode_stream(np.array(stream), arrays, about)
        least = -(-num_entries // MOST_ENTRIES_PER_BYTE)
        if num_outside < 0 or len(stream) != max(num_bytes, least) or stream[num_bytes:].any():
            raise CorruptCacheError("column 'archive' does not hold a stream of these entries")
        if not ids_fit(entries[0], self.vocab_size):
            raise CorruptCacheError(f"a token id is outside the vocabulary of {self.vocab_size}")
        floats = decode_floats(columns, self.selection, num_positions, np.float16)
        return self._record(arrays, num_outside, offsets_P1, floats)

    def _given_exact(self, offsets_P1: NDArray[np.int64]) -> NDArray[np.int64]:
        fixed = fixed_exact(self.selection)
        counts_P = np.diff(offsets_P1)
        return counts_P if fixed is None else np.minimum(fixed, counts_P)

    def _record(
        self, arrays: tuple[NDArray[Any], ...], num_outside: int, offsets_P1: NDArray[np.int64], floats: dict[str, Any]
    ) -> Distributions:
        _, num_exact_P, token_ids_E, codes_E, tail_codes_P, outside_codes_P = arrays
        selection, num_positions = self.selection, len(num_exact_P)
        tail_mass_P = self._masses(tail_codes_P) if estimates.stores_tail(selection) else np.ones(num_positions, np.float32)
        has_estimates = fixed_exact(selection) is not None or stores_num_exact(selection)
        exact_X, counts_D = codes_E, None
        if has_estimates:
            is_exact_E = estimates.is_exact(offsets_P1, num_exact_P)
            exact_X = codes_E[is_exact_E]
            if estimates.stores_counts(selection):
                counts_D = selection.params["num_draws"] - codes_E[~is_exact_E]
        kept_P = num_exact_P if has_estimates else None
        return Distributions(
            token_ids_E=token_ids_E,
            logprobs_E=estimates.all_logprobs(
                self._logprobs(exact_X, self.bits), counts_D, (offsets_P1, kept_P, tail_mass_P), selection
            ),
            offsets_P1=offsets_P1,
            tail_mass_P=tail_mass_P,
            outside_target_logprobs_M=self._logprobs(outside_codes_P[:num_outside], TAIL_BITS),
            num_exact_P=kept_P,
            **floats,
        )

    def _logprobs(self, codes: NDArray[np.int32], bits: int) -> NDArray[np.float32]:
        if self.bits == HALF_BITS:
            return -codes.astype(np.uint16).view(np.float16).astype(np.float32)
        return level_logprobs(bits)[codes]

    def _masses(self, codes: NDArray[np.int32]) -> NDArray[np.float32]:
        if self.bits == HALF_BITS:
            return np.exp(self._logprobs(codes, HALF_BITS))
        return level_masses(TAIL_BITS).astype(np.float32)[codes]

    def max_error_nats(self, logprobs: NDArray[np.floating]) -> NDArray[np.float64]:
        return max_half_error(logprobs) if self.bits == HALF_BITS else max_level_error(logprobs, self.bits)


def _half_codes(logprobs: NDArray[np.floating]) -> NDArray[np.int32]:
    """The bits of float16 sizes of logprobs: they rise as the logprob falls."""
    with np.errstate(over="ignore"):
        return np.abs(logprobs).astype(np.float16).view(np.uint16).astype(np.int32)


def _empty(num_entries: int, num_positions: int) -> tuple[NDArray[np.int32], ...]:
    sizes = (num_entries, num_entries, num_positions, num_positions)
    return tuple(np.zeros(size, np.int32) for size in sizes)
