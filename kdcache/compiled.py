"""How every numba function of kdcache is compiled, and how one calls code that another file holds.

Compiled code is kept on disk, in `__pycache__` or the user's cache folder, where one of them can be written. numba's cache has
one defect that decides the rest: it notices a change of the file that a function stands in, and of no other file. Code that was
compiled with a function of another file inside it stays as it was when that file changes. So a function on disk (`compiled`)
is built from functions of its own file alone (`inlined`, `called`), and reaches another file in one of two ways:

- by address (`called_by_address` there, `call` here), or through an argument that is a first-class function: the caller
  holds no copy of the other's code;
- through a last parameter whose default is the `version_of` the other files: the default is part of the type that the code is
  kept under, so that a change of their text compiles it again.

`call`, `pointer` and `copy` below are copied into their users all the same, and so are the OPTIONS. What they do never changes;
a tool that does something else gets another name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
"""No fastmath: sums that LLVM may reorder depend on the width of a processor's vectors; with nnan or ninf, NaN would vanish and
logits of -inf would be undefined."""


def compiled(*signature: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a function that Python calls: kept on disk; compiled at once for a signature, else at the first call."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(*signature, cache=True, **OPTIONS)(function)
        except RuntimeError:  # neither this folder nor the user's cache folder can be written
            return njit(*signature, **OPTIONS)(function)

    return decorate


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a part of other compiled functions, inlined into each.

    A part that is not inlined resolves to another of its own compilations when its caller comes from disk. Its sums then run in
    another order, and the last bits of a gradient differ between the first process and later ones.
    """
    return njit(forceinline=True, **OPTIONS)(function)


def called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a large part of other compiled functions, without sums of floats: called, not inlined."""
    return njit(**OPTIONS)(function)


def called_by_address(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that gives an object with an `address`, for `call` in another file's function.

    Integers in and out. The function must neither raise nor create arrays.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return cfunc(signature, cache=True, error_model="numpy")(function)
        except RuntimeError:
            return cfunc(signature, error_model="numpy")(function)

    return decorate


def version_of(*modules: ModuleType) -> str:
    """A digest of the modules' source text."""
    return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()


@intrinsic
def call(typing_context, address, first, second, third):  # noqa: ARG001 - numba's calling convention
    """In compiled code: the result of the function at an address, of three int64 arguments."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        integer = ir.IntType(64)
        kind = ir.FunctionType(integer, [integer] * 3)
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

    return types.int64(*[types.int64] * 4), generate


@intrinsic
def pointer(typing_context, address):  # noqa: ARG001 - numba's calling convention
    """In compiled code: an int64 address as the pointer that `numba.carray` takes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), generate


@intrinsic
def copy(typing_context, target, source, num_bytes):  # noqa: ARG001 - numba's calling convention
    """In compiled code: copy bytes from one address to another; the two ranges do not overlap."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        pointers = [builder.inttoptr(address, ir.IntType(8).as_pointer()) for address in arguments[:2]]
        cgutils.raw_memcpy(builder, pointers[0], pointers[1], arguments[2], 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate
