"""Memory of batches that is used again once nobody holds the batch.

A batch's two large arrays take most of its bytes; fresh pages for them cost the kernel about as much as decoding. An array that
`BufferPool.take` gives keeps a lease on its memory. When the last array, view or tensor on it is gone, the lease is collected
and the memory goes back to the pool: a batch is valid as long as somebody refers to it, with nothing to release and no rule to
keep.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kdcache.errors import StorageError

Allocate = Callable[[int], NDArray[np.uint8]]
"""A number of bytes -> an uninitialised C-contiguous array of at least this many."""


def plain_memory(num_bytes: int) -> NDArray[np.uint8]:
    """Of the process's heap."""
    return np.empty(num_bytes, np.uint8)


class BufferPool:
    """Hands out arrays, and hands their memory out again when they are gone. Safe to use from several threads.

    Args:
        most_free: buffers of one purpose kept while unused; what comes back beyond them is freed.
        allocate: makes a buffer; another one for pinned memory.
    """

    def __init__(self, most_free: int, allocate: Allocate = plain_memory) -> None:
        self._allocate, self._most_free = allocate, most_free
        # A deque and no lock: a lease may end in the middle of `take`, in the same thread, when garbage is collected there.
        self._free: dict[str, deque[NDArray[np.uint8]]] = {}
        self.num_allocated = 0

    def take(self, shape: tuple[int, ...], dtype: DTypeLike, purpose: str = "entries") -> NDArray[Any]:
        """An uninitialised C-contiguous array. Arrays of one purpose are about equally large, and share buffers."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        free = self._free.setdefault(purpose, deque(maxlen=self._most_free))
        lease = _Lease(self._buffer(num_bytes, free), free)
        return np.asarray(lease)[:num_bytes].view(dtype).reshape(shape)

    def _buffer(self, num_bytes: int, free: deque[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        for _ in range(len(free)):
            try:
                buffer = free.popleft()
            except IndexError:  # another thread took it
                break
            if num_bytes <= len(buffer):
                return buffer
            # Too small once, too small again: batches differ little. Left to go, so that the pool's sizes grow to the largest.
        self.num_allocated += 1
        try:
            return self._allocate(num_bytes + num_bytes // 8)
        except (MemoryError, ValueError) as error:  # NumPy's words for a size beyond any machine's
            raise StorageError(
                f"a batch takes {num_bytes / 2**30:.1f} GiB, which this machine does not have: its widest position decides; "
                "make batches smaller, or leave wide positions out with `kdcache derive`"
            ) from error


class _Lease:
    """Lends a buffer to the arrays made of it; gives it back when it is collected, after the last of them."""

    __slots__ = ("_buffer", "_free")

    def __init__(self, buffer: NDArray[np.uint8], free: deque[NDArray[np.uint8]]) -> None:
        self._buffer, self._free = buffer, free

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._buffer.__array_interface__

    def __del__(self) -> None:
        self._free.append(self._buffer)
