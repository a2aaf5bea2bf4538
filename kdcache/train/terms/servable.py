"""Which terms of a loss a cache can serve, as the terms say it themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcache import extensions
from kdcache.config.terms import TermConfig
from kdcache.errors import KdcacheError
from kdcache.format.manifest import Manifest
from kdcache.train.terms.base import Term
from kdcache.train.terms.engine import check_term, make_term


def servable_terms(manifest: Manifest) -> dict[str, list[dict[str, Any]]]:
    """Name of each installed term that a cache can serve -> the options, of those that it proposes, with which it can."""
    found = {name: _servable(name, manifest) for name in extensions.names("losses")}
    return {name: options for name, options in found.items() if options}


def _servable(name: str, manifest: Manifest) -> list[dict[str, Any]]:
    try:
        kind = extensions.find("losses", name)
    except KdcacheError:  # of another package, which cannot be imported here
        return []
    proposed = kind.examples(manifest) if isinstance(kind, type) and issubclass(kind, Term) else ()
    return [options for options in proposed if _can_serve(name, options, manifest)]


def _can_serve(name: str, options: Mapping[str, Any], manifest: Manifest) -> bool:
    try:
        check_term(name, make_term(TermConfig(term=name, options=dict(options))), manifest)
    except KdcacheError:
        return False
    return True
