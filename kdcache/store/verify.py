"""Read a whole cache again and report what is wrong with it: bytes, structure, meaning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError, FormatError, UnsupportedVersionError
from kdcache.format.identity import Identity
from kdcache.format.manifest import Manifest, ShardInfo
from kdcache.format.record import SequenceRecord
from kdcache.format.record_checks import check_record
from kdcache.store import chain
from kdcache.store.claims import ShardClaims
from kdcache.store.files import fs
from kdcache.store.files.location import locate
from kdcache.store.reader import CacheReader
from kdcache.store.states_proof import StatesProof, prove_states

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
            the teacher gives probability 0 are left out; their count is checked.
        cached_nll: the same, recomputed from the decoded cache.
        nll_bound: most that the codec can move the mean, in nats.
        states: whether states after the final norm give the logprobs through the output projection; None where one of these is
            not in the cache, or something else is wrong already.
    """

    manifest: Manifest
    problems: list[str] = field(default_factory=list)
    num_sequences: int = 0
    num_positions: int = 0
    num_bytes: int = 0
    teacher_nll: float = math.nan
    cached_nll: float = math.nan
    nll_bound: float = 0.0
    states: StatesProof | None = None

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

    def add(self, shard: ShardInfo, claims: ShardClaims) -> None:
        """Add a shard whose records are all in."""
        self.teacher_sum -= shard.target_logprob_sum
        self.cached_sum -= claims.statistics.target_logprob_sum
        too_small = claims.statistics.num_impossible_targets > shard.num_impossible_targets  # for the codec: no bound is left
        self.bound_sum += math.inf if too_small else claims.nll_bound()
        self.num_targets += shard.num_targets - shard.num_impossible_targets


def verify_cache(path: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Read a whole cache again and check it.

    Checked are the chain of manifests and the journal; the sidecars; each shard's SHA-256; each sequence's digest, its index
    entry and its record's promises; and all that the manifest claims of a shard, recomputed from its records (`ShardClaims`):
    counts, keys, bytes of columns, and within the codec's bound the sums of masses and entropies and the teacher's NLL of the
    text. Where the cache has what it takes, states are compared with logprobs (`prove_states`).

    Damage ends up in the report, shard by shard; it is not raised.

    Raises:
        CacheNotFoundError: no cache at the path. CorruptCacheError: the newest manifest itself cannot be read.
        UnsupportedVersionError: the cache's version or codec is not known here, so that nobody can say what is damaged.
    """
    root = locate(path)
    report = VerifyReport(chain.newest_manifest(root), problems=[*chain.check_chain(root), *chain.check_journal(root)])
    try:
        reader = CacheReader(root, report.manifest)
    except UnsupportedVersionError:
        raise  # not damage: what is there may be whole
    except FormatError as error:
        report.problems.append(str(error))
        return report
    report.problems += _sidecar_problems(reader)
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
    if not report.problems:
        try:
            report.states = prove_states(reader)
            problem = None if report.states is None else report.states.problem
        except FormatError as error:
            problem = str(error)
        report.problems += [problem] if problem is not None else []
    return report


def _sidecar_problems(reader: CacheReader) -> Iterator[str]:
    """A sentence for each sidecar that is damaged, or does not hold what its feature needs."""
    found = 0
    for sidecar in reader.manifest.sidecars:
        try:
            reader.sidecar(sidecar.name)
        except (FormatError, OSError) as error:
            found += 1
            yield str(error)
    if found:
        return
    try:
        reader.constants()
    except FormatError as error:
        yield str(error)


def _verify_copy(reader: CacheReader, shard: ShardInfo, first: int, report: VerifyReport, nll: _Nll) -> None:
    """Verify a shard; one in an object store is copied first, so that its bytes are fetched once, then hashed and read."""
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
    is_changed = fs.sha256_of(copy or Path(str(path))) != shard.sha256
    claims = ShardClaims.of(report.manifest)
    for record, target_logprobs_P, where in _checked_records(reader, shard, first, claims):
        try:
            claims.add(record, target_logprobs_P)
        except FormatError as error:
            raise CorruptCacheError(f"{where}: {error}") from error
    if is_changed:  # said where no record shows it: one flipped bit is one problem
        report.problems.append(f"{path}: its SHA-256 is not the one in the manifest; the shard is damaged")
    nll.add(shard, claims)
    report.num_sequences += claims.statistics.num_sequences
    report.num_positions += claims.statistics.num_positions
    report.problems += [f"{path}: {problem}" for problem in claims.problems(shard)]


def _checked_records(
    reader: CacheReader, shard: ShardInfo, first: int, claims: ShardClaims
) -> Iterator[tuple[SequenceRecord, NDArray[np.float32], str]]:
    """A shard's records in order, each sound in itself and where the index has it.

    Args:
        reader: of the cache.
        shard: of the records.
        first: index in the cache of the shard's first sequence.
        claims: the bytes of the columns are added to them.

    Yields:
        The record, the logprobs of its targets, and where it is, for messages.
    """
    sequence = first
    for batch_index in range(reader.num_record_batches(shard.unit)):
        batch = reader.record_batch(shard.unit, batch_index)
        claims.add_column_bytes(batch.arrow)
        for index in range(batch.num_sequences):
            where = f"{reader.root / shard.name}: record batch {batch_index}, sequence {index}"
            record = batch.record(index)
            target_logprobs_P = _checked(record, reader.manifest.identity, where)
            if sequence >= len(reader) or reader.locate(sequence) != (shard.unit, batch_index, index):
                raise CorruptCacheError(f"{where}: sequence {sequence} of the index is not here")
            reader.check_sequence(sequence, record, where)
            sequence += 1
            yield record, target_logprobs_P, where


def _checked(record: SequenceRecord, identity: Identity, where: str) -> NDArray[np.float32]:
    """The logprobs of a record's targets, if it keeps its promises."""
    try:
        return check_record(record, identity)
    except FormatError as error:
        raise CorruptCacheError(f"{where}: {error}") from error


def _conclude(report: VerifyReport, nll: _Nll) -> None:
    if not nll.num_targets:
        return
    report.teacher_nll = nll.teacher_sum / nll.num_targets
    report.cached_nll = nll.cached_sum / nll.num_targets
    report.nll_bound = nll.bound_sum / nll.num_targets
