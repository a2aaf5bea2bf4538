"""Recognise secrets by name and by look: the one list. Standard library only.

A config is written into a cache's manifests and a training run's record, which are shared, so a secret in it is refused before
anything is written. Secrets are masked in everything printed, logged or recorded as a failure's reason (`kdcache.shown`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

MASK = "***"
MIN_CHARACTERS = 6
"""Of a value that is masked everywhere; a shorter one would occur in common words."""

_WORDS = {
    "secret", "secrets", "password", "passwd", "passphrase", "pwd", "credential", "credentials", "auth", "authorization",
    "apikey", "cookie", "cookies", "bearer", "sas", "signature", "sig", "oauth", "jwt", "pat",
}  # fmt: skip
"""Words of a name that alone make its value a secret."""
_KEYS = {"api", "access", "secret", "private", "account", "shared", "storage", "subscription", "encryption", "auth", "ssh"}
"""Words after which `key` means a secret."""
_PLAIN_TOKENS = {
    "bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "video", "audio", "start", "end", "special", "stop", "decoder",
    "additional", "per", "next", "first", "last", "tool", "think",
}  # fmt: skip
"""Words after which `token` means one of a vocabulary."""
_NAMES_OF_SECRETS = {
    "env",
    "file",
    "path",
    "dir",
    "url",
    "uri",
    "endpoint",
    "type",
    "mode",
    "name",
    "provider",
    "id",
    "ids",
    "sock",
}
"""Last words of names whose values say where a secret is, or whose, and not what."""

_BY_LOOK = re.compile(
    r"(?:hf|api_org)_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_[A-Za-z0-9_]{22,}|glpat-[A-Za-z0-9_-]{20,}|xox[abeprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{35}"
    r"|ya29\.[0-9A-Za-z_-]{20,}|nvapi-[A-Za-z0-9_-]{20,}|eyJ[A-Za-z0-9_-]{8,500}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}|(?<=Basic )[A-Za-z0-9+/=]{12,}"
    r"|(?<=AccountKey=)[A-Za-z0-9+/=]{8,}|(?<=SharedAccessSignature=)[^;\s]{8,}"
)
_USER = re.compile(r"(?<=://)[^/?#\s@'\"\\]*@")
_PAIR = re.compile(
    r"""(?<![A-Za-z0-9_.-])([A-Za-z][A-Za-z0-9_.-]{0,80})(['"]: ?['"]|[:=]['"]?)((?!/)[^\s'",;&(){}\[\]\\]{6,})"""
)
"""A name and its value in one text, as libraries repeat options: `secret=...`, `secret='...'`, `'secret': '...'`."""
_PARAMETER = re.compile(r"([?&;]([A-Za-z0-9_.-]+)=)([^&;\s#'\"\\]+)")


def is_secret_name(name: str) -> bool:
    """Whether an option, variable or parameter of this name holds a secret, as `api_key`, `hf_token` and `X-Amz-Signature`."""
    return _is_secret_name(str(name))


@lru_cache(maxsize=4096)
def _is_secret_name(name: str) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    if not words or (words[-1] in _NAMES_OF_SECRETS and words[-1] != name.lower()):
        return False
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "token":
        return before not in _PLAIN_TOKENS
    if words[-1] == "key":
        return not before or before in _KEYS
    return any(word in _WORDS for word in words) or "connectionstring" in "".join(words)


def find_secret(value: Any, name: str = "", path: str = "") -> str | None:
    """The path of the first secret in plain values, such as `engine_options.hub_kwargs.token`; None if there is none.

    By name: any text under a secret's name, at any depth. By look: a key or token of a known provider, or an address that
    contains a password or a signature.
    """
    if isinstance(value, Mapping):
        children = ((str(key), child, f"{path}.{key}" if path else str(key)) for key, child in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        children = ((name, child, f"{path}[{index}]") for index, child in enumerate(value))
    else:
        is_secret = isinstance(value, str | bytes) and bool(value) and (is_secret_name(name) or looks_secret(value))
        return (path or name) if is_secret else None
    for child_name, child, child_path in children:
        inherited = name if name and is_secret_name(name) else child_name
        if (found := find_secret(child, inherited, child_path)) is not None:
            return found
        if _masked_pairs(child_name) != child_name or looks_secret(child_name):
            return f"a name in {path or 'it'}"
    return None


def looks_secret(text: str | bytes) -> bool:
    """Whether a text contains something that is always a secret."""
    plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return _masked_by_look(plain) != plain


def remember(value: Any, name: str = "") -> None:
    """Mask the secrets in these values wherever this process prints or logs them."""
    _known.update(_named_secrets(value, name))


def masked(text: str) -> str:
    """A text with its secrets masked: by look, from `remember`, and from this process's environment."""
    for secret in sorted(_known | _in_environment(), key=len, reverse=True):
        if secret in text:
            text = text.replace(secret, MASK)
    return _masked_pairs(_masked_by_look(text))


_known: set[str] = set()


def _named_secrets(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _named_secrets(child, name if name and is_secret_name(name) else str(key))
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _named_secrets(child, name)
    elif isinstance(value, str) and len(value) >= MIN_CHARACTERS and is_secret_name(name):
        yield value


def _in_environment() -> set[str]:
    """Values of variables with a secret's name; the shell's PWD is the working directory and not a password."""
    named = ((name, value) for name, value in os.environ.items() if len(value) >= MIN_CHARACTERS + 2 and name != "PWD")
    return {value for name, value in named if is_secret_name(name)}


def _masked_pairs(text: str) -> str:
    # Only for printing: `key=...` in the path of a partition is not a secret, and a config with it is not refused.
    return _PAIR.sub(lambda found: found[1] + found[2] + (MASK if is_secret_name(found[1]) else found[3]), text)


def _masked_by_look(text: str) -> str:
    if "://" in text:
        text = _USER.sub(f"{MASK}@", text)
    if "=" in text:
        text = _PARAMETER.sub(lambda found: found[1] + (MASK if is_secret_name(found[2]) else found[3]), text)
    return _BY_LOOK.sub(MASK, text)
