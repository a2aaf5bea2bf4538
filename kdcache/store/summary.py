"""What a cache holds, from its newest manifest alone: instant at any size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from kdcache.format.manifest import Manifest
from kdcache.store import chain


@dataclass(frozen=True)
class CacheSummary:
    """Facts for `kdcache info`. Means are over positions (or targets); NaN for an empty cache.

    Attributes:
        num_bytes: of all shards.
        bytes_per_position: num_bytes / positions: everything, framing and token ids of the text included.
        column_bytes_per_position: column -> bytes per position; `framing` is what Arrow adds.
        kept_mass: mean probability inside the support.
        entropy_floor, entropy_ceiling: nats; the teacher's mean entropy lies between them.
        teacher_nll: nats per target, of the text under the teacher, without the impossible targets.
        num_impossible_targets: targets that the teacher gives probability 0.
    """

    manifest: Manifest
    num_sequences: int
    num_tokens: int
    num_positions: int
    num_entries: int
    num_bytes: int
    bytes_per_position: float
    column_bytes_per_position: dict[str, float]
    entries_per_position: float
    kept_mass: float
    entropy_floor: float
    entropy_ceiling: float
    teacher_nll: float
    num_impossible_targets: int


def summarize_cache(path: str | Path) -> CacheSummary:
    """Read the newest manifest and add up its shards.

    Raises:
        CacheNotFoundError, CorruptCacheError, UnsupportedVersionError: see `newest_manifest`.
    """
    manifest = chain.newest_manifest(Path(path))
    positions = manifest.total("num_positions")

    def per_position(total: float) -> float:
        return total / positions if positions else math.nan

    columns = _column_bytes(manifest)
    num_impossible = manifest.total("num_impossible_targets")
    num_possible = manifest.total("num_targets") - num_impossible
    return CacheSummary(
        manifest=manifest,
        num_sequences=manifest.total("num_sequences"),
        num_tokens=manifest.total("num_tokens"),
        num_positions=positions,
        num_entries=manifest.total("num_entries"),
        num_bytes=manifest.total("num_bytes"),
        bytes_per_position=per_position(manifest.total("num_bytes")),
        column_bytes_per_position={name: per_position(total) for name, total in columns.items()},
        entries_per_position=per_position(manifest.total("num_entries")),
        kept_mass=1.0 - per_position(manifest.total("tail_mass_sum")),
        entropy_floor=per_position(manifest.total("entropy_floor_sum")),
        entropy_ceiling=per_position(manifest.total("entropy_ceiling_sum")),
        teacher_nll=-manifest.total("target_logprob_sum") / num_possible if num_possible else math.nan,
        num_impossible_targets=num_impossible,
    )


def _column_bytes(manifest: Manifest) -> dict[str, int]:
    columns: dict[str, int] = {}
    for shard in manifest.shards:
        for name, num_bytes in shard.column_bytes.items():
            columns[name] = columns.get(name, 0) + num_bytes
    columns["framing"] = manifest.total("num_bytes") - sum(columns.values())
    return columns
