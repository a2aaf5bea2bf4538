"""Which part of a rendered chat is whose: by rendering its beginnings. Characters only; no tokenizer, no template engine.

A chat template is a program that gives one text for all messages. Where the text of messages[:i] is the beginning of the whole
text, message i's part starts at its end; where the text of messages[:i] with the generation prompt is, the assistant's own
tokens start there. Both are checked, never assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kdcache.errors import InputError
from kdcache.teacher.tokenizer import Message

Render = Callable[[Sequence[Message], bool], "str | None"]
"""(messages, add_generation_prompt) -> text; None where the template refuses these messages."""


@dataclass(slots=True)
class ChatSpans:
    """Character ranges of a rendered chat.

    Attributes:
        turn_starts: where each turn starts, its header included; ascending, the first is 0.
        contents: (role, start, end) of what somebody wrote; between them is the template's own text. The assistant's reach from
            the end of the generation prompt to the end of the turn.
    """

    turn_starts: list[int] = field(default_factory=list)
    contents: list[tuple[str, int, int]] = field(default_factory=list)


def find_spans(messages: Sequence[Message], text: str, render: Render) -> ChatSpans:
    """Locate every message in the rendered text.

    A message that cannot be rendered without its successor (templates that fold the system prompt into the user's turn, or that
    refuse a chat without a user) shares its successor's turn.

    Args:
        messages: the whole chat.
        text: `render(messages, False)`.
        render: gives the text of a beginning of the chat.

    Raises:
        InputError: the start or the end of an assistant's message cannot be told.
    """
    spans = ChatSpans()
    start, waiting = 0, []
    for index, message in enumerate(messages):
        waiting.append(message)
        if message["role"] == "assistant":
            begin = _prefix_length(messages[:index], True, text, render)
            end = len(text) if index + 1 == len(messages) else _prefix_length(messages[: index + 1], False, text, render)
            if begin is None or end is None or not start <= begin <= end:
                raise InputError(_unclear(index, "starts" if begin is None else "ends"))
            spans.contents.append(("assistant", begin, end))
        else:
            end = _end_of_turn(messages, index, text, render)
            if end is None or end < start:
                continue
            spans.contents += _locate(waiting, text, start, end)
        spans.turn_starts.append(start)
        start, waiting = end, []
    return spans


def _end_of_turn(messages: Sequence[Message], index: int, text: str, render: Render) -> int | None:
    if index + 1 == len(messages):
        return len(text)
    end = _prefix_length(messages[: index + 1], False, text, render)
    if end is None and messages[index + 1]["role"] == "assistant":
        # The assistant's header is then counted to this turn; it is the template's own text in either.
        return _prefix_length(messages[: index + 1], True, text, render)
    return end


def _prefix_length(messages: Sequence[Message], generation_prompt: bool, text: str, render: Render) -> int | None:
    prefix = render(messages, generation_prompt)
    return None if prefix is None or not text.startswith(prefix) else len(prefix)


def _locate(messages: Sequence[Message], text: str, start: int, end: int) -> list[tuple[str, int, int]]:
    """Each message's content inside text[start:end], in order; one that the template rewrote is not found and left out."""
    found: list[tuple[str, int, int]] = []
    for message in messages:
        content = message["content"].strip()
        place = text.find(content, start, end) if content else -1
        if place >= 0:
            start = place + len(content)
            found.append((message["role"], place, start))
    return found


def _unclear(index: int, what: str) -> str:
    return (
        f"the chat template does not show where the assistant's message {index} {what}: the text of the messages before "
        "is not the beginning of the whole text; set input.chat_template to a template with {% generation %} tags"
    )
