"""Have the C library keep the memory of freed arrays for the next ones."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_KEPT = 32 * 2**20  # the most that glibc takes
_MOST_FREE = 256 * 2**20


def keep_freed_memory() -> bool:
    """For the rest of the process: arrays of up to 32 MiB come from memory that was freed before, of which 256 MiB stay here.

    Otherwise glibc maps each chunk's logits anew, and each of their pages costs an interrupt and is set to zero: tens of
    microseconds for a row of a vocabulary of 152k (benchmarks/LOG.md). Gives whether the C library does so.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return all([mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT), mallopt(_TRIM_THRESHOLD, _MOST_FREE)])
