"""Token ids of chats that a cache holds instead of ids, made with the chat template of a named tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.foreign.formats.tables import Table, plain
from kdcache.inputs.chat_items import parse_messages, without_nulls
from kdcache.teacher.tokenizer import Tokenizer

NAMES = ("messages", "messages_combined", "conversations", "conversation", "chat")


def find_messages(table: Table) -> str | None:
    """The column of chats: one of the usual names, or any whose cells are lists of {role, content}; None for none."""
    names = [name for name in NAMES if name in table.columns] + [name for name in table.columns if name not in NAMES]
    for item in table.first_items(names):
        for name in names:
            cell = plain(item.get(name)) if _may_be_chat(item.get(name)) else None
            if isinstance(cell, list) and cell and isinstance(cell[0], dict) and {"role", "content"} <= cell[0].keys():
                return name
    return None


def chat_ids(cell: Any, tokenizer: Tokenizer | None, where: str) -> NDArray[np.int64] | None:
    """(N,) ids of one chat; None for a null cell, or without a tokenizer.

    Raises:
        InputError: no chat, or one that the template refuses.
    """
    messages = plain(cell)
    if messages is None or tokenizer is None:
        return None
    try:
        return tokenizer.encode_chat(parse_messages(without_nulls(messages), "messages")).input_ids.astype(np.int64)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def prompt_ids(messages: Any, tokenizer: Tokenizer, where: str) -> list[int]:
    """Ids of a chat up to where the assistant's answer starts.

    Raises:
        InputError: no chat, or one that the template refuses.
    """
    try:
        return tokenizer.encode_prompt(messages).input_ids.tolist()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _may_be_chat(cell: Any) -> bool:
    return not isinstance(cell, pa.Scalar) or pa.types.is_struct(getattr(cell.type, "value_type", pa.null()))
