"""The default: fixed-width bit-packed ids, float16 logprobs. Reads at the speed of a memory map.

Ids are a little-endian bit stream: entry e of a sequence is bits [e*w, (e+1)*w) of its `token_ids_packed`, least significant
bit first, w = bits needed for vocab_size - 1 (at least 1); the stream is padded with zero bits to a multiple of 8 bytes.
Logprobs, tail (as its logarithm) and outside targets are float16 nats. What a random selection implies is not stored: estimates
are counts of draws, or all at tau (see `estimates.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec import estimates
from kdcache.codec.base import (
    Codec,
    ColumnValues,
    DecodeTask,
    EntryArrays,
    EntryFormat,
    binary_array,
    check_vocab_size,
    check_width,
    checked_column,
    copy_into,
    copy_scalars_into,
    for_each,
    list_array,
)
from kdcache.codec.bit_stream import packed_size
from kdcache.codec.scalars import EXACT_TOP_K, decode_scalars, encode_scalars, scalar_fields
from kdcache.errors import CorruptCacheError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions
from kdcache.format.record_checks import ids_fit
from kdcache.format.selection import has_estimates

if TYPE_CHECKING:
    from kdcache.codec.numba_unpack import Unpacking


@dataclass(frozen=True, kw_only=True)
class PackedCodec(Codec):
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

    @property
    def stores_half_logprobs(self) -> bool:
        """Whether all logprobs are float16: estimates are not."""
        return not has_estimates(self.selection)

    def params(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size}

    def fields(self) -> list[pa.Field]:
        return [
            pa.field("token_ids_packed", pa.large_binary(), nullable=False),
            *[pa.field(name, pa.list_(value_type), nullable=False) for name, value_type in self._value_types().items()],
            *scalar_fields(self.selection, pa.float16()),
        ]

    def _value_types(self) -> dict[str, pa.DataType]:
        half, selection = pa.float16(), self.selection
        return {
            **({"logprobs": half} if estimates.stores_logprobs(selection) else {}),
            **({"estimate_counts": estimates.count_type(selection)} if estimates.stores_counts(selection) else {}),
            **({"tail_logprobs": half} if estimates.stores_tail(selection) else {}),
            "outside_target_logprobs": half,
        }

    def encode(self, sequences: Sequence[Distributions]) -> list[pa.Array]:
        # Imported on use: numba takes 0.4 s, and reading a raw cache does not need it.
        from kdcache.codec._numba import pack_bits

        scalars = encode_scalars(sequences, self.selection, pa.float16(), _half)
        encoded = [self._values(d) for d in sequences]
        return [
            binary_array([pack_bits(d.token_ids_E, self.id_bits) for d in sequences]),
            *[list_array([n[name] for n in encoded], value_type) for name, value_type in self._value_types().items()],
            *scalars,
        ]

    def _values(self, d: Distributions) -> dict[str, NDArray[Any]]:
        with np.errstate(divide="ignore"):
            tail_logprobs_P = np.log(d.tail_mass_P)
        values = {
            "logprobs": _half(estimates.exact_logprobs(d, self.selection)),
            "tail_logprobs": _half(tail_logprobs_P),
            "outside_target_logprobs": _half(d.outside_target_logprobs),
        }
        if estimates.stores_counts(self.selection):
            dtype = estimates.count_type(self.selection).to_pandas_dtype()
            values["estimate_counts"] = estimates.draw_counts(d, self.selection).astype(dtype)
        return values

    def decode(self, columns: ColumnValues, offsets_P1: NDArray[np.int64]) -> Distributions:
        from kdcache.codec._numba import unpack_bits

        num_entries = int(offsets_P1[-1])
        stream = checked_column(columns, "token_ids_packed", np.uint8, packed_size(num_entries, self.id_bits))
        token_ids_E = unpack_bits(stream, num_entries, self.id_bits)
        if not ids_fit(token_ids_E, self.vocab_size):
            raise CorruptCacheError(f"a token id is outside the vocabulary of {self.vocab_size}")
        outside = columns["outside_target_logprobs"]
        scalars = decode_scalars(columns, self.selection, offsets_P1, np.float16)
        tail_mass_P = self._tail_mass(columns, len(offsets_P1) - 1)
        return Distributions(
            token_ids_E=token_ids_E,
            logprobs_E=self._logprobs(columns, offsets_P1, scalars["num_exact_P"], tail_mass_P),
            offsets_P1=offsets_P1,
            tail_mass_P=tail_mass_P,
            outside_target_logprobs=_single(checked_column(columns, "outside_target_logprobs", np.float16, len(outside))),
            **scalars,
        )

    def entry_format(self) -> EntryFormat | None:
        """The packed ids and float16 logprobs; None for a selection with estimates."""
        if has_estimates(self.selection):
            return None
        names = "token_ids_packed", "logprobs", "tail_logprobs"
        return EntryFormat(*names, self.id_bits, 0, self.vocab_size, _mass_of_halves())

    def decode_into(
        self,
        columns: ColumnValues,
        offsets_P1: NDArray[np.int64],
        out: EntryArrays,
        keep_P: NDArray[np.bool_] | None = None,
    ) -> None:
        """Decode without arrays in between, where all entries are exact."""
        self.decode_many_into([DecodeTask(columns, offsets_P1, out, keep_P, "this sequence")])

    def decode_many_into(self, tasks: Sequence[DecodeTask]) -> None:
        """Decode all sequences in one compiled call, where all entries are exact."""
        from kdcache.codec.numba_unpack import unpack_many

        if has_estimates(self.selection):
            for_each(tasks, lambda task: copy_into(self.decode(task.columns, task.offsets_P1), task.out, task.keep_P))
            return
        unpackings: list[Unpacking] = []
        for_each(tasks, lambda task: unpackings.append(self._unpacking(task)))
        largest = iter(unpack_many(unpackings, self.id_bits).tolist())
        for_each(tasks, lambda task: self._check_unpacked(task, next(largest)))
        for_each(tasks, self._copy_scalars)

    def _unpacking(self, task: DecodeTask) -> Unpacking:
        """What the compiled loop is to do, once the columns have been found to be as long as it relies on."""
        from kdcache.codec.numba_unpack import Unpacking

        num_entries = int(task.offsets_P1[-1])
        size = packed_size(num_entries, self.id_bits)
        stream = checked_column(task.columns, "token_ids_packed", np.uint8, size)
        halves_E = checked_column(task.columns, "logprobs", np.float16, num_entries)
        kept = None if task.keep_P is None else np.flatnonzero(task.keep_P)
        return Unpacking.of(stream, halves_E, (task.offsets_P1, kept), (task.out.token_ids_PK, task.out.logprobs_PK))

    def _check_unpacked(self, task: DecodeTask, largest: int) -> None:
        """Look at what came of a sequence."""
        from kdcache.codec.numba_unpack import TOO_WIDE

        if largest == TOO_WIDE:
            check_width(task.offsets_P1, task.out)
        if largest >= self.vocab_size:
            raise CorruptCacheError(f"a token id is outside the vocabulary of {self.vocab_size}")

    def _copy_scalars(self, task: DecodeTask) -> None:
        """Write what is not a sequence's entries."""
        out, keep_P = task.out, task.keep_P
        tail_mass_P = self._tail_mass(task.columns, len(task.offsets_P1) - 1)
        out.tail_mass_P[:] = tail_mass_P if keep_P is None else tail_mass_P[keep_P]
        if not (out.num_exact_P is None and out.log_z_PL is None and out.entropy_P is None):
            scalars = decode_scalars(task.columns, self.selection, task.offsets_P1, np.float16)
            copy_scalars_into(scalars.get("num_exact_P"), scalars.get("log_z_PL"), scalars.get("entropy_P"), out, keep_P)

    def _tail_mass(self, columns: ColumnValues, num_positions: int) -> NDArray[np.float32]:
        if not estimates.stores_tail(self.selection):
            return np.ones(num_positions, np.float32)
        return _masses(checked_column(columns, "tail_logprobs", np.float16, num_positions))

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
            exact = _single(checked_column(columns, "logprobs", np.float16, num_exact))
        if estimates.stores_counts(self.selection):
            dtype = estimates.count_type(self.selection).to_pandas_dtype()
            counts = checked_column(columns, "estimate_counts", dtype, num_entries - num_exact)
        return estimates.all_logprobs(exact, counts, (offsets_P1, num_exact_P, tail_mass_P), self.selection)

    def max_error_nats(self, logprobs: NDArray[np.floating]) -> NDArray[np.float64]:
        size = np.abs(np.asarray(logprobs, np.float64))
        # Half a unit in the last place: 11 bits of precision for normal numbers, steps of 2^-24 below 2^-14.
        return np.where(size > 65504, np.inf, np.maximum(size * 2.0**-11, 2.0**-25))


def _half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def _single(values: NDArray[np.float16]) -> NDArray[np.float32]:
    return values.astype(np.float32)


@cache
def _mass_of_halves() -> NDArray[np.float32]:
    """(2^16,) the probability that each float16, by its bits, is the logarithm of."""
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # a hostile logarithm, NaN or above 88; verify reports it as a tail mass above 1
        masses = np.exp(_single(np.arange(2**16, dtype=np.uint16).view(np.float16)))
    masses.flags.writeable = False
    return masses


def _masses(tail_logprobs: NDArray[np.float16]) -> NDArray[np.float32]:
    """The probabilities that logarithms stand for. By a table, the same for all ways to read: NumPy's exponentials need not be
    another's to the last bit."""
    return _mass_of_halves()[tail_logprobs.view(np.uint16)]
