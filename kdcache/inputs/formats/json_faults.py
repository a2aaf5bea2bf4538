"""Says what is wrong with a JSON value that does not decode: a number that JSON cannot hold, half a character."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

_KEY = "(key)"
_SURROGATES = range(0xD800, 0xE000)


def json_fault(data: bytes, error: Exception) -> str:
    """Describe the fault, with its field if that is known.

    Args:
        data: of one value.
        error: of the decoder.
    """
    try:
        value = json.loads(data.decode(), parse_constant=_Constant, parse_float=_Numeral)
        fault = next(_faults(value, ""), None)
    except UnicodeDecodeError as bad:
        return f"not UTF-8 text (byte 0x{data[bad.start]:02x}); convert the file to UTF-8"
    except (ValueError, RecursionError):
        fault = None
    return fault or f"not JSON: {error}"


class _Constant(str):
    """NaN, Infinity or -Infinity."""


class _Numeral(str):
    """A number with a point or an exponent, as written."""


def _faults(value: Any, at: str) -> Iterator[str]:
    if isinstance(value, _Constant):
        yield f"{_named(at)} is {value}, which JSON does not allow (write null or a number)"
    elif isinstance(value, _Numeral):
        if math.isinf(float(value)):
            yield f"{_named(at)} is {value[:40]}, a number out of range"
    elif isinstance(value, str):
        half = next((character for character in value if ord(character) in _SURROGATES), None)
        if half is not None:
            yield (
                f"{_named(at)} holds \\u{ord(half):04x}, a lone surrogate, which is half a character; "
                "write the file again without it"
            )
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _faults(key, _KEY)
            yield from _faults(entry, f"{at}.{key}" if at else repr(key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _faults(entry, f"{at}[{index}]")


def _named(at: str) -> str:
    if at is _KEY:
        return "a key"
    return f"field {at}" if at else "the value"
