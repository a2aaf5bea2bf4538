"""How the larger numba functions here are compiled: GIL released, kept on disk where some folder can be written.

numba's on-disk cache notices a change of the file that a function is in, and of no other: a compiled function calls those of
its own file alone, and functions of other files by address (`called_by_address`, `call`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic


def compiled(*signature: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator. With a signature: compiled now, or read from disk; without: inlined where it is called."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "forceinline": not signature}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(*signature, cache=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's cache folder can be written
            return njit(*signature, **options)(function)

    return decorate


def called_by_address(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator. Gives an object with an `address`, for `call` in another file's function; integers in and out. What is
    decorated must neither raise nor make arrays."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return cfunc(signature, cache=True, error_model="numpy")(function)
        except RuntimeError:
            return cfunc(signature, error_model="numpy")(function)

    return decorate


@intrinsic
def call(typing_context, address, first, second, third):  # noqa: ARG001 - numba's calling convention
    """The result of the function at an address, of three integers."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        number = ir.IntType(64)
        kind = ir.FunctionType(number, [number] * 3)
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

    return types.int64(*[types.int64] * 4), generate
