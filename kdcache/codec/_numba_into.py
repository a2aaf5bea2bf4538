"""Packed entries decoded straight into a batch's rows, in compiled loops with the GIL released.

`kdcache.codec.into.place` of what the codec decodes is the definition; tests compare. Nothing else is checked: the
caller has checked that the stream and the logprobs hold all entries.

Shape letters: P positions, Q positions that are kept, K entries per position (padded), E entries.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from kdcache.codec._numba_compile import compiled
from kdcache.format.record import PADDING_ID

_IN = {"layout": "C", "readonly": True}
_WORDS, _HALVES = numba.types.Array(numba.uint32, 1, **_IN), numba.types.Array(numba.uint16, 1, **_IN)
_OFFSETS = numba.types.Array(numba.int64, 1, **_IN)


TOO_WIDE = -2


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
    words = stream.view(np.uint32)
    if not words.flags.aligned:
        words = words.copy()
    token_ids_QK, logprobs_QK = out
    halves = halves_E.view(np.uint16)
    if not halves.flags.aligned:
        halves = halves.copy()
    return int(_unpack_into(words, id_bits, halves, *rows, token_ids_QK, logprobs_QK))


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


@compiled(numba.int64(_WORDS, numba.int64, _HALVES, _OFFSETS, _OFFSETS, numba.int32[:, ::1], numba.float32[:, ::1]))
def _unpack_into(words, width, halves, offsets, kept, ids, logprobs):
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
