"""What the spec says in words and tables, so that a reader in another language need not guess, is what the code does."""

from __future__ import annotations

import hashlib
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kdcache.format import manifest as manifest_module
from kdcache.format.manifest import fingerprint
from kdcache.format.selection import _RANGES, SELECTION_KINDS, selection_params

SPEC = Path(manifest_module.__file__).with_name("README.md").read_text()


def test_the_table_of_selections_has_every_kind_and_its_parameters():
    rows = dict(re.findall(r"^\| `(\w+)` \| (`[^|]+) \|", SPEC.split("## 2. Files")[0], re.MULTILINE))
    rows.pop("kind")
    assert set(rows) == set(SELECTION_KINDS)
    for kind, params in rows.items():
        assert tuple(re.findall(r"`(\w+)`", params)) == selection_params(kind), kind
    assert _RANGES["k"][1:] == (0, 2**31)
    assert _RANGES["num_draws"][1:] == (1, 65_535)
    assert _RANGES["tau"][1:] == (2.0**-15, 1.0)


def number(value: float) -> str:
    """A float in the canonical form, after the spec's words alone."""
    sign, digits, exponent = Decimal(repr(value)).as_tuple()
    assert isinstance(exponent, int)
    text = "".join(map(str, digits)).rstrip("0") or "0"
    power = len(digits) + exponent - 1  # of the leading digit
    if value == 0:
        return "-0.0" if sign else "0.0"
    if 1e-5 <= abs(value) < 1e16:
        whole = text[: power + 1].ljust(power + 1, "0") if power >= 0 else "0"
        rest = text[power + 1 :] if power >= 0 else "0" * (-power - 1) + text
        body = f"{whole}.{rest or '0'}"
    else:
        body = f"{text[0]}{'.' + text[1:] if text[1:] else ''}e{power}"
    return "-" * sign + body


def canonical(value: Any) -> str:
    if isinstance(value, dict):
        parts = sorted(value.items(), key=lambda item: item[0].encode())
        return "{" + ",".join(f"{canonical(key)}:{canonical(part)}" for key, part in parts) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    return number(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


FLOATS = [0.0, -0.0, 1.0, 2.5, 1e-5, 9.999e-6, 1.5e-7, 1e15, 9007199254740993.0, 1e16, 1.25e17, 5e-324, 0.1, -3.0e22, 1.2345e-5]


@pytest.mark.parametrize("value", FLOATS)
def test_the_canonical_form_of_numbers_is_what_the_spec_says(value: float):
    assert fingerprint({"x": value}) == hashlib.sha256(canonical({"x": value}).encode()).hexdigest()


def test_the_canonical_form_of_text_and_keys_is_what_the_spec_says():
    fields = {"\U0001f600": [1, -(2**53), True, None], "\uffff": "é\u2028/\x7f", "b": {"z": '\x00\x1f\b\t\n\f\r"\\', "a": []}}
    assert fingerprint(fields) == hashlib.sha256(canonical(fields).encode()).hexdigest()
