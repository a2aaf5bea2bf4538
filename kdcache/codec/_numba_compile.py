"""How the larger numba functions here are compiled: GIL released, kept on disk where some folder can be written.

numba's on-disk cache notices a change of the file that a function is in, and of no other: a compiled function calls those of
its own file alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(*signature: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator. With a signature: compiled now, or read from disk; without: inlined where it is called."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "forceinline": not signature}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(*signature, cache=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's cache folder can be written
            return njit(*signature, **options)(function)

    return decorate
