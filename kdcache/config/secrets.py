"""Configs are written into caches and runs, which are shared: a secret in one is refused. What a secret is: `credentials`."""

from __future__ import annotations

from typing import Any

import msgspec

from kdcache.credentials import MASK, find_secret, is_secret_name


def refuse_secrets(fields: Any, written_to: str) -> None:
    """Raise ValueError, naming the field and not its value, where a config holds a secret."""
    path = find_secret(msgspec.to_builtins(fields))
    if path is not None:
        raise ValueError(
            f"{path} is a secret by its name or its look, and would be written into {written_to}; leave it out, and set it in "
            "the environment variable or the credentials file of what reads it"
        )


def without_secrets(value: Any, name: str = "") -> Any:
    """Plain values with the secrets among them masked, by name and by look."""
    if isinstance(value, dict):
        return {key: without_secrets(child, name if name and is_secret_name(name) else key) for key, child in value.items()}
    if isinstance(value, list):
        return [without_secrets(child, name) for child in value]
    return MASK if isinstance(value, str) and find_secret(value, name) is not None else value
