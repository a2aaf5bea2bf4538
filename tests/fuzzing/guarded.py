"""Arrays beside pages that nobody may touch: one byte beyond either end is a SIGSEGV and not a wrong number.

mmap and mprotect by ctypes; pages are given back by `Pages.free`, after which the arrays must not be used.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FILL = 0xA5


class Pages:
    """Guarded arrays that end at a forbidden page, or with `at_front` begin at one."""

    def __init__(self, *, at_front: bool) -> None:
        self.at_front = at_front
        self._held: list[tuple[int, int]] = []

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64) -> NDArray[Any]:
        """An array of no particular content, in place of `np.empty`."""
        kind, size = np.dtype(dtype), mmap.PAGESIZE
        shape = (shape,) if isinstance(shape, (int, np.integer)) else shape
        num_bytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        room = -(-num_bytes // size) * size or size
        start = _libc.mmap(
            None, room + 2 * size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        assert start not in (None, ctypes.c_void_p(-1).value)
        for page in (start, start + size + room):
            assert _libc.mprotect(page, size, 0) == 0
        self._held.append((start, room + 2 * size))
        first = start + size if self.at_front else start + size + room - num_bytes
        if not num_bytes:
            return np.empty(shape, kind)
        values = np.frombuffer((ctypes.c_uint8 * num_bytes).from_address(first), np.uint8)
        values[:] = _FILL
        return values.view(kind).reshape(shape)

    def copy(self, values: NDArray[Any]) -> NDArray[Any]:
        """The same values in guarded memory."""
        out = self.empty(values.shape, values.dtype)
        out[...] = values
        return out

    def free(self) -> None:
        """Give all pages back."""
        for start, num_bytes in self._held:
            _libc.munmap(start, num_bytes)
        self._held.clear()


class GuardedNumpy:
    """numpy, but that what it makes for a codec's compiled loops is guarded."""

    def __init__(self, pages: Pages) -> None:
        self._pages, self.empty = pages, pages.empty

    def append(self, values: NDArray[Any], more: NDArray[Any]) -> NDArray[Any]:
        """`np.append` of arrays of one dtype."""
        return self._pages.copy(np.append(values, more))

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)
