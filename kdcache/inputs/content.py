"""An item: the checked value of a field, in the one form that everything after reading knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.format.record import PREFERENCES
from kdcache.inputs.chat import Chat
from kdcache.inputs.chat_items import chat_of, content_names, parse_messages, read_names, shapes, shown

DEFAULT_FIELDS = {"text": "text", "messages": "messages", "ids": "input_ids"}

Content = str | Chat | NDArray[np.int64]
"""text: a str; messages: a chat; ids: (N,) int64, not yet checked against a vocabulary."""


class Fields(NamedTuple):
    """Which columns or keys of an item are read.

    Attributes:
        content: the column or key that holds it.
        kind: `text`, `messages` or `ids`.
        domain: the column or key of the item's domain; None for none.
        group, preference: those of the group of answers that it belongs to, and of whether it was chosen; None for none.
        variables: names that the chat template reads, for chats.
        is_named: whether the user named the column or key of the content.
    """

    content: str
    kind: str
    domain: str | None = None
    variables: frozenset[str] = frozenset()
    is_named: bool = True
    group: str | None = None
    preference: str | None = None

    @property
    def mark_names(self) -> list[str]:
        """List the columns or keys of what an item is marked with, next to its content."""
        return [name for name in (self.domain, self.group, self.preference) if name is not None]

    @property
    def names(self) -> list[str]:
        """List the columns or keys that must exist; for a chat whose column is looked for, see `content_names`."""
        return [self.content, *self.mark_names]

    def content_names(self, there: Sequence[str]) -> list[str]:
        """List the names there that the content is made of; if there are none, the one that should be there."""
        found = content_names(there, self.content if self.is_named else None) if self.kind == "messages" else []
        return found or [self.content]

    def read_names(self, there: Sequence[str]) -> list[str]:
        """List the names there that are read, and those that must be there."""
        chat = read_names(there, self.content if self.is_named else None, self.variables) if self.kind == "messages" else []
        return list(dict.fromkeys([*self.content_names(there), *chat, *self.mark_names]))

    def advice(self, name: str, there: Sequence[str]) -> str:
        """Say what to do about a missing name: the config key that asked for it, and the shapes of a chat."""
        option = f"see {self.option(name)}"
        if self.kind != "messages" or name != self.content or self.is_named:
            return option
        return f"{option}; {shapes(there)}"

    def option(self, name: str) -> str:
        """Name the config key that asked for one of the names."""
        options = {
            self.preference: "preference_field",
            self.group: "group_field",
            self.domain: "domain_field",
            self.content: "field",
        }
        return f"input.{options[name]}"


class Start(NamedTuple):
    """Where an item starts, so that reading can begin there.

    Attributes:
        file_index: of the sorted files; 0 for a dataset.
        offset: bytes into a text file; items into a table or dataset.
        item_index: of the item in its file (txt and tables: the offset; line files: the lines before it).
    """

    file_index: int
    offset: int
    item_index: int


BEGINNING = Start(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Item:
    """One text, chat or list of ids.

    Attributes:
        content: see Content; empty if the item holds nothing.
        source: for people: "corpus/a.jsonl:17" (line 17), "b.parquet#12" (item 12, from 0), "x.txt".
        start: where it starts.
        domain: what kind of text it is, if the input says so; else "".
        group: 16 bytes of the group of answers that it belongs to, if the input says so; else b"".
        preference: one of PREFERENCES.
    """

    content: Content
    source: str
    start: Start
    domain: str = ""
    group: bytes = b""
    preference: str = ""

    @property
    def num_chars(self) -> int:
        """Count the characters of its text, or the tokens of its ids: units are cut by this measure."""
        return self.content.num_chars if isinstance(self.content, Chat) else len(self.content)

    @property
    def is_empty(self) -> bool:
        """Whether a teacher has nothing to read: no text, message or id, or null."""
        return self.num_chars == 0

    def content_bytes(self) -> bytes:
        """Encode the content's meaning as bytes; they do not depend on the format it was read from."""
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
        where: file and line or item, and the field, for messages.

    Raises:
        InputError: the value, or a message of a chat, has another type.
    """
    if kind == "text":
        return _parse_text(value, where)
    if kind == "messages":
        return Chat([] if value is None else parse_messages(value, where))
    return _parse_ids(value, where)


def parse_item(item: Mapping[str, Any], fields: Fields, where: str, what: str, *, is_table: bool) -> Content:
    """Parse the content of an item.

    Args:
        item: what `fields.read_names` names of it.
        fields: what is read.
        where: file and line or item.
        what: an item's values are called: `field` or `column`.
        is_table: whether nulls in structs are keys that other items have.

    Raises:
        InputError: as `parse_content`.
    """
    if fields.kind == "messages":
        named = fields.content if fields.is_named else None
        return chat_of(item, named, f"{where}: {what}", is_table=is_table, variables=fields.variables)
    return parse_content(item[fields.content], fields.kind, f"{where}: {what} {fields.content!r}")


def parse_marks(item: Mapping[str, Any], fields: Fields, where: str) -> dict[str, Any]:
    """Check what an item is marked with, as keywords of `Item`; null means nothing.

    Args:
        item: what `fields.read_names` names of it.
        fields: what is read.
        where: file and line or item, and whether its values are fields or columns.

    Raises:
        InputError: a value of the wrong type, or a preference outside a group.
    """
    marks: dict[str, Any] = {}
    if fields.domain is not None:
        value = item[fields.domain]
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where} {fields.domain!r} is {shown(value)}, but a domain is text (see input.domain_field)")
        marks["domain"] = value or ""
    if fields.group is not None:
        marks["group"] = _group_of(item[fields.group], f"{where} {fields.group!r}")
    if fields.preference is not None:
        value = item[fields.preference]
        if value is not None and value not in PREFERENCES:
            raise InputError(
                f"{where} {fields.preference!r} is {shown(value)}, but a preference is 'chosen', 'rejected' or null (see "
                "input.preference_field)"
            )
        marks["preference"] = value or ""
        if marks["preference"] and not marks.get("group"):
            raise InputError(
                f"{where} {fields.preference!r} is {shown(value)}, but the item has no group (see input.group_field)"
            )
    return marks


def _group_of(value: Any, where: str) -> bytes:
    """16 bytes of a group's name: equal for equal names, a number and its digits apart."""
    if value is None:
        return b""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InputError(f"{where} is {shown(value)}, but a group is text or a whole number (see input.group_field)")
    return xxhash.xxh3_128(f"{type(value).__name__}:{value}".encode()).digest()


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
