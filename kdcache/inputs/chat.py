"""A chat as data: messages, and what else its item says that decides what a model reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kdcache.errors import InputError

Message = Mapping[str, Any]
"""{"role": who, "content": text}; further keys are for the template, except those of LEARN_KEYS."""

LEARN_KEYS = ("weight", "train", "training")
"""Keys of a message that say whether it is learnt: 1 or true, 0 or false. Templates do not see them."""


@dataclass(frozen=True, slots=True)
class Chat:
    """One chat.

    Attributes:
        messages: in order.
        tools: what the assistant may call, for the template; None for none.
        documents: what it may look things up in, for the template; None for none.
        arguments: further variables of the template.
        unused: sentences about what else the item holds and nobody uses.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def num_chars(self) -> int:
        """Count the characters of everything the messages say."""
        return sum(len(text) for message in self.messages for name, value in message.items() if name != "role"
                   for text in texts_of(value))  # fmt: skip

    @property
    def is_empty(self) -> bool:
        """Whether nobody says anything."""
        return self.num_chars == 0

    def answers(self) -> Iterator[tuple[int, Chat]]:
        """Yield (index, the chat up to it) of each assistant message that is learnt; in that chat it alone is."""
        for index, message in enumerate(self.messages):
            if message["role"] == "assistant" and is_learnt(message, f"message {index}"):
                before = [each | {LEARN_KEYS[0]: 0} if each["role"] == "assistant" else each for each in self.messages[:index]]
                cleared = [{name: value for name, value in each.items() if name not in LEARN_KEYS[1:]} for each in before]
                yield index, replace(self, messages=[*cleared, message])

    def to_builtins(self) -> Any:
        """Give what a fingerprint is made of: the messages alone if there is nothing else."""
        extras = {"tools": self.tools, "documents": self.documents, "arguments": dict(self.arguments)}
        extras = {name: value for name, value in extras.items() if value}
        return {"messages": self.messages, **extras} if extras else self.messages


def is_learnt(message: Message, where: str) -> bool:
    """Whether a message is learnt, by its LEARN_KEYS; true where it has none.

    Raises:
        InputError: one that is neither 0 nor 1, or two that disagree.
    """
    said = {name: message[name] for name in LEARN_KEYS if message.get(name) is not None}
    for name, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise InputError(f"{where}.{name} is {value!r}, but must be 0 or 1 (false or true)")
    if len({bool(value) for value in said.values()}) > 1:
        raise InputError(f"{where}: {' and '.join(said)} disagree about whether the message is learnt; keep one of them")
    return all(said.values())


def says_nothing(message: Message) -> bool:
    """Whether a message is the assistant's, is learnt, and has neither words nor calls."""
    if message["role"] != "assistant" or message.get("tool_calls") or not is_learnt(message, "a message"):
        return False
    return not any(map(str.strip, texts_of({**message, "role": ""})))


def texts_of(value: Any) -> Iterator[str]:
    """Yield every text in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from texts_of(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from texts_of(child)
