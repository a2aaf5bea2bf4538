"""Make a cache of other caches: unit by unit, record by record, through the same writer as a capture.

Memory is bounded: one record of each source and one record batch at a time. Killed anywhere, it is resumed by the same call:
published units are not done again. Nothing is visible to readers until all of them are: there is one fold, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kdcache.derive.config import DeriveConfig
from kdcache.derive.derivation import Derivation, make_derivation
from kdcache.derive.expression import Condition
from kdcache.derive.lineage import lineage_words
from kdcache.derive.mix import mix_records
from kdcache.derive.positions import keep_positions
from kdcache.derive.reduction.reduce import reduce_record
from kdcache.derive.scalars import record_values
from kdcache.errors import ConfigError, InputError, KdcacheError, MismatchError, StorageError
from kdcache.format import paths
from kdcache.format.manifest import LineageInfo, Manifest
from kdcache.format.record import SequenceRecord
from kdcache.format.sidecar import SidecarFile
from kdcache.store import chain
from kdcache.store.files import fs
from kdcache.store.files.location import Location, children, locate
from kdcache.store.reader import open_reader
from kdcache.store.sidecars import read_sidecar_file
from kdcache.store.writing.writer import CacheWriter

Progress = Callable[[int, int], None]
"""Called with (sequences done, sequences in all)."""


@dataclass(frozen=True)
class Derived:
    """What was made.

    Attributes:
        manifest: the new cache's newest.
        num_read: sequences that were taken from the sources; the cache holds fewer if some did not meet a condition.
        num_missing: sequences that were not in all sources of a mixture, and were skipped.
    """

    manifest: Manifest
    num_read: int
    num_missing: int


def derive(
    sources: Sequence[str | Path], out: str | Path, config: DeriveConfig | None = None, *, progress: Progress | None = None
) -> Derived:
    """Make a cache of one or several others, without asking a teacher.

    An interrupted derivation is resumed by the same call. One that fails leaves nothing, unless the disk or the store
    has failed after units were published.

    Args:
        sources: addresses of caches; their newest snapshots are read as they are.
        out: address of the new cache.
        config: what to do; by default the sources are written again as one.

    Raises:
        ConfigError: a config that these sources cannot satisfy. InputError: nothing to write, sequences that are missing, or
            a source that is not complete.
        MismatchError: sources that do not fit together; `out` holds something else.
        CacheNotFoundError, CorruptCacheError: a source cannot be read. StorageError: the disk or the store refuses.
    """
    config = config or DeriveConfig()
    root = locate(out)
    if not sources:
        raise ConfigError("no source was given; name one cache or several")
    if str(_absolute(root)) in {str(_absolute(locate(source))) for source in sources}:
        raise ConfigError(f"{out} is both a source and the destination; choose another directory for the new cache")
    with ExitStack() as stack:
        readers = [stack.enter_context(open_reader(source)) for source in sources]
        for source, reader in zip(sources, readers, strict=True):
            _refuse_incomplete(source, reader.manifest, config)
        derivation = make_derivation(readers, [str(reader.root).rstrip("/").rsplit("/", 1)[-1] for reader in readers], config)
        _refuse_other(root, derivation.manifest.lineage)
        with _removing_on_failure(root):
            sidecars = _carried(derivation) if not chain.manifest_numbers(root) else []
            writer = CacheWriter.open(
                root, derivation.manifest, record_batch_bytes=config.record_batch_bytes, sidecars=sidecars
            )
            return Derived(_write(derivation, writer, progress), len(derivation.indexes_SC), derivation.num_missing)


def _carried(derivation: Derivation) -> list[SidecarFile]:
    """The sidecars that all sources have, alike; a mixture has none, as they are of one teacher."""
    if derivation.config.mix is not None:
        return []
    first, *others = derivation.readers
    shared = [info for info in first.manifest.sidecars if all(info in other.manifest.sidecars for other in others)]
    return [read_sidecar_file(first.root, info) for info in shared]


@contextmanager
def _removing_on_failure(root: Location) -> Iterator[None]:
    """On a failure remove what this call began, unless the disk or the store refused and published units can be resumed.

    What an earlier call began stays.
    """
    is_new, made = not chain.manifest_numbers(root), fs.missing_directories(root)
    try:
        yield
    except (KdcacheError, OSError) as error:
        may_pass = isinstance(error, StorageError)
        if is_new and not isinstance(error, MismatchError) and not (may_pass and children(root / paths.JOURNAL)):
            with suppress(KdcacheError, OSError):
                fs.remove_cache(root, made)
        raise


def _write(derivation: Derivation, writer: CacheWriter, progress: Progress | None) -> Manifest:
    published, num_done, num_all = writer.published_units(), 0, len(derivation.indexes_SC)
    for unit in range(derivation.manifest.plan.num_units):
        if unit not in published:
            writer.write_unit(unit, _records(derivation, unit))
        num_done += len(derivation.unit(unit))
        if progress is not None:
            progress(num_done, num_all)
    return writer.fold()


def _records(derivation: Derivation, unit: int) -> Iterator[SequenceRecord]:
    parts = list(derivation.parts(derivation.unit(unit)))
    for source, reader in enumerate(derivation.readers):
        if reader.ahead is not None:
            reader.ahead.prefetch([index for made_of in parts for of, index in made_of if of == source])
    for made_of in parts:
        record = derived_record(derivation, [derivation.readers[source][index] for source, index in made_of])
        if record is not None:
            yield record


def derived_record(derivation: Derivation, records: Sequence[SequenceRecord]) -> SequenceRecord | None:
    """Make one sequence of the new cache from its records in the sources; None if a condition leaves it out."""
    config, before = derivation.config, derivation.before
    record = records[0] if config.mix is None else mix_records(records, config.mix, before)
    identity = derivation.manifest.identity

    def holds(condition: Condition) -> Any:
        return condition.holds(record_values(record, condition.names, before, identity.teacher.vocab_size))

    if derivation.where is not None and not holds(derivation.where):
        return None
    if derivation.where_position is not None:
        keep_P = np.asarray(holds(derivation.where_position))
        if not keep_P.any():
            return None
        record = keep_positions(record, keep_P, identity)
    if config.reduce is not None:
        record = reduce_record(record, before, identity.selection)
    return record


def _refuse_incomplete(source: str | Path, manifest: Manifest, config: DeriveConfig) -> None:
    if not (manifest.is_complete or "incomplete" in config.accept):
        raise InputError(
            f"{source}: only {len(manifest.shards)} of {manifest.plan.num_units} units are there, and a cache derived from it "
            "would look complete; finish it first, or use it as it is with --accept incomplete"
        )


def _refuse_other(root: Location, lineage: LineageInfo | msgspec.UnsetType) -> None:
    """Raise MismatchError if `out` is already a cache made in another way: the writer would only name fingerprints."""
    if not chain.manifest_numbers(root):
        return
    there = chain.newest_manifest(root).lineage
    if there != lineage:
        assert isinstance(lineage, LineageInfo)
        how = "captured from a teacher" if not isinstance(there, LineageInfo) else f"made by {lineage_words(there)}"
        raise MismatchError(
            f"{str(root)!r} holds another cache, {how}; asked for is {lineage_words(lineage)}; choose another directory, "
            "or repeat what made it to resume it"
        )


def _absolute(root: Location) -> Location:
    return root.resolve() if isinstance(root, Path) else root
