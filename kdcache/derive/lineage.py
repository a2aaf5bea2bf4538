"""Where a derived cache comes from: what its manifest records, and how it is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcache.derive.config import DeriveConfig
from kdcache.format.manifest import LineageInfo, Manifest, OperationInfo, ParentInfo, SelectionInfo, fingerprint
from kdcache.format.selection import has_estimates

MAX_KEYS = 100
"""Selected keys that are listed in the manifest; of more, their fingerprint and count."""


def make_lineage(parents: Sequence[tuple[str, Manifest]], config: DeriveConfig) -> LineageInfo:
    """The lineage of a cache that this config makes of these parents.

    Args:
        parents: name and manifest of each.
    """
    return LineageInfo(
        operations=tuple(_operations([manifest.identity.selection for _, manifest in parents], config)),
        parents=tuple(_parent(name, manifest) for name, manifest in parents),
    )


def lineage_words(lineage: LineageInfo) -> str:
    """One line for people: "sample (fraction=0.1, seed=0), reduce (top_k=16) of a (1f0c...)"."""
    done = ", ".join(f"{operation.name}{_in_brackets(operation.params)}" for operation in lineage.operations)
    parents = ", ".join(f"{parent.name} ({parent.snapshot[:12]})" for parent in lineage.parents)
    return f"{done} of {parents}"


def _in_brackets(params: dict[str, Any]) -> str:
    shown = ", ".join(f"{name}={value}" for name, value in params.items())
    return f" ({shown})" if shown else ""


def _parent(name: str, manifest: Manifest) -> ParentInfo:
    identity = manifest.identity
    return ParentInfo(
        name=name,
        snapshot=manifest.digest,
        teacher=identity.teacher,
        tokenizer=identity.tokenizer,
        selection=identity.selection,
        codec=identity.codec,
        input_fingerprint=identity.input_fingerprint,
        lineage=manifest.lineage,
    )


def _operations(selections: Sequence[SelectionInfo], config: DeriveConfig) -> list[OperationInfo]:
    seed = {"seed": config.seed} if any(map(has_estimates, selections)) else {}  # nothing is drawn of exact entries
    asked: dict[str, dict[str, Any] | None] = {
        "mix": None if config.mix is None else {"weights": list(config.mix), "missing": config.missing, **seed},
        "concatenate": {} if config.mix is None and len(selections) > 1 else None,
        "select": _selected(config),
        "sample": None if config.fraction is None else {"fraction": config.fraction, "seed": config.seed},
        "where": None if config.where is None else {"condition": config.where},
        "where_position": None if config.where_position is None else {"condition": config.where_position},
        "reduce": None if config.reduce is None else {**config.reduce.asked(), **seed},
    }
    done = [OperationInfo(name=name, params=params) for name, params in asked.items() if params is not None]
    return done or [OperationInfo(name="repack")]


def _selected(config: DeriveConfig) -> dict[str, Any] | None:
    if config.select is None:
        return None
    ranges, keys = [list(pair) for pair in config.select.ranges], [key.hex() for key in config.select.keys]
    params: dict[str, Any] = {"numbers": ranges} if ranges else {}
    if len(keys) > MAX_KEYS:
        return params | {"num_keys": len(keys), "keys_fingerprint": fingerprint(keys)}
    return params | ({"keys": keys} if keys else {})
