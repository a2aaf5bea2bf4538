"""The table of all terms that are installed, made from the terms themselves; `kdcache/docs/loss-terms.md` has it.

`python -m kdcache.train.terms.table` prints it.
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

from kdcache import extensions
from kdcache.shown import say
from kdcache.train.terms.base import Term


def terms_table(names: list[str]) -> str:
    """A Markdown table: what each term is, what it needs of a cache, and its options with their defaults."""
    lines = ["| term | | needs | options |", "|---|---|---|---|"]
    for name in names:
        kind: type[Term] = extensions.find("losses", name)
        first = (inspect.getdoc(kind) or "").split("\n", 1)[0]
        lines.append(f"| `{name}` | {first} | {kind.needed} | {', '.join(_options(kind))} |")
    return "\n".join(lines)


def _options(kind: type[Term]) -> list[str]:
    own = [p for p in inspect.signature(kind.__init__).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [f"`{p.name}`" if p.default is p.empty else f"`{p.name}: {_shown(p.default)}`" for p in own[1:]]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


if __name__ == "__main__":
    say(terms_table(list(extensions.OWN["losses"])))
