"""A rendered chat as data: its text, whose each character is, its special tokens, and what is found in it."""

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
        text: C characters.
        message_C: (C,) which message each comes from; -1 for the template's own.
        origin_C: (C,) a number for each character of each message, the same in every rendering; 0 for the template's own.
        generated_C: (C,) whether it stands between generation tags.
    """

    text: str
    message_C: NDArray[np.int64]
    origin_C: NDArray[np.int64]
    generated_C: NDArray[np.bool_]

    def end_of_words(self) -> int:
        """Where the last message's last character ends; 0 where nobody wrote any."""
        own = np.flatnonzero(self.message_C >= 0)
        return int(own[-1]) + 1 if len(own) else 0


Render = Callable[[Sequence[Message], bool], "Rendered | None"]
"""(messages, add_generation_prompt) -> text; None where the template refuses these messages."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The text that the teacher reads.

    Attributes:
        special: (start, end) of each special token in it that is the template's own.
        ends: (start, end) of those of them that end a text, by the tokenizer.
        has_tags: whether the template has generation tags.
        lost_calls: messages whose calls of tools it does not write.
    """

    rendered: Rendered
    special: Sequence[tuple[int, int]]
    ends: Sequence[tuple[int, int]]
    has_tags: bool = False
    lost_calls: Collection[int] = ()

    def token(self, span: tuple[int, int]) -> str:
        """A special token's text."""
        return self.rendered.text[slice(*span)]

    def next_special(self, start: int) -> tuple[int, int] | None:
        """The special token that follows, if only white space is before it."""
        found = next((span for span in self.special if span[0] >= start), None)
        return found if found is not None and not self.rendered.text[start : found[0]].strip() else None


@dataclass(slots=True)
class ChatSpans:
    """Character ranges of a rendered chat.

    Attributes:
        turn_starts: where each turn starts, its header included; ascending, the first is 0.
        contents: (message, start, end) of what somebody wrote; of the assistant, from the end of what prompts it to the end of
            its turn.
        learnt: (message, start, end) of what the assistant is to be learnt of.
        endless: messages of the assistant after which the template writes no end token.
        empty: messages of the assistant that say nothing and whose end token cannot be proven: it is not learnt.
        lost: messages of the assistant of which the template leaves out what they say: they are not learnt.
    """

    turn_starts: list[int] = field(default_factory=lambda: [0])
    contents: list[tuple[int, int, int]] = field(default_factory=list)
    learnt: list[tuple[int, int, int]] = field(default_factory=list)
    endless: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
