"""What an item is: the value of a field, checked, in the one shape that the rest of the capture knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.format.record import ROLES

DEFAULT_FIELDS = {"text": "text", "messages": "messages", "ids": "input_ids"}

Message = dict[str, Any]
Content = str | list[Message] | NDArray[np.int64]
"""text: a str; messages: dicts with `role` and `content`; ids: (N,) int64, not yet checked against a vocabulary."""


class Fields(NamedTuple):
    """What is read of a row or a line.

    Attributes:
        content: the column or key that holds it.
        kind: `text`, `messages` or `ids`.
        domain: the column or key of the item's domain; None where none is read.
    """

    content: str
    kind: str
    domain: str | None = None

    @property
    def names(self) -> list[str]:
        """The columns or keys."""
        return [self.content, *([] if self.domain is None else [self.domain])]

    def option(self, name: str) -> str:
        """The option that asked for one of the names."""
        return "input.field" if name == self.content else "input.domain_field"


class Place(NamedTuple):
    """Where an item starts, so that reading can start there.

    Attributes:
        file: counts the sorted files; 0 for a dataset.
        offset: bytes into a text file; rows into a table or dataset.
        number: items of the same file before this one (txt and tables: as offset; line files: lines before it).
    """

    file: int
    offset: int
    number: int


START = Place(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Item:
    """One text, chat or list of ids, as it came.

    Attributes:
        content: see Content; empty where the item holds nothing.
        source: for people: "corpus/a.jsonl:17" (line 17), "b.parquet#12" (row 12, from 0), "x.txt".
        place: where it starts.
        domain: what kind of text it is, as the input says; "" where it does not.
    """

    content: Content
    source: str
    place: Place
    domain: str = ""

    @property
    def num_chars(self) -> int:
        """Characters of its text, or tokens of its ids: the measure by which units are cut."""
        if isinstance(self.content, list):
            return sum(len(message["content"]) for message in self.content)
        return len(self.content)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing for a teacher to read: no text, no message, no id, or null."""
        return len(self.content) == 0 or (isinstance(self.content, list) and self.num_chars == 0)

    def content_bytes(self) -> bytes:
        """The content's meaning as bytes, the same from whatever format it was read."""
        if isinstance(self.content, str):
            return self.content.encode()
        if isinstance(self.content, list):
            return msgspec.json.encode(self.content, order="sorted")
        return np.ascontiguousarray(self.content, "<i8").tobytes()


def parse_content(value: Any, kind: str, where: str) -> Content:
    """Check a value against the kind of content that was asked for.

    Args:
        value: from JSON or a table's cell. Null is an empty item.
        kind: `text`, `messages` or `ids`.
        where: file and line or row, and the field, for messages.

    Raises:
        InputError: the value is of another type, or a message of a chat is.
    """
    if kind == "text":
        return _parse_text(value, where)
    if kind == "messages":
        return _parse_messages(value, where)
    return _parse_ids(value, where)


def parse_domain(value: Any, where: str) -> str:
    """Check a value as a domain's name; null is none.

    Raises:
        InputError: it is no text.
    """
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where} is {_shown(value)}, but a domain is text (see input.domain_field)")
    return value or ""


def _parse_text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where} is {_shown(value)}, but content 'text' needs text")
    return value


def _parse_messages(value: Any, where: str) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InputError(f"{where} is {_shown(value)}, but content 'messages' needs a list of {{role, content}}")
    return [_parse_message(message, f"{where}[{index}]") for index, message in enumerate(value)]


def _parse_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {_shown(message)}, but a message is an object with `role` and `content`")
    # A table gives null for every key that any message of the column has; a JSON file leaves it out. Both mean the same.
    fields = {str(name): value for name, value in message.items() if value is not None}
    role, content = fields.get("role"), fields.setdefault("content", "")
    if role not in ROLES[1:]:
        raise InputError(f"{where}.role is {_shown(role)}, but must be one of {', '.join(ROLES[1:])}")
    if not isinstance(content, str):
        raise InputError(f"{where}.content is {_shown(content)}, but must be text")
    return fields


def _parse_ids(value: Any, where: str) -> NDArray[np.int64]:
    if value is None:
        return np.zeros(0, np.int64)
    if isinstance(value, np.ndarray) and value.ndim == 1 and np.issubdtype(value.dtype, np.integer):
        return value.astype(np.int64)
    if not isinstance(value, list):
        raise InputError(f"{where} is {_shown(value)}, but content 'ids' needs a list of token ids")
    for index, token_id in enumerate(value):
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise InputError(f"{where}[{index}] is {_shown(token_id)}, but a token id is a whole number from 0 on")
    return np.array(value, np.int64)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
