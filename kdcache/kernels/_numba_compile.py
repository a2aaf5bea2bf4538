"""How every numba function here is compiled: one set of flags, kept on disk where some folder can be written.

numba's on-disk cache notices a change of the file that a function is in, and of no other: a compiled function may call those
of its own file, and others through a first-class function argument, whose machine code is not copied into the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

# No fastmath: sums that LLVM may reorder follow the width of a processor's vectors, and with nnan or ninf -inf logits would be
# undefined and NaN would vanish.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def compiled(function: Callable[..., Any], *signature: Any) -> Callable[..., Any]:
    """Compile now for the signature, where one is given, else on first call; from disk where it has been compiled before."""
    # A callee that is not inlined resolves to another of its compilations when the caller comes from disk, and sums in another
    # order: the last bits of a gradient would differ between the first process and the later ones.
    options = OPTIONS | {"forceinline": not signature}
    try:
        return njit(*signature, cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        return njit(*signature, **options)(function)
