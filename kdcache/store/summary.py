"""What a cache holds, from its newest manifest alone: instant at any size."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kdcache.format.manifest import Manifest, ShardInfo, SkippedSequence, UnitAccount
from kdcache.store import chain
from kdcache.store.files.location import locate
from kdcache.store.writing.set_aside import FailedUnit, read_failures


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
        num_exact_entries: of num_entries, how many are exact and not estimates.
        num_finished: of answers that the teacher wrote, how many ended in which way; empty where it wrote none.
        set_aside: units that failed and are not published.
        skipped: sequences left out of published units because they made them fail.
        cost: what the units took that say so.
    """

    manifest: Manifest
    num_sequences: int
    num_tokens: int
    num_positions: int
    num_entries: int
    num_exact_entries: int
    num_bytes: int
    bytes_per_position: float
    column_bytes_per_position: dict[str, float]
    entries_per_position: float
    kept_mass: float
    entropy_floor: float
    entropy_ceiling: float
    teacher_nll: float
    num_impossible_targets: int
    num_finished: dict[str, int]
    set_aside: tuple[FailedUnit, ...]
    skipped: tuple[SkippedSequence, ...]
    cost: CaptureCost


@dataclass(frozen=True)
class CaptureCost:
    """Sums over units; None where no unit says.

    Attributes:
        num_units: that keep an account.
    """

    num_units: int
    wall_seconds: float | None
    cpu_seconds: float | None
    gpu_seconds: float | None
    energy_joules: float | None


def summarize_cache(path: str | Path) -> CacheSummary:
    """Read the newest manifest, and the records of failures where there are any, and add up the shards.

    Raises:
        CacheNotFoundError, CorruptCacheError, UnsupportedVersionError: see `newest_manifest`.
    """
    root = locate(path)
    manifest = chain.newest_manifest(root)
    accounts = [shard.account for shard in manifest.shards if isinstance(shard.account, UnitAccount)]
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
        num_exact_entries=sum(_num_exact(shard) for shard in manifest.shards),
        num_bytes=manifest.total("num_bytes"),
        bytes_per_position=per_position(manifest.total("num_bytes")),
        column_bytes_per_position={name: per_position(total) for name, total in columns.items()},
        entries_per_position=per_position(manifest.total("num_entries")),
        kept_mass=1.0 - per_position(manifest.total("tail_mass_sum")),
        entropy_floor=per_position(manifest.total("entropy_floor_sum")),
        entropy_ceiling=per_position(manifest.total("entropy_ceiling_sum")),
        teacher_nll=-manifest.total("target_logprob_sum") / num_possible if num_possible else math.nan,
        num_impossible_targets=num_impossible,
        num_finished=_num_finished(manifest),
        set_aside=tuple(read_failures(root, published={shard.unit for shard in manifest.shards})),
        skipped=tuple(sequence for account in accounts for sequence in account.skipped),
        cost=_cost(accounts),
    )


def _num_exact(shard: ShardInfo) -> int:
    return shard.num_entries if isinstance(shard.num_exact_entries, msgspec.UnsetType) else shard.num_exact_entries


def _num_finished(manifest: Manifest) -> dict[str, int]:
    total: Counter[str] = Counter()
    for shard in manifest.shards:
        total.update(shard.num_finished if isinstance(shard.num_finished, dict) else {})
    return dict(sorted(total.items()))


def _cost(accounts: list[UnitAccount]) -> CaptureCost:
    def total(field: str) -> float | None:
        known = [value for account in accounts if (value := getattr(account, field)) is not None]
        return sum(known) if known else None

    return CaptureCost(
        num_units=len(accounts), wall_seconds=total("wall_seconds"), cpu_seconds=total("cpu_seconds"),
        gpu_seconds=total("gpu_seconds"), energy_joules=total("energy_joules"),
    )  # fmt: skip


def _column_bytes(manifest: Manifest) -> dict[str, int]:
    columns: dict[str, int] = {}
    for shard in manifest.shards:
        for name, num_bytes in shard.column_bytes.items():
            columns[name] = columns.get(name, 0) + num_bytes
    columns["framing"] = manifest.total("num_bytes") - sum(columns.values())
    return columns
