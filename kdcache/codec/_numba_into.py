"""Packed entries decoded straight into a batch's rows, in compiled loops with the GIL released.

`kdcache.codec.into.place` of what the codec decodes is the definition; tests compare. Nothing else is checked: the
caller has checked that the stream and the logprobs hold all entries.

Shape letters: P positions, Q positions that are kept, K entries per position (padded), E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from kdcache.codec._numba_compile import compiled
from kdcache.format.record import PADDING_ID

TOO_WIDE = -2
NUM_ADDRESSES = 10


@dataclass(frozen=True, slots=True, eq=False)
class Unpacking:
    """One sequence for `unpack_many`; the arrays are read and written where they are, so they must be what is said here.

    Attributes:
        words: the packed ids as aligned uint32.
        halves_E: (E,) float16 logprobs, aligned.
        offsets_P1, kept_Q: int64, as for `unpack_into`.
        token_ids_QK, logprobs_QK: int32 and float32, C-contiguous, to be written.
    """

    words: NDArray[np.uint32]
    halves_E: NDArray[np.float16]
    offsets_P1: NDArray[np.int64]
    kept_Q: NDArray[np.int64]
    token_ids_QK: NDArray[np.int32]
    logprobs_QK: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        stream: NDArray[np.uint8],
        halves_E: NDArray[np.float16],
        rows: tuple[NDArray[np.int64], NDArray[np.int64]],
        out: tuple[NDArray[np.int32], NDArray[np.float32]],
    ) -> Unpacking:
        """Made of the arguments of `unpack_into`, copied where they are not aligned."""
        return cls(_aligned(stream.view(np.uint32)), _aligned(halves_E), *rows, *out)

    def addresses(self) -> list[int]:
        """A row of the table that the compiled loop takes: addresses of the arrays, and their sizes."""
        arrays = (self.words, self.halves_E, self.offsets_P1, self.kept_Q, self.token_ids_QK, self.logprobs_QK)
        if not all(array.flags.c_contiguous for array in arrays) or self.logprobs_QK.shape != self.token_ids_QK.shape:
            raise ValueError("arrays that are decoded from or into must be C-contiguous and of one shape")
        places = [array.__array_interface__["data"][0] for array in arrays]
        return [*places, len(self.words), len(self.offsets_P1), *self.token_ids_QK.shape]


def _aligned(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.flags.aligned else values.copy()


def unpack_many(jobs: Sequence[Unpacking], id_bits: int) -> NDArray[np.int64]:
    """`unpack_into` of several sequences in one call, so that the GIL is let go of once: threads that take turns for each of
    them spend their time waiting for each other. Returns what it returns, for each.
    """
    table_RC = np.array([job.addresses() for job in jobs], np.int64).reshape(len(jobs), NUM_ADDRESSES)
    largest_R = np.empty(len(jobs), np.int64)
    _unpack_many(table_RC, id_bits, largest_R)
    return largest_R


def unpack_into(
    stream: NDArray[np.uint8],
    id_bits: int,
    halves_E: NDArray[np.float16],
    rows: tuple[NDArray[np.int64], NDArray[np.int64]],
    out: tuple[NDArray[np.int32], NDArray[np.float32]],
) -> int:
    """Write ids and logprobs of the kept positions, padding behind them; returns the largest id, -1 where there is none,
    TOO_WIDE where a position has more than K entries.

    Args:
        stream: bytes of the packed ids, whole 8-byte words, at any alignment.
        id_bits: width of an id, from 1 to 31.
        halves_E: (E,) float16 logprobs.
        rows: (P+1,) offsets of the positions' entries, and (Q,) the positions that are kept.
        out: (Q, K) ids and (Q, K) logprobs, C-contiguous.
    """
    return int(unpack_many([Unpacking.of(stream, halves_E, rows, out)], id_bits)[0])


@compiled()
def _unpack_row(words, width, start, ids):
    # 64-bit arithmetic on 32-bit words is what LLVM turns into gathers: 41 ns for 64 entries of 18 bits, against 71 for the
    # loop over 64-bit words and 45 for one compiled for the width (one core, AVX-512).
    mask = np.uint32((np.uint64(1) << np.uint64(width)) - np.uint64(1))
    largest = np.uint32(0)
    first = np.uint64(start) * np.uint64(width)
    for k in range(ids.shape[0]):
        bit = first + np.uint64(k) * np.uint64(width)
        word, shift = bit >> np.uint64(5), bit & np.uint64(31)
        value = (np.uint64(words[word]) | (np.uint64(words[word + np.uint64(1)]) << np.uint64(32))) >> shift
        largest = max(largest, np.uint32(value) & mask)
        ids[k] = np.int32(np.uint32(value) & mask)
    return largest


@compiled()
def _unpack_last(words, width, start, ids):
    # The same where the last id ends in the stream's last word, behind which nothing may be read.
    mask = np.uint32((np.uint64(1) << np.uint64(width)) - np.uint64(1))
    largest, last = np.uint32(0), words.shape[0] - 1
    for k in range(ids.shape[0]):
        bit = np.uint64(start + k) * np.uint64(width)
        word, shift = np.int64(bit >> np.uint64(5)), bit & np.uint64(31)
        value = (np.uint64(words[word]) | (np.uint64(words[min(word + 1, last)]) << np.uint64(32))) >> shift
        largest = max(largest, np.uint32(value) & mask)
        ids[k] = np.int32(np.uint32(value) & mask)
    return largest


@compiled()
def _widen_row(halves, start, bits, values):
    # float16 to float32 exactly. Normal numbers by moving their bits; subnormal ones as integers times 2^-24, since arithmetic
    # on subnormal float32 is slow on some processors and zero where they are flushed.
    first = np.uint64(start)  # unsigned, or numba looks at each index for a negative one: six times slower
    for k in range(bits.shape[0]):
        size = np.uint32(halves[first + np.uint64(k)]) & np.uint32(0x7FFF)
        bits[k] = (size << np.uint32(13)) + np.uint32(0x38000000)
    for k in range(bits.shape[0]):
        half = np.uint32(halves[first + np.uint64(k)])
        size = half & np.uint32(0x7FFF)
        value = values[k]
        value = np.float32(np.int32(size)) * np.float32(2.0**-24) if size < np.uint32(0x400) else value
        value = np.float32(np.inf) if size == np.uint32(0x7C00) else value
        value = np.float32(np.nan) if size > np.uint32(0x7C00) else value
        values[k] = -value if half & np.uint32(0x8000) else value


@compiled()
def _unpack_rows(words, width, halves, offsets, kept, ids, logprobs):
    bits = logprobs.view(np.uint32)
    largest = np.int64(-1)
    num_safe = (words.shape[0] - 1) * 32 // width  # entries in front of the last word
    for q in range(kept.shape[0]):
        start, stop = offsets[kept[q]], offsets[kept[q] + 1]
        count = stop - start
        if count > ids.shape[1]:
            return TOO_WIDE
        if count > 0:
            if stop <= num_safe:
                found = _unpack_row(words, width, start, ids[q, :count])
            else:
                found = _unpack_last(words, width, start, ids[q, :count])
            largest = max(largest, np.int64(found))
            _widen_row(halves, start, bits[q, :count], logprobs[q, :count])
        for k in range(count, ids.shape[1]):
            ids[q, k] = PADDING_ID
            logprobs[q, k] = -np.inf
    return largest


@intrinsic
def _pointer(typing_context, address):  # noqa: ARG001 - numba's calling convention
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), generate


@compiled(numba.void(numba.int64[:, ::1], numba.int64, numba.int64[::1]))
def _unpack_many(table, width, largest):
    for r in range(table.shape[0]):
        num_words, num_offsets, num_kept, num_columns = table[r, 6], table[r, 7], table[r, 8], table[r, 9]
        words = numba.carray(_pointer(table[r, 0]), (num_words,), np.uint32)
        offsets = numba.carray(_pointer(table[r, 2]), (num_offsets,), np.int64)
        halves = numba.carray(_pointer(table[r, 1]), (offsets[num_offsets - 1],), np.uint16)
        kept = numba.carray(_pointer(table[r, 3]), (num_kept,), np.int64)
        ids = numba.carray(_pointer(table[r, 4]), (num_kept, num_columns), np.int32)
        logprobs = numba.carray(_pointer(table[r, 5]), (num_kept, num_columns), np.float32)
        largest[r] = _unpack_rows(words, width, halves, offsets, kept, ids, logprobs)
