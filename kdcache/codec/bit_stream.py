"""The bit stream of ids, defined in plain NumPy; `_numba` holds the fast path.

Entry e is bits [e*w, (e+1)*w) of the stream, least significant bit first; zeros fill the last 8-byte word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def packed_size(num_entries: int, id_bits: int) -> int:
    """Bytes of a stream of num_entries ids: whole 8-byte words."""
    return -(-num_entries * id_bits // 64) * 8


def pack_bits_reference(token_ids_E: NDArray[np.int32], id_bits: int) -> NDArray[np.uint8]:
    """The definition of the bit stream, in plain NumPy; `_numba.pack_bits` is the fast path."""
    bits = (token_ids_E[:, None].astype(np.uint32) >> np.arange(id_bits, dtype=np.uint32)) & 1
    stream = np.zeros(packed_size(len(token_ids_E), id_bits), np.uint8)
    packed = np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")
    stream[: len(packed)] = packed
    return stream


def unpack_bits_reference(stream: NDArray[np.uint8], num_entries: int, id_bits: int) -> NDArray[np.int32]:
    """The inverse, in plain NumPy; `_numba.unpack_bits` is the fast path."""
    bits = np.unpackbits(stream, count=num_entries * id_bits, bitorder="little").reshape(num_entries, id_bits)
    return (bits.astype(np.int64) << np.arange(id_bits)).sum(axis=1).astype(np.int32)
