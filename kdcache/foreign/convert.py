"""Write a sound foreign cache as one of ours; what is not sound is refused, unless a repair that is asked for makes it so."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import kdcache
from kdcache.codec import get_codec
from kdcache.errors import ConfigError, InputError
from kdcache.foreign.base import Finding, ForeignCache, ForeignSequence
from kdcache.foreign.formats.detect import is_own_cache, open_foreign
from kdcache.foreign.judge.doctor import Examination, ExamineConfig, Progress, examine_opened
from kdcache.foreign.records import Account, RecordConfig, Repair, to_record, without_fitted
from kdcache.format.manifest import (
    CodecInfo,
    Identity,
    Manifest,
    PlanInfo,
    SelectionInfo,
    TeacherIdentity,
    TokenizerIdentity,
    fingerprint,
)
from kdcache.format.record import SequenceRecord
from kdcache.shown import shown_lines
from kdcache.store.writing.writer import CacheWriter
from kdcache.teacher.base import Teacher

UNIT_BYTES = 2**28
"""About this much of records in memory form per shard."""

_REPAIR_OF: dict[str, Repair] = {
    "k_plus_1_entries": "k+1", "displaced_entries": "k+1", "duplicate_ids": "duplicates", "broken_tails": "tails",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to make of a foreign cache.

    Attributes:
        tokenizer: of the ids.
        model: the teacher's name, for the identity.
        codec: `packed` or `raw`.
        shift: added to every position's position; must be what the positions are off by.
        repairs: asked for.
        accept: names of findings that cannot be decided and are taken on trust.
        examine: how to look before anything is written.
    """

    tokenizer: TokenizerIdentity
    model: str = "unknown"
    codec: str = "packed"
    shift: int = 0
    repairs: frozenset[Repair] = frozenset()
    accept: frozenset[str] = frozenset()
    examine: ExamineConfig = field(default_factory=ExamineConfig)


@dataclass(frozen=True)
class Conversion:
    """What was found, and what was written."""

    examination: Examination
    account: Account
    manifest: Manifest


class _Hashed:
    """Sequences on their way, and the digest of what has passed: the input's fingerprint."""

    def __init__(self, cache: ForeignCache) -> None:
        self._cache, self.hasher, self.longest = cache, hashlib.sha256(b"kdcache.foreign.v1\0"), 1

    def __call__(self) -> Iterator[ForeignSequence]:
        self.hasher, self.longest = hashlib.sha256(b"kdcache.foreign.v1\0"), 1
        for sequence in self._cache.read():
            parts = (sequence.input_ids_N, sequence.positions_P, sequence.counts_P, sequence.token_ids_E, sequence.values_E)
            for part in (*parts, sequence.log_z_P, sequence.learnt_N):
                self.hasher.update(b"-" if part is None else len(part).to_bytes(8, "little") + part.tobytes())
            self.longest = max(self.longest, 0 if sequence.input_ids_N is None else len(sequence.input_ids_N))
            yield sequence


def convert(
    source: str | Path,
    target: str | Path,
    config: ConvertConfig,
    *,
    teacher: Teacher | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Examine the source from end to end, then write it.

    An interrupted conversion is resumed by the same call.

    Raises:
        InputError: the source cannot be read, or is not sound and the repairs asked for do not make it so.
        ConfigError: an unknown codec. MismatchError: the target holds another cache. StorageError: the disk or the
            store refuses.
    """
    if is_own_cache(source):
        raise InputError(f"{source} is a cache of kdcache already; there is nothing to convert")
    cache = open_foreign(source, config.examine.read)
    if "tails" in config.repairs:  # judged as it will be written: fitted entries bring positions above 1 that are sound without
        cache = without_fitted(cache)
    hashed = _Hashed(cache)
    examination = examine_opened(replace(cache, read=hashed), config.examine, teacher=teacher, progress=progress)
    refuse_unsound(examination, config)
    record_config = _record_config(cache, examination, config)
    manifest, per_unit = _plan(cache, examination, config, record_config, hashed)
    writer = CacheWriter.open(target, manifest)
    account = Account()
    published = writer.published_units()
    for unit, sequences in enumerate(_groups(cache.read(), per_unit)):
        if unit not in published:
            writer.write_unit(unit, _records(sequences, record_config, account))
    return Conversion(examination, account, writer.fold())


def refuse_unsound(examination: Examination, config: ConvertConfig) -> None:
    """Raise InputError, naming everything that stands in the way and what would mend it, unless nothing does."""
    standing = [finding for finding in examination.findings if not _is_settled(finding, config)]
    if standing:
        told = (f"  {finding.name}: {finding.sentence}{_advice(finding)}" for finding in standing)
        raise InputError(shown_lines([f"{examination.path} is not converted:", *told]))
    shifted = any(finding.name == "shifted_positions" for finding in examination.findings)
    unclear = any(finding.name == "alignment_unclear" for finding in examination.findings)
    if config.shift and not shifted and not unclear:
        raise InputError(
            f"{examination.path} is not converted: its positions are aligned; --shift {config.shift:+d} would move them off"
        )


def _is_settled(finding: Finding, config: ConvertConfig) -> bool:
    if finding.severity == "note":
        return True
    if finding.severity == "undecided":
        return finding.name in config.accept
    if finding.name == "shifted_positions":
        return finding.repair == f"--shift {config.shift:+d}"
    return _REPAIR_OF.get(finding.name) in config.repairs


def _advice(finding: Finding) -> str:
    if finding.severity == "undecided":
        return f" (--accept {finding.name} takes it on trust)"
    return f" (repaired by {finding.repair})" if finding.repair else ""


def _record_config(cache: ForeignCache, examination: Examination, config: ConvertConfig) -> RecordConfig:
    names = {finding.name for finding in examination.findings}
    return RecordConfig(
        values=cache.values,
        vocab_size=examination.counts.vocab_size or config.tokenizer.vocab_size,
        shift=config.shift,
        repairs=config.repairs,
        widest=max(examination.counts.sizes, default=0),
        has_extra="k_plus_1_entries" in names,
    )


def _plan(
    cache: ForeignCache, examination: Examination, config: ConvertConfig, records: RecordConfig, hashed: _Hashed
) -> tuple[Manifest, int]:
    """Manifest 0 of the new cache, and how many sequences go into a unit."""
    counts = examination.counts
    average = (16 * counts.num_entries + 8 * counts.num_tokens) // max(counts.num_sequences, 1) + 1
    per_unit = max(1, UNIT_BYTES // average)
    try:
        codec = get_codec(config.codec, {"vocab_size": records.vocab_size})
    except ValueError as error:
        raise ConfigError(f"--codec {config.codec}: {error}") from error
    k = records.widest - records.has_extra
    plan = {
        "input": hashed.hasher.hexdigest(),
        "per_unit": per_unit,
        "shift": records.shift,
        "repairs": sorted(records.repairs),
    }
    identity = Identity(
        teacher=_teacher(cache, config, records.vocab_size, hashed.longest),
        tokenizer=config.tokenizer,
        selection=SelectionInfo(kind="top_k", params={"k": k}),
        codec=CodecInfo(codec_id=codec.codec_id, params=codec.params()),
        input_fingerprint=fingerprint(plan),
    )
    notes = {"converted_from": cache.title, "path": Path(cache.path).name, **plan, "facts": dict(cache.facts)}
    notes["alignment"] = examination.alignment_proof()
    manifest = Manifest(
        number=0,
        parent=None,
        identity=identity,
        plan=PlanInfo(fingerprint=fingerprint(plan), num_units=-(-counts.num_sequences // per_unit)),
        versions={"kdcache": kdcache.__version__, "python": platform.python_version()},
        config={"notes": notes},
    )
    return manifest, per_unit


def _teacher(cache: ForeignCache, config: ConvertConfig, vocab_size: int, longest: int) -> TeacherIdentity:
    return TeacherIdentity(
        model=config.model,
        architecture="unknown",
        vocab_size=vocab_size,
        dtype="unknown",
        engine=cache.format,
        engine_version="unknown",
        context_length=longest,
    )


def _groups(sequences: Iterator[ForeignSequence], size: int) -> Iterator[Iterator[ForeignSequence]]:
    """Runs of `size` sequences; each is used up before the next is asked for."""
    for first in sequences:
        run = _run(first, sequences, size)
        yield run
        for _ in run:  # of a unit that is there already
            pass


def _run(first: ForeignSequence, rest: Iterator[ForeignSequence], size: int) -> Iterator[ForeignSequence]:
    yield first
    for _ in range(size - 1):
        sequence = next(rest, None)
        if sequence is None:
            return
        yield sequence


def _records(sequences: Iterator[ForeignSequence], config: RecordConfig, account: Account) -> Iterator[SequenceRecord]:
    for sequence in sequences:
        record = to_record(sequence, config, account)
        if record is not None:
            yield record
