"""Arithmetic on arrays: one meaning (`reference`), several backends. README.md holds the decisions."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from kdcache.errors import LossError

if TYPE_CHECKING:
    from kdcache.kernels.base import KernelBackend

_BACKENDS = {
    "reference": "kdcache.kernels.reference",
    "numba": "kdcache.kernels._numba",
}


def get_backend(name: str) -> KernelBackend:
    """The backend of this name; see `kdcache.kernels.base.KernelBackend`. Loaded on first use.

    Raises:
        LossError: there is no such backend.
    """
    if name not in _BACKENDS:
        raise LossError(f"there is no kernel backend {name!r}; there are {', '.join(map(repr, _BACKENDS))}")
    return cast("KernelBackend", import_module(_BACKENDS[name]))
