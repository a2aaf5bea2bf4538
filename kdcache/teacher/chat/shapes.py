"""One chat on its way through a template: marked, in the shape that the template takes, with notes about what is lost.

Templates differ in what they take: a message without content as "" or as null, the arguments of a call as an object or as JSON
text, content as text or as a list of parts, the role `developer` or not. The text shows whether a shape is right: all that the
messages say is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from kdcache.inputs.chat import LEARN_KEYS, Chat, Message, texts_of
from kdcache.teacher.chat.marked_text import GENERATED, MarkedText, mark, offsets_of, origins_of, runs, sources_of
from kdcache.teacher.chat.rendered import Rendered

RenderTemplate = Callable[[Mapping[str, Any]], MarkedText]


class MarkedChat:
    """A chat in one shape. Renderings are kept, since the same beginnings are needed again and again.

    Attributes:
        plain: the messages as the template sees them, without marks.
        messages: the same, marked.
        failure: what the template raised last; None if it has not.
    """

    def __init__(self, plain: Sequence[Message], variables: Mapping[str, Any], render: RenderTemplate) -> None:
        self.plain = list(plain)
        self.failure: Exception | None = None
        self._variables, self._render_template = variables, render
        self._sources: list[tuple[int, str]] = []
        self._texts: list[str] = []
        self._rendered: dict[tuple[int, bool, bool], Rendered | None] = {}
        self.messages: list[Message] = [self._mark(index, message) for index, message in enumerate(plain)]

    def render(self, messages: Sequence[Message], generation_prompt: bool) -> Rendered | None:
        """Render a beginning of the chat, with or without one foreign message; None if the template refuses it."""
        num_messages = len(messages)
        is_own = num_messages == 0 or (num_messages <= len(self.messages) and messages[-1] is self.messages[num_messages - 1])
        key = (num_messages, generation_prompt, is_own)
        if key not in self._rendered:
            given = list(messages) if is_own else [*messages[:-1], self._mark(num_messages - 1, messages[-1])]
            self._rendered[key] = self._render(given, generation_prompt)
        return self._rendered[key]

    def lost_keys(self, rendered: Rendered) -> list[tuple[int, str]]:
        """The (message, key) of what a message says and the text does not show: none of its characters is there."""
        there = set(np.unique(sources_of(rendered.origins)).tolist())
        said: dict[tuple[int, str], bool] = {}
        for source, part_of in enumerate(self._sources):
            said[part_of] = said.get(part_of, False) or source in there
        # Trimmed white space is not a loss.
        words = {part_of for part_of in said if any(map(str.strip, texts_of(self.plain[part_of[0]][part_of[1]])))}
        return [part_of for part_of, is_there in said.items() if not is_there and part_of in words]

    def lost_parts(self, rendered: Rendered) -> list[tuple[int, str, str]]:
        """The (message, key, words) of parts that the text leaves out of what it otherwise shows, such as thoughts.

        What the template writes itself instead, such as `<think>`, is not lost.
        """
        there = np.unique(rendered.origins)
        sources, found = sources_of(there), []
        for source, (part_of, text) in enumerate(zip(self._sources, self._texts, strict=True)):
            kept = offsets_of(there[sources == source])
            is_lost = np.ones(len(text), np.bool_)
            is_lost[kept] = False
            parts = [text[start:stop].strip() for start, stop in runs(is_lost)] if len(kept) else []
            found += [(*part_of, part) for part in parts if any(map(str.isalnum, part)) and part not in rendered.text]
        return found

    def _render(self, messages: list[Message], generation_prompt: bool) -> Rendered | None:
        try:
            text = self._render_template({**self._variables, "messages": messages, "add_generation_prompt": generation_prompt})
        except Exception as error:  # a template is a program: it may raise anything
            self.failure = error
            return None
        table, marked = np.array([*(message for message, _ in self._sources), -1]), origins_of(text)
        origins = marked & ~GENERATED
        return Rendered(str.__str__(text), table[sources_of(origins)], origins, (marked & GENERATED) != 0)

    def _mark(self, index: int, message: Message) -> Message:
        return {name: value if name == "role" else self._marked(value, index, name) for name, value in message.items()}

    def _marked(self, value: Any, index: int, name: str) -> Any:
        if isinstance(value, str):
            self._sources.append((index, name))
            self._texts.append(value)
            return mark(value, len(self._sources) - 1)
        if isinstance(value, Mapping):
            return {key: self._marked(child, index, name) for key, child in value.items()}
        return [self._marked(child, index, name) for child in value] if isinstance(value, (list, tuple)) else value


def shapes(chat: Chat, template_source: str) -> list[list[Message]]:
    """The messages in the shapes that templates take, the usual one first."""
    shown = [{name: value for name, value in message.items() if name not in LEARN_KEYS} for message in chat.messages]
    if "developer" not in template_source:
        shown = [message | {"role": "system"} if message["role"] == "developer" else message for message in shown]
    # Arguments of a call are an object by transformers' convention, and JSON text by OpenAI's.
    parsed = [_with_arguments(message, as_text=False) for message in shown]
    texts = [_with_arguments(message, as_text=True) for message in shown]
    found = [
        [_with_content(message, content) for message in messages] for messages in (parsed, texts) for content in ("", None)
    ]
    found.append([message | {"content": _parts(message["content"])} for message in found[0]])
    different: list[list[Message]] = []
    for shape in found:
        different += [shape] * (shape not in different)
    return different


def _with_arguments(message: Message, *, as_text: bool) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call_with_arguments(call, as_text=as_text) for call in calls]}


def _call_with_arguments(call: Any, *, as_text: bool) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_with_arguments(call["function"], as_text=as_text)}
    arguments = call.get("arguments")
    if as_text and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if not as_text and isinstance(arguments, str):
        with suppress(ValueError):
            parsed = json.loads(arguments)
            return {**call, "arguments": parsed} if isinstance(parsed, Mapping) else call
    return call


def _with_content(message: Message, content: str | None) -> Message:
    # With calls, "" says the same as nothing, and some templates write calls only next to null.
    is_given = message.get("content") or ("content" in message and not message.get("tool_calls"))
    return message if is_given else {**message, "content": content}


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) and content else content


def notes_of(
    chat: Chat, template: Any, lost: Sequence[tuple[int, str]], parts: Sequence[tuple[int, str, str]] = ()
) -> list[str]:
    """A sentence for each kind of thing that a chat holds and its template leaves out.

    Args:
        chat: as it came.
        template: a `ChatTemplate`.
        lost: the (message, key) of what the text does not show.
        parts: the (message, key, words) of what it shows only partly.
    """
    notes = [f"{name!r} of the item: the chat template does not read it" for name in chat.arguments
             if name not in template.variables]  # fmt: skip
    notes += [f"{name!r} of the item: the chat template does not read it" for name in ("tools", "documents")
              if getattr(chat, name) and name not in template.variables]  # fmt: skip
    unread = {
        (message["role"], name)
        for message in chat.messages
        for name, value in message.items()
        if name not in ("role", "content", *LEARN_KEYS)
        and name not in template.source
        and value not in (None, [], {})
        and not any(texts_of(value))
    }
    kinds = {(chat.messages[index]["role"], name) for index, name in lost} | unread
    for role, name in sorted(kind for kind in kinds if kind[1] != "tool_call_id"):  # which call: the order says it
        notes.append(f"{name!r} of a message of role {role!r}: the chat template does not write it")
    for role, name in sorted({(chat.messages[index]["role"], name) for index, name, _ in parts}):
        notes.append(f"a part of {name!r} of a message of role {role!r}, such as its thoughts: the chat template leaves it out")
    return [*notes, *chat.unused]
