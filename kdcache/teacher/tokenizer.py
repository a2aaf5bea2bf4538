"""The tokenizer protocol: text or chat messages in, token ids out, with who wrote each token.

`kdcache.teacher.load_tokenizer` gives one; `chat/hf_tokenizer.py` and `fake.py` implement it.
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
"""Who can write a message: all of ROLES except `none`, and `developer`, which counts as the system."""

ROLE_CODES = {name: code for code, name in enumerate(ROLES)} | {"developer": ROLES.index("system")}


@dataclass(frozen=True, slots=True, eq=False)
class ChatTokens:
    """A chat as its template writes it, in N tokens.

    Attributes:
        input_ids: (N,) int32.
        roles: (N,) uint8, index into `kdcache.format.record.ROLES`: who wrote token t; `none` for what the template adds.
        turn_starts: int32, ascending: the first token of each turn, its header included; turn 0 starts at 0. A message that the
            template cannot render without the next one (a system prompt that it folds into the user's turn) is part of the next
            one's turn.
        assistant_mask: (N,) bool, whether the assistant produces token t and it is to be learnt. Its end-of-turn token counts.
            Not so the header that the generation prompt holds, what follows the end of the turn, messages of weight 0, and,
            where the template has generation tags, what is outside them, except for the end-of-turn token.
        excluded: (N,) bool, whether token t belongs to a message of weight 0: never to be learnt.
        notes: sentences about what the chat says and the template leaves out, and the like: one for each kind.
    """

    input_ids: NDArray[np.int32]
    roles: NDArray[np.uint8]
    turn_starts: NDArray[np.int32]
    assistant_mask: NDArray[np.bool_]
    excluded: NDArray[np.bool_]
    notes: tuple[str, ...] = ()


class Tokenizer(Protocol):
    """Turns text and chats into token ids; see the module's docstring."""

    @property
    def identity(self) -> TokenizerIdentity:
        """Its name, its sizes, and fingerprints of what it means."""
        ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The token ids of a text, never truncated or padded."""
        ...

    @property
    def template_variables(self) -> frozenset[str]:
        """The names that the chat template reads; empty without a template."""
        ...

    @property
    def reads_clock(self) -> bool:
        """Whether the chat template writes the current time."""
        ...

    def set_clock(self, moment: datetime) -> None:
        """Set the time that the chat template sees from now on."""
        ...

    def encode_chat(self, chat: Chat | Sequence[Message]) -> ChatTokens:
        """The token ids of a chat, through the chat template.

        Raises:
            InputError: malformed messages, no template, a template that refuses these messages, or one whose text does not
                prove which part is the assistant's.
        """
        ...

    def encode_prompt(self, chat: Chat | Sequence[Message]) -> ChatTokens:
        """The token ids of a chat up to where the assistant's answer starts, through the template's generation prompt.

        The last turn is the assistant's, with its header if it has one; without one it starts where the tokens end. The
        assistant mask holds the assistant's earlier turns only.

        Raises:
            InputError: as `encode_chat`.
        """
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text or an answer; empty if the tokenizer names none."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        ...

    @property
    def underlying(self) -> Any:
        """The tokenizer of `transformers`, for an engine that takes one; None if this is another kind."""
        ...


def check_chat(chat: Any) -> Chat:
    """Check a chat, or messages, and give them as a chat.

    Raises:
        InputError: not a list, an empty list, or a message without a known role and a text; names the message.
    """
    messages = chat.messages if isinstance(chat, Chat) else chat
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"messages must be a list of {{role, content}}, not {type(messages).__name__}")
    if not messages:
        raise InputError("messages is an empty list; a chat has at least one message")
    checked = [_check_message(index, message) for index, message in enumerate(messages)]
    return replace(chat, messages=checked) if isinstance(chat, Chat) else Chat(checked)


def _check_message(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"message {index} must be a {{role, content}}, not {type(message).__name__}")
    if "role" not in message:
        raise InputError(f"message {index} has no 'role'; its keys are {sorted(map(str, message))}")
    if message["role"] not in CHAT_ROLES:
        raise InputError(f"message {index} has the role {message['role']!r}; expected one of {', '.join(CHAT_ROLES)}")
    if len(message.keys() - {"role", *LEARN_KEYS}) == 0:
        raise InputError(f"message {index} has no 'content'; its keys are {sorted(map(str, message))}")
    if not isinstance(message.get("content", ""), str):
        raise InputError(f"message {index}: content must be text, not {type(message['content']).__name__}")
    is_learnt(message, f"message {index}")
    return dict(message)
