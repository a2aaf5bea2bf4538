"""The public names and their signatures equal public_api.txt, so that each change to them shows in a diff.

After a change that is meant: python tests/test_public_api.py > tests/public_api.txt
"""

import inspect
from pathlib import Path

import pytest

import kdcache

RECORD = Path(__file__).parent / "public_api.txt"


def describe():
    """One line for each public name, and one for each public method or property of a class."""
    for name in sorted(kdcache.__all__):
        value = getattr(kdcache, name)
        if inspect.isclass(value):
            yield f"class {name}{signature(value)}"
            yield from members(name, value)
        elif callable(value):
            yield f"{name}{signature(value)}"
        else:
            yield f"{name}: {type(value).__name__}"


def members(owner, value):
    for name, member in sorted(vars(value).items()):
        if name.startswith("_") and name not in ("__len__", "__getitem__", "__iter__", "__enter__"):
            continue
        if isinstance(member, property):
            yield f"  {owner}.{name}: {inspect.signature(member.fget).return_annotation}"
        elif isinstance(member, (classmethod, staticmethod)) or inspect.isfunction(member):
            yield f"  {owner}.{name}{signature(getattr(value, name))}"


def signature(value):
    if inspect.isclass(value) and issubclass(value, BaseException):
        return ""
    return str(inspect.signature(value)).replace("'", "").replace("typing.", "")


def test_the_public_names_and_signatures_are_the_recorded_ones():
    pytest.importorskip("torch")
    assert list(describe()) == RECORD.read_text().splitlines()


if __name__ == "__main__":
    print("\n".join(describe()))
