"""The tokenizer protocol: text or chat messages in, token ids out, with who wrote each token.

`kdcache.teacher.load_tokenizer` gives one; `chat/hf_tokenizer.py` and `fake.py` hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.format.manifest import TokenizerIdentity
from kdcache.format.record import ROLES
from kdcache.inputs.chat import LEARN_KEYS, Chat, Message, is_learnt

CHAT_ROLES = (*ROLES[1:], "developer")
"""Who can write a message: all of ROLES but `none`; and `developer`, whose words are counted as the system's."""

ROLE_CODES = {name: code for code, name in enumerate(ROLES)} | {"developer": ROLES.index("system")}


@dataclass(frozen=True, slots=True, eq=False)
class ChatTokens:
    """A chat as its template writes it, N tokens, in M turns.

    Attributes:
        input_ids: (N,) int32.
        roles: (N,) uint8, index into `kdcache.format.record.ROLES`, who wrote token t; `none` for what the template adds.
        turn_starts: (M,) int32, ascending: the first token of each turn, its header included; turn 0 starts at 0. A message
            that the template cannot render without its successor (a system prompt that it folds into the user's turn) is
            part of the successor's turn.
        assistant_mask: (N,) bool, whether the assistant produces token t and is to be learnt: its end-of-turn token is
            included, the header that the generation prompt holds and what follows the end of the turn are not; nor are messages
            of weight 0, and where the template has generation tags, what is outside them but for the end-of-turn token.
        excluded: (N,) bool, whether token t is of a message of weight 0: not to be learnt, whatever else is.
        notes: sentences about what the chat says and the template does not write, and the like: one for each kind.
    """

    input_ids: NDArray[np.int32]
    roles: NDArray[np.uint8]
    turn_starts: NDArray[np.int32]
    assistant_mask: NDArray[np.bool_]
    excluded: NDArray[np.bool_]
    notes: tuple[str, ...] = ()


class Tokenizer(Protocol):
    """See the module's docstring."""

    @property
    def identity(self) -> TokenizerIdentity:
        """Fingerprints of its meaning."""
        ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, never truncated or padded."""
        ...

    @property
    def template_variables(self) -> frozenset[str]:
        """Names that the chat template reads; none where there is none."""
        ...

    @property
    def reads_clock(self) -> bool:
        """Whether the chat template writes what the time is."""
        ...

    def set_clock(self, moment: datetime) -> None:
        """Tell the chat template that it is this moment, from now on."""
        ...

    def encode_chat(self, chat: Chat | Sequence[Message]) -> ChatTokens:
        """Token ids of a chat, through the chat template.

        Raises:
            InputError: malformed messages, no template, or a template that refuses these messages or whose text does not prove
                which part is the assistant's.
        """
        ...

    def encode_prompt(self, chat: Chat | Sequence[Message]) -> ChatTokens:
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


def check_chat(chat: Any) -> Chat:
    """The chat, or the messages as one.

    Raises:
        InputError: not a list, an empty list, or a message without a known role and a text; says which message.
    """
    messages = chat.messages if isinstance(chat, Chat) else chat
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"messages must be a list of {{role, content}}, not {type(messages).__name__}")
    if not messages:
        raise InputError("messages is an empty list; a chat has at least one message")
    checked = [_check_message(number, message) for number, message in enumerate(messages)]
    return replace(chat, messages=checked) if isinstance(chat, Chat) else Chat(checked)


def _check_message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"message {number} must be a {{role, content}}, not {type(message).__name__}")
    if "role" not in message:
        raise InputError(f"message {number} has no 'role'; its keys are {sorted(map(str, message))}")
    if message["role"] not in CHAT_ROLES:
        raise InputError(f"message {number} has the role {message['role']!r}; expected one of {', '.join(CHAT_ROLES)}")
    if len(message.keys() - {"role", *LEARN_KEYS}) == 0:
        raise InputError(f"message {number} has no 'content'; its keys are {sorted(map(str, message))}")
    if not isinstance(message.get("content", ""), str):
        raise InputError(f"message {number}: content must be text, not {type(message['content']).__name__}")
    is_learnt(message, f"message {number}")
    return dict(message)
