"""Ranges of what a manifest, a journal record or a shard's metadata claims: checked once, when it is parsed, so that later code
may add up, divide and look up without asking again. Types and names of files are checked before; here are the values.

No numpy. A JSON number is never NaN or infinite, but sums of some may be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from kdcache.errors import FormatError
from kdcache.format.feature_claims import check_feature_claims
from kdcache.format.ranges import check_finite, check_range
from kdcache.format.selection import SELECTION_KINDS, check_selection
from kdcache.format.sidecar_claims import check_sidecar_claims

if TYPE_CHECKING:
    from kdcache.format.identity import FeatureInfo, Identity, SelectionInfo, TokenizerIdentity
    from kdcache.format.manifest import LineageInfo, Manifest, ShardInfo

MAX_VOCAB_SIZE = 2**31
MAX_COUNT = 2**63 - 1
MAX_UNITS = 2**32
"""The index names a unit in 32 bits."""

MAX_JSON_DEPTH = 64
"""Of objects and lists within each other. What looks through them by recursion stays far from Python's own limit."""

_COUNTS = (
    "num_bytes", "num_sequences", "num_tokens", "num_positions", "num_entries", "num_targets", "num_impossible_targets",
)  # fmt: skip
_SUMS = ("target_logprob_sum", "tail_mass_sum", "entropy_floor_sum", "entropy_ceiling_sum")
_COSTS = ("wall_seconds", "cpu_seconds", "gpu_seconds", "energy_joules")


def check_depth(value: Any) -> None:
    """Raise FormatError where a JSON value has objects or lists nested deeper than MAX_JSON_DEPTH."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise FormatError(f"JSON is nested deeper than {MAX_JSON_DEPTH} levels")


def check_manifest(manifest: Manifest) -> None:
    """Raise FormatError where a number, or a sum over the shards, is out of its range.

    Raises:
        UnsupportedVersionError: a feature's dtype or pooling that is unknown here. FormatError: see above.
    """
    check_range("number", manifest.number, MAX_COUNT)
    check_range("plan.num_units", manifest.plan.num_units, MAX_UNITS)
    _check_identity(manifest.identity)
    check_sidecar_claims(manifest.sidecars, manifest.identity.features)
    if not isinstance(manifest.lineage, msgspec.UnsetType):
        _check_lineage(manifest.lineage)
    for shard in manifest.shards:
        check_shard_values(shard)
        if shard.unit >= manifest.plan.num_units:
            raise FormatError(f"a shard is of unit {shard.unit}, the plan has {manifest.plan.num_units} units")
    for name in _COUNTS:
        check_range(f"the sum of {name}", manifest.total(name), MAX_COUNT)
    check_range("the sum of column_bytes", sum(sum(s.column_bytes.values()) for s in manifest.shards), MAX_COUNT)
    for name in _SUMS:
        check_finite(f"the sum of {name}", manifest.total(name))
    accounts = [shard.account for shard in manifest.shards if not isinstance(shard.account, msgspec.UnsetType)]
    for name in _COSTS:
        check_finite(f"the sum of {name}", sum(getattr(account, name) or 0.0 for account in accounts))


def check_shard_values(shard: ShardInfo) -> None:
    """Raise FormatError where a number of one shard's entry is out of its range."""
    check_range("unit", shard.unit, MAX_UNITS - 1)
    for name in _COUNTS:
        check_range(name, getattr(shard, name), MAX_COUNT)
    if not isinstance(shard.num_exact_entries, msgspec.UnsetType):
        check_range("num_exact_entries", shard.num_exact_entries, shard.num_entries)
    for name, num_bytes in shard.column_bytes.items():
        check_range(f"column_bytes of {name[:80]!r}", num_bytes, MAX_COUNT)
    if not isinstance(shard.num_finished, msgspec.UnsetType):
        for way, number in shard.num_finished.items():
            check_range(f"num_finished by {way[:80]!r}", number, shard.num_sequences)
        check_range("the sum of num_finished", sum(shard.num_finished.values()), shard.num_sequences)
    for name in _SUMS:
        check_finite(name, getattr(shard, name))
    if not isinstance(shard.account, msgspec.UnsetType):
        for name in _COSTS:
            cost = getattr(shard.account, name)
            if cost is not None and not 0 <= cost < math.inf:
                raise FormatError(f"{name} is {cost!r}, expected a number of at least 0")


def check_content(vocab_size: int, selection: SelectionInfo, features: Sequence[FeatureInfo]) -> None:
    """Raise FormatError where what decides a shard's columns is out of its range. A kind of selection that is unknown here
    passes: who reads the sequences refuses it by its name.

    Raises:
        UnsupportedVersionError: a feature's dtype or pooling that is unknown here. FormatError: see above.
    """
    check_range("the teacher's vocab_size", vocab_size, MAX_VOCAB_SIZE, least=1)
    if selection.kind in SELECTION_KINDS:
        check_selection(selection)
    check_feature_claims(features)


def _check_identity(identity: Identity) -> None:
    check_content(identity.teacher.vocab_size, identity.selection, identity.features)
    check_range("the teacher's context_length", identity.teacher.context_length, MAX_COUNT)
    _check_tokenizer(identity.tokenizer)
    for purpose, seed in identity.seeds.items():
        check_range(f"the seed of {purpose[:80]!r}", seed, MAX_COUNT, least=-MAX_COUNT - 1)


def _check_lineage(lineage: LineageInfo) -> None:
    for parent in lineage.parents:
        check_content(parent.teacher.vocab_size, parent.selection, ())
        _check_tokenizer(parent.tokenizer)
        if not isinstance(parent.lineage, msgspec.UnsetType):
            _check_lineage(parent.lineage)


def _check_tokenizer(tokenizer: TokenizerIdentity) -> None:
    check_range("the tokenizer's vocab_size", tokenizer.vocab_size, MAX_VOCAB_SIZE)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
