"""What an item is: the value of a field, checked, in the one shape that the rest of the capture knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.inputs.chat import Chat
from kdcache.inputs.chat_rows import chat_of, content_names, parse_messages, read_names, shapes, shown

DEFAULT_FIELDS = {"text": "text", "messages": "messages", "ids": "input_ids"}

Content = str | Chat | NDArray[np.int64]
"""text: a str; messages: a chat; ids: (N,) int64, not yet checked against a vocabulary."""


class Fields(NamedTuple):
    """What is read of a row or a line.

    Attributes:
        content: the column or key that holds it.
        kind: `text`, `messages` or `ids`.
        domain: the column or key of the item's domain; None where none is read.
        variables: of chats: names that the chat template reads.
        is_named: the user has named the content's column or key.
    """

    content: str
    kind: str
    domain: str | None = None
    variables: frozenset[str] = frozenset()
    is_named: bool = True

    @property
    def names(self) -> list[str]:
        """The columns or keys that must be there; for a chat whose column is looked for, see `content_names`."""
        return [self.content, *([] if self.domain is None else [self.domain])]

    def content_names(self, there: Sequence[str]) -> list[str]:
        """Of what is there, what the content is made of; the one name that it should have where it has none."""
        found = content_names(there, self.content if self.is_named else None) if self.kind == "messages" else []
        return found or [self.content]

    def read_names(self, there: Sequence[str]) -> list[str]:
        """Of what is there, all that is to be read; what must be there in any case."""
        chat = read_names(there, self.content if self.is_named else None, self.variables) if self.kind == "messages" else []
        domain = [] if self.domain is None else [self.domain]
        return list(dict.fromkeys([*self.content_names(there), *chat, *domain]))

    def advice(self, name: str, there: Sequence[str]) -> str:
        """What to do where one of the names is missing: the option that asked for it, and the shapes of a chat."""
        option = f"see {self.option(name)}"
        if self.kind != "messages" or name != self.content or self.is_named:
            return option
        return f"{option}; {shapes(there)}"

    def option(self, name: str) -> str:
        """The option that asked for one of the names."""
        return "input.field" if name == self.content else "input.domain_field"


class Start(NamedTuple):
    """Where an item starts, so that reading can begin there.

    Attributes:
        file_index: of the sorted files; 0 for a dataset.
        offset: bytes into a text file; rows into a table or dataset.
        item_index: of the item in its file (txt and tables: the offset; line files: the lines before it).
    """

    file_index: int
    offset: int
    item_index: int


BEGINNING = Start(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Item:
    """One text, chat or list of ids, as it came.

    Attributes:
        content: see Content; empty where the item holds nothing.
        source: for people: "corpus/a.jsonl:17" (line 17), "b.parquet#12" (row 12, from 0), "x.txt".
        start: where it starts.
        domain: what kind of text it is, as the input says; "" where it does not.
    """

    content: Content
    source: str
    start: Start
    domain: str = ""

    @property
    def num_chars(self) -> int:
        """Characters of its text, or tokens of its ids: the measure by which units are cut."""
        return self.content.num_chars if isinstance(self.content, Chat) else len(self.content)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing for a teacher to read: no text, no message, no id, or null."""
        return self.num_chars == 0

    def content_bytes(self) -> bytes:
        """The content's meaning as bytes, the same from whatever format it was read."""
        if isinstance(self.content, str):
            return self.content.encode()
        if isinstance(self.content, Chat):
            return msgspec.json.encode(self.content.to_builtins(), order="sorted")
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
        return Chat([] if value is None else parse_messages(value, where))
    return _parse_ids(value, where)


def parse_row(row: Mapping[str, Any], fields: Fields, where: str, what: str, *, is_table: bool) -> Content:
    """The content of a row.

    Args:
        row: what `fields.read_names` names of it.
        fields: what is read.
        where: file and line or row.
        what: a row's values are called: `field` or `column`.
        is_table: nulls in structs are keys that other rows have.

    Raises:
        InputError: as `parse_content`.
    """
    if fields.kind == "messages":
        named = fields.content if fields.is_named else None
        return chat_of(row, named, f"{where}: {what}", is_table=is_table, variables=fields.variables)
    return parse_content(row[fields.content], fields.kind, f"{where}: {what} {fields.content!r}")


def parse_domain(value: Any, where: str) -> str:
    """Check a value as a domain's name; null is none.

    Raises:
        InputError: it is no text.
    """
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where} is {shown(value)}, but a domain is text (see input.domain_field)")
    return value or ""


def _parse_text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where} is {shown(value)}, but content 'text' needs text")
    return value


def _parse_ids(value: Any, where: str) -> NDArray[np.int64]:
    if value is None:
        return np.zeros(0, np.int64)
    if isinstance(value, np.ndarray) and value.ndim == 1 and np.issubdtype(value.dtype, np.integer):
        return value.astype(np.int64)
    if not isinstance(value, list):
        raise InputError(f"{where} is {shown(value)}, but content 'ids' needs a list of token ids")
    for index, token_id in enumerate(value):
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise InputError(f"{where}[{index}] is {shown(token_id)}, but a token id is a whole number from 0 on")
    return np.array(value, np.int64)
