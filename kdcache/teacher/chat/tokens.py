"""Carry who wrote which characters over to tokens, by the characters that they cover; checked by decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.inputs.chat import Chat, is_learnt
from kdcache.teacher.chat.marked_text import runs
from kdcache.teacher.chat.rendered import ChatSpans, Rendered, Whole
from kdcache.teacher.tokenizer import ROLE_CODES, ChatTokens


@dataclass(frozen=True)
class ChatEncoding:
    """A rendered chat as tokens.

    Attributes:
        input_ids_N: (N,) int32.
        offsets_N2: (N, 2) int64: the characters that each token covers, [start, end).
        special_ids: the special tokens of the tokenizer.
        end_ids: the tokens that end a text.
        decode: turns ids into text.
    """

    rendered: Rendered
    input_ids_N: NDArray[np.int32]
    offsets_N2: NDArray[np.int64]
    special_ids: NDArray[np.int64]
    end_ids: Sequence[int]
    decode: Callable[[Sequence[int]], str]

    def whole(self, *, has_tags: bool = False) -> Whole:
        """The text with its special tokens."""
        special = self._spans_of(np.append(self.special_ids, np.array(self.end_ids, np.int64)))
        return Whole(self.rendered, special, self._spans_of(np.array(self.end_ids, np.int64)), has_tags)

    def chat(self, chat: Chat, spans: ChatSpans, notes: Sequence[str]) -> ChatTokens:
        """Find roles, turns and masks.

        Raises:
            InputError: a token is partly the assistant's and partly somebody else's, or the tokens decode to something else.
        """
        num_tokens = len(self.input_ids_N)
        mask_N, excluded_N, roles_N = (
            np.zeros(num_tokens, np.bool_),
            np.zeros(num_tokens, np.bool_),
            np.zeros(num_tokens, np.uint8),
        )
        for index, start, end in spans.contents:
            message = chat.messages[index]
            inside_N = self._inside(index, start, end, strict=message["role"] == "assistant")
            roles_N[inside_N] = ROLE_CODES[message["role"]]
            if not is_learnt(message, f"message {index}"):
                excluded_N |= inside_N
        for index, start, end in spans.learnt:
            mask_N |= self._proven(index, start, end)
        return ChatTokens(
            self.input_ids_N, roles_N, self._turns(spans.turn_starts), mask_N & ~excluded_N, excluded_N, tuple(notes)
        )

    def prompt(self, chat: Chat, spans: ChatSpans, end: int, notes: Sequence[str]) -> ChatTokens:
        """The same for a prompt, whose last turn starts with the first token after `end`, or where the tokens end."""
        chat_tokens = self.chat(chat, ChatSpans(spans.turn_starts, spans.contents), notes)
        after_N = self._covered_N2[:, 1] > end
        header = int(np.argmax(after_N)) if after_N.any() else len(self.input_ids_N)
        starts = np.unique(np.append(chat_tokens.turn_starts, header)).astype(np.int32)
        return ChatTokens(
            self.input_ids_N, chat_tokens.roles, starts, chat_tokens.assistant_mask, chat_tokens.excluded, tuple(notes)
        )

    @cached_property
    def _covered_N2(self) -> NDArray[np.int64]:
        """The offsets, with empty ones widened to the characters between their neighbours.

        Some tokenizers say that a token of white space covers nothing.
        """
        covered = self.offsets_N2.copy()
        for index in np.flatnonzero(covered[:, 0] >= covered[:, 1]):
            if index > 0:
                covered[index, 0] = covered[index - 1, 1]
            later = self.offsets_N2[index + 1 :]
            filled = later[later[:, 0] < later[:, 1]]
            covered[index, 1] = filled[0, 0] if len(filled) else len(self.rendered.text)
        return covered

    @cached_property
    def _is_lossless(self) -> bool:
        return _squeezed(self.decode(self.input_ids_N.tolist())) == _squeezed(self.rendered.text)

    def _proven(self, index: int, start: int, end: int) -> NDArray[np.bool_]:
        """(N,) the tokens of a span, proven to decode to its text and nothing else."""
        inside_N = self._inside(index, start, end, strict=True)
        if len(runs(inside_N)) > 1:
            raise InputError(_mixed(index, "its tokens are not consecutive"))
        if self._is_lossless:
            said = self.decode(self.input_ids_N[inside_N].tolist())
            if _squeezed(said) != _squeezed(self.rendered.text[start:end]):
                raise InputError(_mixed(index, f"they decode to {said[:60]!r}"))
        return inside_N

    def _inside(self, index: int, start: int, end: int, *, strict: bool) -> NDArray[np.bool_]:
        """(N,) the tokens that cover any of text[start:end].

        If a token crosses a border and has only white space on one side, it belongs to the other side.

        Raises:
            InputError: strict, and there is more than white space on both sides.
        """
        starts_N, ends_N = self._covered_N2.T
        inside_N = (ends_N > start) & (starts_N < end)
        text = self.rendered.text
        for token in np.flatnonzero(inside_N & ((starts_N < start) | (ends_N > end))):
            first, last = int(starts_N[token]), int(ends_N[token])
            within = text[max(first, start) : min(last, end)].strip()
            outside = (text[first : min(last, start)] + text[max(first, end) : last]).strip()
            if not within:
                inside_N[token] = False
            elif outside and strict:
                raise InputError(_mixed(index, f"the token {text[first:last]!r} is partly the template's or somebody else's"))
        return inside_N

    def _turns(self, starts: Sequence[int]) -> NDArray[np.int32]:
        """The first token that covers anything at or after each character; turns without a token are left out."""
        ends_N = self._covered_N2[:, 1]
        first = [int(np.argmax(ends_N > start)) for start in starts if (ends_N > start).any()]
        return np.unique(np.append(np.int32(0), np.array(first[1:], np.int32))).astype(np.int32)

    def _spans_of(self, ids: NDArray[np.int64]) -> list[tuple[int, int]]:
        """The (start, end) of the template's own tokens with these ids, without the white space that they include."""
        found = []
        for token in np.flatnonzero(np.isin(self.input_ids_N, ids)):
            start, end = self.offsets_N2[token].tolist()
            text = self.rendered.text[start:end]
            start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
            if start < end and (self.rendered.message_indices[start:end] < 0).all():
                found.append((start, end))
        return found


def words_of(rendered: Rendered) -> list[tuple[int, int, int]]:
    """The (message, start, end) of all that somebody wrote, if nothing more is known."""
    writers = sorted(set(rendered.message_indices.tolist()) - {-1})
    return [(index, start, end) for index in writers for start, end in runs(rendered.message_indices == index)]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _mixed(index: int, what: str) -> str:
    return (
        f"it cannot be proven which tokens are the assistant's in message {index}: {what}; "
        "set input.chat_template to a template that keeps them apart"
    )
