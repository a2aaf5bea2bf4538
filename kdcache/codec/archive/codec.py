"""The smallest codec, and the default for random selections: one adaptive arithmetic code, learned in each sequence alone.

Ids are coded as sets, bit by bit from the leading one, each bit predicted from the leading bits of all ids of the sequence so
far (and of those of entries of its kind): frequent ids become short, wherever they stand in the vocabulary. Entries of equal
logprob are one set, whose order costs nothing. Logprobs are codes of levels as in `quantized`, or float16 as in `packed`, as
differences. `reference.py` defines the stream; the state ends with the sequence, so that any can be read alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec import estimates
from kdcache.codec.archive.model import MOST_ENTRIES_PER_BYTE
from kdcache.codec.archive.tables import HALF_INFINITY, half_codes, half_logprobs, log_counts, spans_of, tail_tables
from kdcache.codec.base import (
    Codec,
    ColumnValues,
    EntryArrays,
    binary_array,
    check_vocab_size,
    check_width,
    checked_column,
    copy_into,
    copy_scalars_into,
)
from kdcache.codec.levels import (
    LEAST_BITS,
    MOST_BITS,
    TAIL_BITS,
    level_logprobs,
    max_half_error,
    max_level_error,
    nearest_codes,
)
from kdcache.codec.scalars import EXACT_TOP_K, decode_floats, encode_scalars, scalar_fields
from kdcache.errors import CorruptCacheError, FormatError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions
from kdcache.format.selection import fixed_exact, has_estimates, stores_num_exact

HALF_BITS = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Decoded:
    """What was decoded besides the entries."""

    num_exact_P: NDArray[np.int64] | None
    tail_mass_P: NDArray[np.float32]
    outside_codes: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class ArchiveCodec(Codec):
    """Ids exact, numbers as in `quantized` or (bits 16) in `packed`; entries that become equal stand in the order of their ids.

    Attributes:
        vocab_size: ids are in [0, vocab_size); from 1 to 2^31.
        bits: of an exact entry's logprob before it is coded: 4 to 8, or 16 for float16.
        selection: what is kept of each distribution.
    """

    codec_id: ClassVar[str] = "archive"
    size_follows_content: ClassVar[bool] = True
    vocab_size: int
    bits: int = 8
    selection: SelectionInfo = EXACT_TOP_K

    def __post_init__(self) -> None:
        check_vocab_size(self.vocab_size)
        if self.bits is True or self.bits not in (*range(LEAST_BITS, MOST_BITS + 1), HALF_BITS) or isinstance(self.bits, float):
            raise ValueError(f"bits is {self.bits!r}, expected an integer from {LEAST_BITS} to {MOST_BITS}, or {HALF_BITS}")

    @property
    def stores_half_logprobs(self) -> bool:
        """Whether all logprobs are float16: levels and estimates are not."""
        return self.bits == HALF_BITS and not has_estimates(self.selection)

    def params(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "bits": self.bits}

    def fields(self) -> list[pa.Field]:
        return [
            pa.field("archive", pa.large_binary(), nullable=False),
            *scalar_fields(self.selection, pa.float16(), num_exact=False),
        ]

    def encode(self, sequences: Sequence[Distributions]) -> list[pa.Array]:
        floats = encode_scalars(
            sequences, self.selection, pa.float16(), lambda values: values.astype(np.float16), num_exact=False
        )
        return [binary_array([self._encode(d) for d in sequences]), *floats]

    def _encode(self, d: Distributions) -> NDArray[np.uint8]:
        from kdcache.codec.archive._numba_encode import encode_stream

        if len(d.outside_target_logprobs) > d.num_positions:
            raise FormatError("there are more outside targets than positions")
        num_exact_P = d.num_entries_P if d.num_exact_P is None else d.num_exact_P.astype(np.int64)
        codes_E, tail_codes_P, outside_codes = self._codes(d, num_exact_P)
        order_E = self._order(d, codes_E)
        arrays = (
            np.array(d.offsets_P1, np.int64), np.array(num_exact_P, np.int64), np.array(d.token_ids_E[order_E], np.int32),
            codes_E, tail_codes_P, outside_codes,
        )  # fmt: skip
        room = 128 * d.num_entries + 256 * d.num_positions + 1024
        stream = np.empty(room, np.uint8)
        num_bytes = encode_stream(stream, arrays, self._about(d.num_entries, d.num_positions, len(outside_codes)))
        if num_bytes < 0:
            raise FormatError("a token id appears twice at a position")
        least = -(-d.num_entries // MOST_ENTRIES_PER_BYTE)
        return np.concatenate([stream[:num_bytes], np.zeros(max(0, least - num_bytes), np.uint8)])

    def _codes(
        self, d: Distributions, num_exact_P: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """(E,) codes that rise among a position's exact entries and among its estimates; of tails; of outside targets."""
        from kdcache.codec._numba_levels import codes_within_one

        exact = estimates.exact_logprobs(d, self.selection)
        if self.bits == HALF_BITS:
            with np.errstate(divide="ignore"):
                codes = (half_codes(exact), half_codes(np.log(d.tail_mass_P)))
            outside_codes = half_codes(d.outside_target_logprobs)
        else:
            codes = codes_within_one(exact, num_exact_P, d.tail_mass_P, self.bits)
            outside_codes = nearest_codes(d.outside_target_logprobs, TAIL_BITS)
        codes_E = np.zeros(d.num_entries, np.int32)
        is_exact_E = d.is_exact_E
        codes_E[is_exact_E] = codes[0]
        if estimates.stores_counts(self.selection):
            codes_E[~is_exact_E] = self.selection.params["num_draws"] - estimates.draw_counts(d, self.selection)
        return codes_E, codes[1].astype(np.int32), outside_codes.astype(np.int32)

    @staticmethod
    def _order(d: Distributions, codes_E: NDArray[np.int32]) -> NDArray[np.int64]:
        """The entries' order once more, those of equal code by rising id."""
        groups_E = np.repeat(np.arange(d.num_positions), d.num_entries_P) * 2 + ~d.is_exact_E
        if ((np.diff(codes_E) < 0) & (np.diff(groups_E) == 0)).any():
            raise FormatError("logprobs are not in falling order")
        return np.lexsort((d.token_ids_E, codes_E, groups_E))

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
        num_entries, num_positions = self._check_size(columns, offsets_P1), len(offsets_P1) - 1
        token_ids_E, logprobs_E = np.empty(num_entries, np.int32), np.empty(num_entries, np.float32)
        spans_P2 = np.stack([offsets_P1[:-1], offsets_P1[1:]], axis=1).astype(np.int64)
        decoded = self._decode_to(columns, offsets_P1, (token_ids_E, logprobs_E, spans_P2))
        floats: dict[str, Any] = decode_floats(columns, self.selection, num_positions, np.float16)
        return Distributions(
            token_ids_E=token_ids_E,
            logprobs_E=logprobs_E,
            offsets_P1=offsets_P1,
            tail_mass_P=decoded.tail_mass_P,
            outside_target_logprobs=self._logprobs(decoded.outside_codes, TAIL_BITS),
            num_exact_P=decoded.num_exact_P,
            **floats,
        )

    def decode_into(
        self,
        columns: ColumnValues,
        offsets_P1: NDArray[np.int64],
        out: EntryArrays,
        keep_P: NDArray[np.bool_] | None = None,
    ) -> None:
        """Decode without arrays in between, where float32 is asked for."""
        if out.logprobs_PK.dtype != np.float32:  # float16, which the compiled loop does not write
            copy_into(self.decode(columns, offsets_P1), out, keep_P)
            return
        self._check_size(columns, offsets_P1)
        check_width(offsets_P1, out)
        ids_PK, logprobs_PK = out.token_ids_PK, out.logprobs_PK
        spans_P2 = spans_of(ids_PK, logprobs_PK, len(offsets_P1) - 1, keep_P)
        decoded = self._decode_to(columns, offsets_P1, (ids_PK.reshape(-1), logprobs_PK.reshape(-1), spans_P2))
        out.tail_mass_P[:] = decoded.tail_mass_P if keep_P is None else decoded.tail_mass_P[keep_P]
        floats = decode_floats(columns, self.selection, len(offsets_P1) - 1, np.float16)
        copy_scalars_into(decoded.num_exact_P, floats.get("log_z_PL"), floats.get("entropy_P"), out, keep_P)

    @staticmethod
    def _check_size(columns: ColumnValues, offsets_P1: NDArray[np.int64]) -> int:
        """The number of entries, if the stream is long enough for memory to be taken for this many."""
        stream, num_entries = columns["archive"], int(offsets_P1[-1])
        checked_column(columns, "archive", np.uint8, len(stream))
        if len(stream) < 8 or num_entries > MOST_ENTRIES_PER_BYTE * len(stream):
            raise CorruptCacheError(f"column 'archive' has {len(stream)} bytes for {num_entries} entries: too few")
        return num_entries

    def _decode_to(
        self, columns: ColumnValues, offsets_P1: NDArray[np.int64], out: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
    ) -> _Decoded:
        """Write the entries. out: flat ids and logprobs, and (P, 2) where in them each position begins and its padding ends."""
        from kdcache.codec.archive._numba_decode import decode_entries, room_for

        stream, num_entries, num_positions = columns["archive"], int(offsets_P1[-1]), len(offsets_P1) - 1
        counts_P = np.diff(offsets_P1)
        fixed = fixed_exact(self.selection)
        num_exact_P = counts_P.astype(np.int64) if fixed is None else np.minimum(fixed, counts_P)
        about, tables = self._about(num_entries, num_positions, 0), self._tables
        tail_mass_P, outside_P = np.empty(num_positions, np.float32), np.empty(num_positions, np.int32)
        room = np.empty(room_for(about[0], int(counts_P.max(initial=0))), np.uint32)
        num_outside, num_bytes, largest = decode_entries(
            np.append(stream, np.zeros(4, np.uint8)), room,
            (np.array(offsets_P1, np.int64), num_exact_P, out[2]), (*out[:2], tail_mass_P, outside_P),
            tables, (*about[:6], about[7]), self._log_tau,
        )  # fmt: skip
        least = -(-num_entries // MOST_ENTRIES_PER_BYTE)
        if num_outside < 0 or len(stream) != max(num_bytes, least) or stream[num_bytes:].any():
            raise CorruptCacheError("column 'archive' does not hold a stream of these entries")
        if largest >= self.vocab_size:
            raise CorruptCacheError(f"a token id is outside the vocabulary of {self.vocab_size}")
        return _Decoded(num_exact_P if has_estimates(self.selection) else None, tail_mass_P, outside_P[:num_outside])

    @property
    def _tables(self) -> tuple[NDArray[Any], ...]:
        draws = self.selection.params["num_draws"] if estimates.stores_counts(self.selection) else 0
        levels = np.zeros(0, np.float32) if self.bits == HALF_BITS else level_logprobs(self.bits)
        return levels, log_counts(draws), *tail_tables(self.bits == HALF_BITS, estimates.stores_tail(self.selection))

    @property
    def _log_tau(self) -> float:
        return math.log(self.selection.params["tau"]) if self.selection.kind == "threshold" else 0.0

    def _logprobs(self, codes: NDArray[np.int32], bits: int) -> NDArray[np.float32]:
        return half_logprobs(codes) if self.bits == HALF_BITS else level_logprobs(bits)[codes]

    def max_error_nats(self, logprobs: NDArray[np.floating]) -> NDArray[np.float64]:
        return max_half_error(logprobs) if self.bits == HALF_BITS else max_level_error(logprobs, self.bits)
