"""Whether caches may follow one another as one: they have to be of one teacher, tokenizer and selection."""

from __future__ import annotations

from collections.abc import Sequence

from kdcache.errors import MismatchError
from kdcache.format.manifest import Identity

MAY_DIFFER = ("input_fingerprint", "codec.", "seeds.", "selection.params.seed", "domains")
"""Leaves of an identity: other texts are what it is for, with domains or not; rows are written anew, by one codec; draws are as
good by any seed."""


def check_concatenation(identities: Sequence[Identity], names: Sequence[str]) -> None:
    """Raise MismatchError, naming what differs, unless the caches' records mean the same."""
    first = identities[0]
    for name, other in zip(names[1:], identities[1:], strict=True):
        differences = [line for line in first.differences(other) if not line.startswith(MAY_DIFFER)]
        if differences:
            raise MismatchError(
                f"{names[0]!r} and {name!r} cannot follow one another as one cache: {'; '.join(differences)}; they have to be "
                "of one teacher, tokenizer and selection (--mix makes one cache of several teachers')"
            )
