"""Numbers of a file that must lie in a range before anything is computed from them."""

from __future__ import annotations

import math

from kdcache.errors import FormatError


def check_range(name: str, value: int, most: int, *, least: int = 0) -> None:
    """Raise FormatError unless least <= value <= most."""
    if not least <= value <= most:
        raise FormatError(f"{name} is {value}, expected {least} to {most}")


def check_finite(name: str, value: float) -> None:
    """Raise FormatError unless a number is finite."""
    if not math.isfinite(value):
        raise FormatError(f"{name} is {value}, expected a finite number")
