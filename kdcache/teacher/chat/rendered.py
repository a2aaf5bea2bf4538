"""A rendered chat as data: its text, who wrote each character, its special tokens, and what is found in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kdcache.inputs.chat import Message


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat as its template writes it.

    Attributes:
        text: what the template writes.
        message_indices: for each character, which message it comes from; -1 for the template's own.
        origins: for each character of each message a number that is the same in every rendering; 0 for the template's own.
        is_generated: for each character, whether it stands between generation tags.
    """

    text: str
    message_indices: NDArray[np.int64]
    origins: NDArray[np.int64]
    is_generated: NDArray[np.bool_]

    def end_of_words(self) -> int:
        """Where the last character of any message ends; 0 if there is none."""
        own = np.flatnonzero(self.message_indices >= 0)
        return int(own[-1]) + 1 if len(own) else 0


Render = Callable[[Sequence[Message], bool], "Rendered | None"]
"""(messages, add_generation_prompt) -> text; None if the template refuses these messages."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The text that the teacher reads.

    Attributes:
        rendered: the text, and who wrote what.
        special: (start, end) of each special token that is the template's own.
        ends: (start, end) of those that end a text, by the tokenizer.
        has_tags: whether the template has generation tags.
        lost_calls: messages whose tool calls the template does not write.
    """

    rendered: Rendered
    special: Sequence[tuple[int, int]]
    ends: Sequence[tuple[int, int]]
    has_tags: bool = False
    lost_calls: Collection[int] = ()

    def token(self, span: tuple[int, int]) -> str:
        """The text of a special token."""
        return self.rendered.text[slice(*span)]

    def next_special(self, start: int) -> tuple[int, int] | None:
        """The next special token, if only white space precedes it."""
        found = next((span for span in self.special if span[0] >= start), None)
        return found if found is not None and not self.rendered.text[start : found[0]].strip() else None


@dataclass(slots=True)
class ChatSpans:
    """Character ranges of a rendered chat.

    Attributes:
        turn_starts: where each turn starts, its header included; ascending, the first is 0.
        contents: (message, start, end) of what somebody wrote; for the assistant, from the end of what prompts it to the end of
            its turn.
        learnt: (message, start, end) of what is to be learnt of the assistant.
        endless: messages of the assistant after which the template writes no end token.
        empty: messages of the assistant that say nothing and whose end token cannot be proven, so it is not learnt.
        lost: messages of the assistant whose words the template leaves out, so they are not learnt.
    """

    turn_starts: list[int] = field(default_factory=lambda: [0])
    contents: list[tuple[int, int, int]] = field(default_factory=list)
    learnt: list[tuple[int, int, int]] = field(default_factory=list)
    endless: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
