"""What may be asked of a chat template."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

RESERVED_ARGUMENTS = frozenset(
    {
        "messages", "conversation", "tools", "documents", "add_generation_prompt", "strftime_now", "chat_template", "tokenize",
        "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip
"""Names that a template's further arguments cannot have: they are given in another way, or are no arguments of the template."""


def check_arguments(names: Iterable[str]) -> None:
    """Raise ValueError where an argument of the template is not the user's to set."""
    for name in names:
        if name in RESERVED_ARGUMENTS:
            raise ValueError(f"template_arguments holds {name!r}, which is given in another way; leave it out")


def parse_moment(text: str) -> datetime:
    """A moment from `2026-01-31` or `2026-01-31T12:00:00`; raises ValueError where it is none."""
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"template_time is {text!r}, but must be as in 2026-01-31 or 2026-01-31T12:00:00") from error
