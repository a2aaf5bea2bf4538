"""The tokenizer protocol: text or chat messages in, token ids out, with who wrote each token.

`kdcache.teacher.load_tokenizer` gives one; `_hf_tokenizer.py` and `fake.py` hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.format.manifest import TokenizerIdentity
from kdcache.format.record import ROLES

Message = Mapping[str, Any]
"""{"role": one of CHAT_ROLES, "content": text}; further keys are the template's affair."""

CHAT_ROLES = ROLES[1:]
"""Who can write a message: all of ROLES but `none`."""

ROLE_CODES = {name: code for code, name in enumerate(ROLES)}


@dataclass(frozen=True, slots=True, eq=False)
class ChatTokens:
    """A chat as its template writes it, N tokens, in M turns.

    Attributes:
        input_ids: (N,) int32.
        roles: (N,) uint8, index into `kdcache.format.record.ROLES`, who wrote token t; `none` for what the template adds.
        turn_starts: (M,) int32, ascending: the first token of each turn, its header included; turn 0 starts at 0. A message
            that the template cannot render without its successor (a system prompt that it folds into the user's turn) is
            part of the successor's turn.
        assistant_mask: (N,) bool, whether the assistant produces token t: its end-of-turn token is included, the header that
            the generation prompt holds and what follows the end of the turn are not.
    """

    input_ids: NDArray[np.int32]
    roles: NDArray[np.uint8]
    turn_starts: NDArray[np.int32]
    assistant_mask: NDArray[np.bool_]


class Tokenizer(Protocol):
    """See the module's docstring."""

    @property
    def identity(self) -> TokenizerIdentity:
        """Fingerprints of its meaning."""
        ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, never truncated or padded."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> ChatTokens:
        """Token ids of a chat, through the chat template.

        Raises:
            InputError: malformed messages, no template, or a template that refuses these messages or whose text does not tell
                which part is the assistant's.
        """
        ...

    def encode_prompt(self, messages: Sequence[Message]) -> ChatTokens:
        """Token ids of a chat up to where the assistant's answer starts, through the chat template's generation prompt.

        The last turn is the assistant's, with its header, if it has one: its start may be the number of tokens. Nothing is
        in the assistant mask but the assistant's turns before.

        Raises:
            InputError: as `encode_chat`.
        """
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text or an answer; none where the tokenizer names none."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        ...


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as plain dicts.

    Raises:
        InputError: not a list, an empty list, or a message without a known role and a text; says which message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"messages must be a list of {{role, content}}, not {type(messages).__name__}")
    if not messages:
        raise InputError("messages is an empty list; a chat has at least one message")
    return [_check_message(number, message) for number, message in enumerate(messages)]


def _check_message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"message {number} must be a {{role, content}}, not {type(message).__name__}")
    for name in ("role", "content"):
        if name not in message:
            raise InputError(f"message {number} has no {name!r}; its keys are {sorted(map(str, message))}")
    if message["role"] not in CHAT_ROLES:
        raise InputError(f"message {number} has the role {message['role']!r}; expected one of {', '.join(CHAT_ROLES)}")
    if not isinstance(message["content"], str):
        raise InputError(f"message {number}: content must be text, not {type(message['content']).__name__}")
    return dict(message)
