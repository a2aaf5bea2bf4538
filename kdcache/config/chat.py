"""Arguments and the clock of a chat template, checked."""

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
"""Names that a user's template arguments cannot have: kdcache sets them, or they are not arguments of the template."""


def check_arguments(names: Iterable[str]) -> None:
    """Raise ValueError for a template argument that users cannot set."""
    for name in names:
        if name in RESERVED_ARGUMENTS:
            raise ValueError(f"template_arguments holds {name!r}, which kdcache sets itself; leave it out")


def parse_moment(text: str) -> datetime:
    """Parse `2026-01-31` or `2026-01-31T12:00:00`; raises ValueError for anything else."""
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"template_time is {text!r}, expected a date or time as in 2026-01-31 or 2026-01-31T12:00:00"
        ) from error
