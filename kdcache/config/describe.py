"""The fields of a config: their types, defaults and documentation, read from the config classes.

A field is described once, in its class's docstring; `kdcache COMMAND --help` and the messages of `kdcache.config.load` are made
from these docstrings.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec


@dataclass(frozen=True)
class FieldDescription:
    """One field that a user can set.

    Attributes:
        path: as in `input.window.size`.
        type: in words, as in "whole number" or "auto | local".
        default: as YAML, or None where the field is required.
        text: its documentation, one paragraph.
    """

    path: str
    type: str
    default: str | None
    text: str


def describe_fields(config_type: type[msgspec.Struct], prefix: str = "") -> list[FieldDescription]:
    """Every field of a config class and of its sections, in the order of declaration."""
    described: list[FieldDescription] = []
    texts = field_docs(config_type)
    hints = get_type_hints(config_type)
    for field in msgspec.structs.fields(config_type):
        path, hint = f"{prefix}{field.name}", hints[field.name]
        if section_fields(hint) is not None:
            described += describe_fields(_struct_of(hint), f"{path}.")
        else:
            described.append(FieldDescription(path, _type_in_words(hint), _default(field), texts.get(field.name, "")))
    return described


def field_docs(config_type: type[msgspec.Struct]) -> dict[str, str]:
    """Field -> its paragraph under `Attributes:` in the class's docstring; `a, b: text` describes both."""
    _, _, body = inspect.cleandoc(config_type.__doc__ or "").partition("Attributes:\n")
    docs: dict[str, str] = {}
    for paragraph in re.split(r"\n(?=    \S)", "\n" + body):
        names, colon, text = paragraph.strip().partition(":")
        if colon:
            docs |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return docs


def section_fields(kind: Any) -> dict[str, Any] | None:
    """Field -> type of a section, optional or not; None for anything else."""
    struct = _struct_of(kind)
    return None if struct is None else get_type_hints(struct)


def _struct_of(kind: Any) -> Any:
    structs = [part for part in _union_parts(kind) if isinstance(part, type) and issubclass(part, msgspec.Struct)]
    return structs[0] if structs else None


def type_at(config_type: Any, path: Sequence[str]) -> Any:
    """The declared type of the field at a path; `dict` for a mapping with free keys; None if the field does not exist."""
    kind = config_type
    for part in path:
        name, in_list, _ = part.partition("[")
        kind = (section_fields(kind) or {}).get(name)
        kind = element_type(kind) if in_list else kind
    return dict if get_origin(kind) is dict else kind


def element_type(kind: Any) -> Any:
    """The type of a list's elements; None for anything but a list."""
    return get_args(kind)[0] if get_origin(kind) in (tuple, list) else None


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The values of a Literal, optional or not; () for another type."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(choice for part in _union_parts(kind) if part is not kind for choice in choices_of(part))


def nearest(name: str, known: Iterable[str] | Mapping[str, Any]) -> str | None:
    """The known name that looks most like this one; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def _union_parts(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _type_in_words(kind: Any) -> str:
    words = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is dict:
        return "mapping"
    if get_origin(kind) in (tuple, list):
        return "list"
    parts = _union_parts(kind)
    return " | ".join(_type_in_words(part) for part in parts) if len(parts) > 1 else words.get(kind, str(kind))


def _default(field: Any) -> str | None:
    if field.default is not msgspec.NODEFAULT:
        value = field.default
    elif field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
    else:
        return None
    if isinstance(value, str):
        return value
    # A field that may be left out altogether is UNSET, which JSON has no word for.
    return "absent" if value is msgspec.UNSET else msgspec.json.encode(value).decode()
