"""Re-read a whole cache and say what is wrong with it: bytes, structure, meaning."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.codec import get_codec
from kdcache.codec.base import Codec
from kdcache.errors import CorruptCacheError, FormatError
from kdcache.format.manifest import Manifest, ShardInfo
from kdcache.format.record import NO_TARGET, SequenceRecord, check_distributions
from kdcache.store import chain, fs
from kdcache.store.location import locate
from kdcache.store.reader import CacheReader

_COUNTS = ("num_sequences", "num_tokens", "num_positions", "num_entries", "num_targets")

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass
class VerifyReport:
    """What a whole reading found.

    Attributes:
        manifest: of the snapshot that was read.
        problems: a sentence each; empty for a sound cache.
        num_sequences, num_positions, num_bytes: read and checked.
        teacher_nll: nats per target, the teacher's own, summed at capture before the codec; NaN without targets. Targets that
            the teacher gives probability 0 are left out; their number is checked.
        cached_nll: the same, recomputed from the decoded cache.
        nll_bound: most that the codec can move the mean, in nats.
    """

    manifest: Manifest
    problems: list[str] = field(default_factory=list)
    num_sequences: int = 0
    num_positions: int = 0
    num_bytes: int = 0
    teacher_nll: float = math.nan
    cached_nll: float = math.nan
    nll_bound: float = 0.0

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong. A sound cache may still be incomplete: see `manifest.is_complete`."""
        return not self.problems


@dataclass
class _Nll:
    teacher_sum: float = 0.0
    cached_sum: float = 0.0
    bound_sum: float = 0.0
    num_targets: int = 0

    def add(self, logprobs: NDArray[np.float32], codec: Codec) -> int:
        """Add the decoded logprobs of a record's targets; gives how many of them are -inf."""
        possible = logprobs[~np.isneginf(logprobs)]
        self.cached_sum -= float(possible.sum(dtype=np.float64))
        self.bound_sum += float(codec.max_error_nats(possible).sum())
        return len(logprobs) - len(possible)

    def close_shard(self, shard: ShardInfo, num_impossible: int, codec: Codec) -> None:
        """Add what the teacher said of a shard whose decoded logprobs are all in."""
        self.teacher_sum -= shard.target_logprob_sum
        self.num_targets += shard.num_targets - shard.num_impossible_targets
        if num_impossible > shard.num_impossible_targets:  # too small for a lossy codec: no bound is left
            self.bound_sum += float(codec.max_error_nats(np.array([-np.inf])).sum())


def verify_cache(path: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Re-read everything.

    Checked are the chain of manifests and the journal; each shard's SHA-256; each row's digest, its place in the index and its
    record's promises; every count; and that the teacher's NLL of the text, recomputed from the cache, is the teacher's own
    within the codec's bound.

    Damage ends up in the report, shard by shard; it is not raised.

    Raises:
        CacheNotFoundError: there is no cache. CorruptCacheError: the newest manifest itself cannot be read.
    """
    root = locate(path)
    report = VerifyReport(chain.newest_manifest(root), problems=[*chain.check_chain(root), *chain.check_journal(root)])
    try:
        reader = CacheReader(root, report.manifest)
    except FormatError as error:
        report.problems.append(str(error))
        return report
    nll = _Nll()
    first = 0
    for shard in report.manifest.shards:
        try:
            _verify_copy(reader, shard, first, report, nll)
        except (FormatError, OSError) as error:
            report.problems.append(str(error))
        first += shard.num_sequences
        report.num_bytes += shard.num_bytes
        if progress is not None:
            progress(report.num_bytes, report.manifest.total("num_bytes"))
    _conclude(report, nll)
    return report


def _verify_copy(reader: CacheReader, shard: ShardInfo, first: int, report: VerifyReport, nll: _Nll) -> None:
    """`_verify_shard`, on a copy where the shard is not on a disk: its bytes are then hashed and read, but fetched once."""
    path = reader.root / shard.name
    if isinstance(path, Path):
        _verify_shard(reader, shard, first, report, nll)
        return
    copy = fs.temp_path(reader.root)
    try:
        path.download(copy)
        reader.read_from(copy, shard)
        _verify_shard(reader, shard, first, report, nll, copy)
    except FileNotFoundError as error:
        raise CorruptCacheError(f"{path}: the shard is missing") from error
    finally:
        reader.read_from(None, shard)
        copy.unlink(missing_ok=True)


def _verify_shard(
    reader: CacheReader, shard: ShardInfo, first: int, report: VerifyReport, nll: _Nll, copy: Path | None = None
) -> None:
    path = reader.root / shard.name
    if copy is None and not path.exists():
        raise CorruptCacheError(f"{path}: the shard is missing")
    if fs.sha256_of(copy or Path(str(path))) != shard.sha256:
        report.problems.append(f"{path}: its SHA-256 is not the one in the manifest; the shard is damaged")
    identity = report.manifest.identity
    codec = get_codec(identity.codec.codec_id, identity.codec.params, identity.selection)
    num_impossible = 0
    counts: dict[str, int] = dict.fromkeys(_COUNTS, 0)
    finished: Counter[str] = Counter()
    for record in _checked_records(reader, shard, first):
        finished[record.sequence.finish] += 1
        target_ids_P = record.sequence.target_ids_P
        logprobs = record.distributions.target_logprobs(target_ids_P)[target_ids_P != NO_TARGET]
        num_impossible += nll.add(logprobs, codec)
        _count(counts, record, len(logprobs))
    nll.close_shard(shard, num_impossible, codec)
    if num_impossible < shard.num_impossible_targets:
        report.problems.append(
            f"{path}: {num_impossible} targets have probability 0, the manifest says {shard.num_impossible_targets}"
        )
    report.num_sequences += counts["num_sequences"]
    report.num_positions += counts["num_positions"]
    del finished[""]
    if finished != (shard.num_finished or {}):
        report.problems.append(f"{path}: answers ended by {dict(finished)}, the manifest says {shard.num_finished or {}}")
    for name, found in counts.items():
        if found != getattr(shard, name):
            report.problems.append(f"{path}: {name} is {found}, the manifest says {getattr(shard, name)}")


def _checked_records(reader: CacheReader, shard: ShardInfo, first: int) -> Iterator[SequenceRecord]:
    """A shard's records, in order, each sound in itself and at the place that the index says; the first is sequence `first`."""
    sequence = first
    for number in range(reader.num_record_batches(shard.unit)):
        batch = reader.record_batch(shard.unit, number)
        for row in range(batch.num_rows):
            where = f"{reader.root / shard.name}: record batch {number}, row {row}"
            record = batch.record(row)
            _check_record(record, reader.manifest.identity.teacher.vocab_size, where)
            if sequence >= len(reader) or reader.place(sequence) != (shard.unit, number, row):
                raise CorruptCacheError(f"{where}: sequence {sequence} of the index is not here")
            reader.check_sequence(sequence, record, where)
            sequence += 1
            yield record


def _check_record(record: SequenceRecord, vocab_size: int, where: str) -> None:
    try:
        check_distributions(record.distributions, vocab_size=vocab_size)
        record.distributions.target_logprobs(record.sequence.target_ids_P)
    except FormatError as error:
        raise CorruptCacheError(f"{where}: {error}") from error


def _count(counts: dict[str, int], record: SequenceRecord, num_targets: int) -> None:
    counts["num_sequences"] += 1
    counts["num_tokens"] += record.sequence.num_tokens
    counts["num_positions"] += record.distributions.num_positions
    counts["num_entries"] += record.distributions.num_entries
    counts["num_targets"] += num_targets


def _conclude(report: VerifyReport, nll: _Nll) -> None:
    if not nll.num_targets:
        return
    report.teacher_nll = nll.teacher_sum / nll.num_targets
    report.cached_nll = nll.cached_sum / nll.num_targets
    # float32 logprobs were summed in float64 at both ends; what is left beside the codec's rounding is that of float32 itself.
    report.nll_bound = nll.bound_sum / nll.num_targets + 1e-6 + 1e-12 * abs(report.teacher_nll)
    if not report.problems and not abs(report.teacher_nll - report.cached_nll) <= report.nll_bound:
        report.problems.append(
            f"the teacher's NLL recomputed from the cache is {report.cached_nll:.6f} nats per target, the teacher's own was "
            f"{report.teacher_nll:.6f}, more apart than the codec's bound of {report.nll_bound:.6f}: "
            "rows do not belong to their text"
        )
