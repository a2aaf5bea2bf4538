"""Check the config of a served teacher, and find what config, model folder or server must say. No sockets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from kdcache.config.capture import TeacherConfig
from kdcache.config.server import ServerConfig
from kdcache.credentials import looks_secret, remember
from kdcache.errors import ConfigError

ENGINE_SETTINGS = ("engine_options", "num_threads")
"""Settings of an engine that we start ourselves."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MAX_NAME_CHARACTERS, MAX_NAMES = 1000, 20
"""The longest name of a model, which may be a path; and the most names of models in a message."""


def refuse_settings(config: TeacherConfig) -> None:
    """Raise ConfigError for an address that is invalid or holds a secret, and for settings of an engine that is not ours."""
    address = str(config.server.url)
    try:
        url = urlsplit(address)
        is_address = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError as error:
        raise ConfigError(f"teacher.server.url is {address!r}: {error}; expected one such as http://host:8000/v1") from error
    if not is_address:
        raise ConfigError(f"teacher.server.url is {address!r}, expected one such as http://host:8000/v1")
    if url.username or url.password or url.query or url.fragment:
        raise ConfigError(
            "teacher.server.url holds a user name, a password or parameters, which the cache's manifest would show; a key goes "
            "into an environment variable, named by teacher.server.api_key_env"
        )
    ours = TeacherConfig(model=config.model)
    for name in ENGINE_SETTINGS:
        value = getattr(config, name)
        if value != getattr(ours, name):
            raise ConfigError(f"teacher.{name} is {value!r}, but it cannot be set on a server; leave it out")


def api_key(server: ServerConfig) -> str | None:
    """The key for the server; raises ConfigError where it is named but not there."""
    if server.api_key_env is None:
        return None
    if _VARIABLE.fullmatch(server.api_key_env) is None or looks_secret(server.api_key_env):
        raise ConfigError("teacher.server.api_key_env is not the name of an environment variable; the key itself goes into one")
    key = os.environ.get(server.api_key_env, "").strip()
    remember(key, "api_key")
    if not key:
        raise ConfigError(f"teacher.server.api_key_env: the environment variable {server.api_key_env!r} is not set or is empty")
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"teacher.server.api_key_env: the variable {server.api_key_env!r} holds what no HTTP header can")
    return key


def choose_card(listed: Any, server: ServerConfig) -> dict[str, Any]:
    """The teacher's entry in /v1/models.

    Raises:
        ConfigError: it is not there, or there are several and the config names none.
    """
    data = listed.get("data") if isinstance(listed, Mapping) else None
    cards = [card for card in (data if isinstance(data, list) else []) if isinstance(card, dict) and _is_name(card.get("id"))]
    names = ", ".join(f"{card['id']!r:.100}" for card in cards[:MAX_NAMES]) or "no model"
    names += f" and {len(cards) - MAX_NAMES} more" if len(cards) > MAX_NAMES else ""
    found = [card for card in cards if server.model in (None, card["id"])]
    if not found:
        wanted = "" if server.model is None else f".model is {server.model!r}, but the server"
        raise ConfigError(f"teacher.server{wanted} {server.url} serves {names}")
    if len(found) > 1:
        raise ConfigError(f"teacher.server.model is not given, and the server {server.url} serves {names}; name the teacher")
    return found[0]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME_CHARACTERS


def name_for_identity(served: str) -> str:
    """A model's name on its server; of a path, which belongs to the machine, the last part."""
    return served.rstrip("/").rpartition("/")[2] if served.startswith("/") else served


def vocab_size_of(config: TeacherConfig, model_fields: Mapping[str, Any]) -> int:
    """How many ids the server's distributions range over; raises ConfigError if it is not stated.

    Args:
        config: may state it.
        model_fields: the model's config.json.
    """
    stated = config.server.vocab_size or (model_fields.get("text_config") or model_fields).get("vocab_size")
    if not isinstance(stated, int) or not 1 <= stated <= 2**31:
        raise ConfigError(
            f"teacher.server.vocab_size is not given, and no config.json of {config.model!r} is here to say it; "
            "set it to the number of ids that the served model gives logits for"
        )
    return stated


def context_length_of(server: ServerConfig, card: Mapping[str, Any]) -> int:
    """The most tokens of a sequence; raises ConfigError if it is not stated.

    Args:
        server: may state it.
        card: the server's entry for the model. vLLM gives `max_model_len`, which includes the generated token.
    """
    if server.context_length is not None:
        return server.context_length
    stated = card.get("max_model_len")
    if not isinstance(stated, int) or stated < 2:
        raise ConfigError(
            f"teacher.server.context_length is not given, and the server {server.url} does not say it; "
            "set it to the most tokens of a sequence that it reads"
        )
    return stated - 1
