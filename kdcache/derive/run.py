"""Make a cache of other caches: unit by unit, record by record, through the same writer as a capture.

Bounded memory: a record of each source and a record batch at a time. Killed anywhere, the same call goes on: units that are
published are not done again. Nothing is visible to readers until all of them are: there is one fold, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from kdcache.derive.job import Job, make_job
from kdcache.derive.lineage import lineage_words
from kdcache.derive.mix import mix_records
from kdcache.derive.options import DeriveOptions
from kdcache.derive.positions import keep_positions
from kdcache.derive.reduction.reduce import reduce_record
from kdcache.derive.scalars import record_values
from kdcache.errors import ConfigError, InputError, KdcacheError, MismatchError, StorageError
from kdcache.format import paths
from kdcache.format.manifest import LineageInfo, Manifest
from kdcache.format.record import SequenceRecord
from kdcache.store import chain
from kdcache.store.files import fs
from kdcache.store.files.location import Location, children, locate
from kdcache.store.reader import open_reader
from kdcache.store.writing.writer import CacheWriter

Progress = Callable[[int, int], None]
"""Called with (sequences done, sequences in all)."""


@dataclass(frozen=True)
class Derived:
    """What was made.

    Attributes:
        manifest: the new cache's newest.
        num_read: sequences of the sources that were taken; where some did not meet a condition, the cache holds fewer.
        num_missing: sequences that were not in all sources of a mixture, and were skipped.
    """

    manifest: Manifest
    num_read: int
    num_missing: int


def derive(
    sources: Sequence[str | Path], target: str | Path, options: DeriveOptions | None = None, *, progress: Progress | None = None
) -> Derived:
    """Make a cache of one or several others, without asking a teacher.

    An interrupted derivation is resumed by the same call. One that fails leaves nothing behind, unless the disk or the store
    has failed after units were published.

    Args:
        sources: addresses of caches; their newest snapshots are read as they are.
        target: address of the new cache.
        options: what to do; by default the sources are written again as one.

    Raises:
        ConfigError: options that cannot be had of these sources. InputError: nothing to write, sequences that are missing, or
            a source that is not complete.
        MismatchError: sources that do not fit together; a target that holds something else.
        CacheNotFoundError, CorruptCacheError: a source cannot be read. StorageError: the disk or the store refuses.
    """
    options = options or DeriveOptions()
    root = locate(target)
    if not sources:
        raise ConfigError("no cache was given to make another of; give one or several")
    if str(_absolute(root)) in {str(_absolute(locate(source))) for source in sources}:
        raise ConfigError(f"{target} is a source and the target; choose another directory for the new cache")
    with ExitStack() as stack:
        readers = [stack.enter_context(open_reader(source)) for source in sources]
        for source, reader in zip(sources, readers, strict=True):
            _refuse_incomplete(source, reader.manifest, options)
        job = make_job(readers, [str(reader.root).rstrip("/").rsplit("/", 1)[-1] for reader in readers], options)
        _refuse_other(root, job.manifest.lineage)
        with _nothing_left_behind(root):
            writer = CacheWriter.open(root, job.manifest, record_batch_bytes=options.record_batch_bytes)
            return Derived(_write(job, writer, progress), len(job.numbers_SC), job.num_missing)


@contextmanager
def _nothing_left_behind(root: Location) -> Iterator[None]:
    """Remove what was begun here where it fails: all of it where it would fail again, and nothing where the disk or the store
    refused and there are units to go on with. What an earlier call has begun stays."""
    is_new, made = not chain.manifest_numbers(root), fs.missing_directories(root)
    try:
        yield
    except (KdcacheError, OSError) as error:
        may_pass = isinstance(error, StorageError)
        if is_new and not isinstance(error, MismatchError) and not (may_pass and children(root / paths.JOURNAL)):
            with suppress(KdcacheError, OSError):
                fs.remove_cache(root, made)
        raise


def _write(job: Job, writer: CacheWriter, progress: Progress | None) -> Manifest:
    published, num_done, num_all = writer.published_units(), 0, len(job.numbers_SC)
    for unit in range(job.manifest.plan.num_units):
        if unit not in published:
            writer.write_unit(unit, _records(job, unit))
        num_done += len(job.unit(unit))
        if progress is not None:
            progress(num_done, num_all)
    return writer.fold()


def _records(job: Job, unit: int) -> Iterator[SequenceRecord]:
    places = list(job.places(job.unit(unit)))
    for source, reader in enumerate(job.readers):
        if reader.ahead is not None:
            reader.ahead.prefetch([number for made_of in places for of, number in made_of if of == source])
    for made_of in places:
        record = derived_record(job, [job.readers[source][number] for source, number in made_of])
        if record is not None:
            yield record


def derived_record(job: Job, records: Sequence[SequenceRecord]) -> SequenceRecord | None:
    """One sequence of the new cache, from its records in the sources; None where a condition leaves it out."""
    options, before = job.options, job.before
    record = records[0] if options.mix is None else mix_records(records, options.mix, before)
    vocab_size = job.manifest.identity.teacher.vocab_size
    if job.where is not None and not job.where.holds(record_values(record, job.where.names, before, vocab_size)):
        return None
    if job.where_position is not None:
        keep_P = np.asarray(job.where_position.holds(record_values(record, job.where_position.names, before, vocab_size)))
        if not keep_P.any():
            return None
        record = keep_positions(record, keep_P, job.manifest.identity.tokenizer.chat_template_fingerprint)
    if options.reduce is not None:
        record = reduce_record(record, before, job.manifest.identity.selection)
    return record


def _refuse_incomplete(source: str | Path, manifest: Manifest, options: DeriveOptions) -> None:
    if not (manifest.is_complete or "incomplete" in options.accept):
        raise InputError(
            f"{source}: only {len(manifest.shards)} of {manifest.plan.num_units} units are there, and what is derived would "
            "look complete; finish it first, or use it as it is with --accept incomplete"
        )


def _refuse_other(root: Location, lineage: LineageInfo | msgspec.UnsetType) -> None:
    """Raise MismatchError if the target is a cache already, made otherwise: the writer would only name fingerprints."""
    if not chain.manifest_numbers(root):
        return
    there = chain.newest_manifest(root).lineage
    if there != lineage:
        assert isinstance(lineage, LineageInfo)
        how = "captured from a teacher" if not isinstance(there, LineageInfo) else f"made by {lineage_words(there)}"
        raise MismatchError(
            f"{str(root)!r} holds another cache, {how}; asked for is {lineage_words(lineage)}; choose another directory, "
            "or repeat what made it to go on with it"
        )


def _absolute(root: Location) -> Location:
    return root.resolve() if isinstance(root, Path) else root
