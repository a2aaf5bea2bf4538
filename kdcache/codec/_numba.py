"""Bit packing in compiled loops, GIL released; `bit_stream.py` holds the definitions they are tested against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.bit_stream import packed_size
from kdcache.compiled import compiled


def pack_bits(token_ids_E: NDArray[np.int32], id_bits: int) -> NDArray[np.uint8]:
    """(bytes,) uint8, the ids as a little-endian bit stream in whole 8-byte words.

    Args:
        token_ids_E: (E,) int32 in [0, 2^id_bits).
        id_bits: from 1 to 31.
    """
    words = np.zeros(packed_size(len(token_ids_E), id_bits) // 8, np.uint64)
    _pack(np.ascontiguousarray(token_ids_E, np.int32), np.uint64(id_bits), words)
    return words.view(np.uint8)


def unpack_bits(stream: NDArray[np.uint8], num_entries: int, id_bits: int) -> NDArray[np.int32]:
    """(num_entries,) int32, the inverse of `pack_bits`.

    Args:
        stream: packed_size(num_entries, id_bits) bytes, at any alignment.
    """
    words = np.ascontiguousarray(stream).view(np.uint64)
    if not words.flags.aligned:
        words = words.copy()
    token_ids_E = np.empty(num_entries, np.int32)
    if num_entries:
        _unpack(words, np.uint64(id_bits), token_ids_E)
    return token_ids_E


@compiled("void(Array(int32, 1, 'C', readonly=True), uint64, uint64[::1])")
def _pack(ids, width, words):
    bit = np.uint64(0)
    for e in range(ids.shape[0]):
        value = np.uint64(np.uint32(ids[e]))
        word, shift = bit >> np.uint64(6), bit & np.uint64(63)
        words[word] |= value << shift
        if shift + width > np.uint64(64):
            words[word + np.uint64(1)] |= value >> (np.uint64(64) - shift)
        bit += width


@compiled("void(Array(uint64, 1, 'C', readonly=True), uint64, int32[::1])")
def _unpack(words, width, ids):
    # Unsigned throughout: numba makes float64 of int64 with uint64. The second word is the first again when an id does not
    # cross a boundary, so that the last id of a stream reads nothing beyond it; shifting by 63 and 1 avoids a shift by 64.
    mask = (np.uint64(1) << width) - np.uint64(1)
    last = np.uint64(words.shape[0] - 1)
    bit = np.uint64(0)
    for e in range(ids.shape[0]):
        word, shift = bit >> np.uint64(6), bit & np.uint64(63)
        low = words[word] >> shift
        high = (words[min(word + np.uint64(1), last)] << np.uint64(1)) << (np.uint64(63) - shift)
        ids[e] = np.int32((low | high) & mask)
        bit += width
