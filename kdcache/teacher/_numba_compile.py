"""How the numba functions here are compiled: GIL released, on first call, kept on disk where some folder can be written.

numba's on-disk cache notices a change of the file that a function is in, and of no other: a compiled function calls those of
its own file alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

# reassoc is what vectorised sums need. Not nnan and ninf: they would let NaN vanish.
REASSOCIATE = {"reassoc", "nsz", "contract"}


def kernel(fastmath: Any = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator.

    Args:
        fastmath: flags of LLVM's that the function's sums may use, such as REASSOCIATE; False for none.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}

    def compile_later(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's cache folder can be written
            return njit(**options)(function)

    return compile_later
