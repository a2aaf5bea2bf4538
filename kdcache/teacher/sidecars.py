"""What a teacher can give once for a whole cache: its output projection, and statistics of its activations. NumPy alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ConfigError
from kdcache.format.output_projection import FinalNorm, OutputProjection
from kdcache.format.record import TokenSequence

ACTIVATION_STATISTICS = "activation_statistics"
"""The sidecar's name."""

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_CLOSE = {"float32": 1e-4}
_CLOSE_HALF = 0.02


@runtime_checkable
class SidecarTeacher(Protocol):
    """A teacher that can be asked for sidecars; it refuses with a reason what it cannot give."""

    def output_projection(self) -> OutputProjection:
        """What makes the logits of its states after the final norm.

        Raises:
            ConfigError: they are not one projection, scaled and capped.
        """
        ...

    def activation_statistics(self, sequences: Sequence[TokenSequence]) -> dict[str, NDArray[Any]]:
        """Sums over these sequences of what layers, heads, neurons and channels do; see `kdcache.teacher.hf.activations`.

        Raises:
            ConfigError: the engine does not show them.
        """
        ...


def no_sidecar(name: str, who: str) -> ConfigError:
    """The error for a teacher that is asked for a sidecar that it cannot give."""
    return ConfigError(f"sidecars: {who} gives no {name}; use teacher.backend transformers, or leave it out")


Apply = Callable[[NDArray[np.float32]], NDArray[np.floating]]
"""States -> what a norm makes of them."""


def describe_norm(
    module: Any, weight_H: NDArray[np.float32], bias_H: NDArray[np.float32] | None, apply: Apply, dtype: str
) -> FinalNorm | None:
    """Say which norm a module is, by trying those that `FinalNorm` can say; None if it is none of them.

    Args:
        module: has its eps under one of the usual names.
        weight_H, bias_H: of the module.
        apply: gives what the module makes of states (3, H) float32.
        dtype: of the module, which decides how near is near enough.
    """
    eps = next((getattr(module, name) for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)), None)
    if eps is None:
        return None
    states = np.random.default_rng(0).normal(0.3, 2.0, (3, len(weight_H))).astype(np.float32)
    found = np.asarray(apply(states), np.float64)
    for subtracts_mean in (False, True):
        for offset in (0.0, 1.0):
            norm = FinalNorm(weight_H, bias_H, float(eps), offset, subtracts_mean)
            off = np.linalg.norm(norm(states) - found) / max(float(np.linalg.norm(found)), 1e-30)
            if off <= _CLOSE.get(dtype, _CLOSE_HALF):
                return norm
    return None
