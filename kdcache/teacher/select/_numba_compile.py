"""How the numba functions here are compiled: GIL released, on first call, kept on disk where some folder can be written.

numba's on-disk cache notices a change of the file that a function is in, and of no other. So only whole selections are kept,
with whatever is inlined into them, and each has a last parameter whose default is the `version_of` the other files that it
takes functions from: the default is a part of the type that its compiled code is kept under.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from numba import njit

# reassoc is what vectorised sums need. Not nnan and ninf: they would let NaN vanish.
REASSOCIATE = {"reassoc", "nsz", "contract"}

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def inlined(fastmath: Any = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a part of others, of any file.

    Args:
        fastmath: flags of LLVM's that the function's sums may use, such as REASSOCIATE; False for none.
    """
    return njit(fastmath=fastmath, forceinline=True, **_OPTIONS)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of what is called from Python."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        return njit(**_OPTIONS)(function)


def version_of(*modules: ModuleType) -> str:
    """Changes whenever the text of any of them does."""
    return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()
