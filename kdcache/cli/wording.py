"""Counts, sizes, durations and tables, as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kdcache.shown import as_printed, shown, write

_NAME_CHARACTERS = 60
_LONG = 160
"""Characters of a value that still fit on a line or two of a terminal."""


def count(num: int, noun: str) -> str:
    """ "1 unit", "12,345 units"."""
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def size(num_bytes: float) -> str:
    """Bytes in decimal units: "812 bytes", "3.4 MB"."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    power = min(5, int(math.log10(num_bytes)) // 3)
    scaled = num_bytes / 1000**power
    if scaled >= 999.5 and power < 5:
        scaled, power = scaled / 1000, power + 1
    return f"{scaled:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def duration(seconds: float) -> str:
    """ "3.2 s", "5 min 10 s", "3 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def aligned(values: Mapping[str, str]) -> str:
    """One line per value, with the names in one column; a long value takes a line for each of its parts.

    Names and values may come from a file: both are made printable.
    """
    plain = [(shown(name, _NAME_CHARACTERS), shown(value)) for name, value in values.items()]
    width = max((len(name) for name, _ in plain), default=0)
    further = f";\n{'':<{width}}  "
    return "\n".join(f"{name:<{width}}  {further.join(_parts(value))}" for name, value in plain)


def _parts(value: str) -> list[str]:
    """A long value at its semicolons; a short one whole."""
    return value.split("; ") if len(value) > _LONG else [value]


def say_json(value: Any) -> None:
    """Print a value as one JSON object. NaN becomes null, and control characters become `\\u` escapes."""
    import msgspec

    write(as_printed(msgspec.json.format(msgspec.json.encode(value), indent=2).decode()))
