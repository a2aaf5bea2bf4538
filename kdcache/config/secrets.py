"""Refuse secrets in a config, because it is written into caches and runs that are shared. See `kdcache.credentials`."""

from __future__ import annotations

from typing import Any

import msgspec

from kdcache.credentials import MASK, find_secret, is_secret_name


def refuse_secrets(fields: Any, written_to: str) -> None:
    """Raise ValueError for a secret in a config, naming the field and not its value."""
    path = find_secret(msgspec.to_builtins(fields))
    if path is not None:
        raise ValueError(
            f"{path} looks like a secret, by name or value, and would be written into {written_to}; remove it, and set it in "
            "the environment variable or credentials file of the service"
        )


def without_secrets(value: Any, name: str = "") -> Any:
    """Plain values with secrets masked, by name and by look."""
    if isinstance(value, dict):
        return {key: without_secrets(child, name if name and is_secret_name(name) else key) for key, child in value.items()}
    if isinstance(value, list):
        return [without_secrets(child, name) for child in value]
    return MASK if isinstance(value, str) and find_secret(value, name) is not None else value
