"""Write a cache: units in, published shards out; kill it anywhere and run it again.

A unit is done when its journal record exists. Order of publishing: shard (temp, fsync, rename, fsync of the directory), then
journal record, then, at a fold, index and manifest. A crash between two of these leaves files that no manifest names, which the
next run sweeps or publishes again under the same content-derived name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec import get_codec
from kdcache.codec.features.columns import feature_fields
from kdcache.codec.features.constants import FeatureConstants
from kdcache.config.remote import RemoteConfig
from kdcache.errors import CorruptCacheError, FormatError, KdcacheError, StorageError
from kdcache.format import paths
from kdcache.format.manifest import FeatureInfo, Manifest, ShardInfo, SidecarInfo, UnitAccount, shard_to_json
from kdcache.format.record import SequenceRecord
from kdcache.format.record_checks import check_record
from kdcache.format.schema import optional_fields, shard_schema
from kdcache.format.selection import fixed_entries
from kdcache.format.sidecar import SidecarFile, make_sidecar
from kdcache.shown import get_logger
from kdcache.store import chain
from kdcache.store.chain import read_journal_record
from kdcache.store.files import fs
from kdcache.store.files.disk_errors import reason_of
from kdcache.store.files.location import Location, each, locate, own_files
from kdcache.store.index import publish_index
from kdcache.store.records.encode import encode_records
from kdcache.store.sidecars import sidecar_constants
from kdcache.store.writing.admission import refuse_foreign_directory, refuse_other_capture
from kdcache.store.writing.sidecars import publish_sidecar, with_sidecar, with_sidecars
from kdcache.store.writing.statistics import ShardStatistics

_log = get_logger(__name__)

DEFAULT_RECORD_BATCH_BYTES = 4 * 1024 * 1024
MAX_RECORD_BATCH_BYTES = 2**30
"""With one more sequence of the most entries it still fits 31-bit list offsets."""

MAX_FOLD_TRIES = 1000
"""Each failed try is another writer's success, so that only more writers than this at once could meet it."""


_RESUME = "nothing published is lost, and the same command resumes when the cause is gone"


class CacheWriter:
    """One writer of a cache. Several may write the same cache at once: names are private until published, and a unit that is
    done twice is folded once.

    Make one with `CacheWriter.open`.
    """

    def __init__(self, root: Location, manifest: Manifest, record_batch_bytes: int) -> None:
        self.root, self._first = root, manifest
        self._record_batch_bytes = min(record_batch_bytes, MAX_RECORD_BATCH_BYTES)
        identity = manifest.identity
        self._codec = get_codec(identity.codec.codec_id, identity.codec.params, identity.selection)
        self._fixed = fixed_entries(identity.selection)

    @classmethod
    def open(
        cls,
        path: str | Location,
        manifest: Manifest,
        *,
        record_batch_bytes: int = DEFAULT_RECORD_BATCH_BYTES,
        remote: RemoteConfig | None = None,
        sidecars: Sequence[SidecarFile] = (),
    ) -> CacheWriter:
        """Start a cache, or resume the one that is there.

        What was fitted to a sample (`fit_feature`) is not compared: the fit of the cache that is there counts, see `features`.

        Args:
            path: the cache's directory, made if missing; or its URI in an object store.
            manifest: the first (its number is 0), without shards: identity, plan, versions, config.
            record_batch_bytes: about this many bytes of sequences per Arrow record batch.
            remote: how an object store is reached.
            sidecars: of a new cache: those that its features need, and others.

        Raises:
            FormatError: the cache is new, and a feature has not been fitted.
            MismatchError: the directory holds another capture, or files that do not belong to a cache.
            UnsupportedVersionError: it holds a cache of a newer format.
            StorageError: the directory cannot be made or written.
        """
        root = locate(path, remote)
        refuse_foreign_directory(root)
        fs.make_directories(root)
        with _disk_errors(f"the cache at {str(root)!r} cannot be started"):
            fs.sweep_temp_files(root)
            if not chain.manifest_numbers(root):
                listed = with_sidecars(manifest, sidecars)
                for sidecar in sidecars:
                    publish_sidecar(root, sidecar)
                chain.add_manifest(root, listed)
        first = chain.newest_manifest(root)
        refuse_other_capture(root, first, manifest)
        return cls(root, first, record_batch_bytes)

    @property
    def manifest(self) -> Manifest:
        """The newest snapshot."""
        return chain.newest_manifest(self.root)

    @property
    def features(self) -> tuple[FeatureInfo, ...]:
        """What the cache keeps of the teacher's states, fitted: what this writer's records must have."""
        return self._first.identity.features

    @cached_property
    def constants(self) -> dict[str, FeatureConstants]:
        """What the stored numbers of the features refer to: name -> constants, from the cache's sidecars."""
        return sidecar_constants(self.root, self._first)

    def add_sidecar(
        self, name: str, arrays: Mapping[str, NDArray[Any]], *, bfloat16: Collection[str] = (), replaces: bool = False
    ) -> SidecarInfo:
        """Publish a file of arrays that belongs to the cache, and a manifest that lists it; nothing where it is there already.

        Args:
            name: unique in the cache, as in `output_projection`.
            arrays: name -> numbers.
            bfloat16: the arrays whose uint16 are the bits of bfloat16.
            replaces: whether it may stand in for one of that name; earlier snapshots keep theirs.

        Raises:
            FormatError: another one has this name, or the features need that one. StorageError: the disk or the store refuses.
        """
        sidecar = make_sidecar(name, arrays, bfloat16)
        with _disk_errors(f"sidecar {name!r} could not be written to {str(self.root)!r}"):
            for _ in range(MAX_FOLD_TRIES):
                manifest = with_sidecar(self.manifest, sidecar, replaces=replaces)
                if manifest is None:
                    return sidecar.info
                publish_sidecar(self.root, sidecar)
                if chain.add_manifest(self.root, manifest):
                    return sidecar.info
        raise StorageError(f"sidecar {name!r}: {MAX_FOLD_TRIES} times another writer's manifest came first")

    def published_units(self) -> set[int]:
        """Units that are done: in the newest manifest, or journalled since."""
        folded = {shard.unit for shard in self.manifest.shards}
        return folded | {shard.unit for shard in self._journal(folded)}

    def write_unit(
        self,
        unit: int,
        records: Iterable[SequenceRecord],
        *,
        account: Callable[[], UnitAccount] | None = None,
        sums_to_one: bool = False,
    ) -> ShardInfo:
        """Encode, write and publish one unit as one shard.

        Args:
            unit: its index in the plan.
            records: its sequences, in order; may be empty. Consumed once; about one record batch of them is held at a time.
            account: asked, when the last record is written, what the unit took.
            sums_to_one: the records are a teacher's own answers, whose mass is checked too.

        Raises:
            FormatError: the unit is not in the plan, or a record breaks the contract (`check_record`); names its source.
            StorageError: the disk or the store refuses.
        """
        if not 0 <= unit < self._first.plan.num_units:
            raise FormatError(f"unit {unit} is not in the plan of {self._first.plan.num_units} units")
        temp = fs.temp_path(self.root)
        with _disk_errors(f"unit {unit} could not be written to {str(self.root)!r}"):
            try:
                statistics = self._write_shard(temp, unit, records, sums_to_one=sums_to_one)
                fs.reached("temp file written")
                shard = self._publish_shard(temp, unit, statistics, account() if account is not None else msgspec.UNSET)
                fs.publish_bytes(self.root, shard_to_json(shard), paths.journal_name(unit, shard.sha256))
            finally:
                temp.unlink(missing_ok=True)
        fs.reached("journal published")
        return shard

    def check(self, record: SequenceRecord, *, sums_to_one: bool = False) -> NDArray[np.float32]:
        """The check that every record meets before it is written; (P,) the teacher's logprobs of its targets.

        Raises:
            FormatError: see `check_record`; names the record's source.
        """
        try:
            return check_record(record, self._first.identity, sums_to_one=sums_to_one)
        except FormatError as error:
            raise FormatError(f"{record.sequence.source}: {error}; the record cannot be stored") from error

    def fold(self) -> Manifest:
        """Publish a manifest that names every shard journalled so far; the newest one where there is nothing new.

        When the cache is complete, files that no manifest needs are swept: of units that were done twice, of folds that lost.

        Raises:
            CorruptCacheError: a manifest or a shard is damaged. StorageError: the disk or the store refuses.
        """
        with _disk_errors(f"{str(self.root)!r} could not be folded"):
            for _ in range(MAX_FOLD_TRIES):
                newest = self.manifest
                done = {shard.unit for shard in newest.shards}
                new = {shard.unit: shard for shard in self._journal(done)}
                folded = self._try_to_fold(newest, list(new.values())) if new else newest
                if folded is not None:
                    if folded.is_complete:
                        self._sweep_redundant(folded)
                    return folded
        raise StorageError(
            f"{str(self.root)!r} could not be folded: {MAX_FOLD_TRIES} times another writer's manifest came first"
        )

    def _try_to_fold(self, newest: Manifest, new: list[ShardInfo]) -> Manifest | None:
        """Publish the next snapshot; None where another writer was first: the next try starts from what that one published."""
        shards = tuple(sorted([*newest.shards, *new], key=lambda shard: shard.unit))
        try:
            index = publish_index(self.root, newest, new)
        except CorruptCacheError:
            if all((self.root / shard.name).exists() for shard in new):
                raise
            return None  # another writer's fold made the cache complete and swept a shard of ours that was one too many
        manifest = msgspec.structs.replace(newest, number=newest.number + 1, parent=newest.digest, shards=shards, index=index)
        return manifest if chain.add_manifest(self.root, manifest) else None

    def _journal(self, folded: Collection[int]) -> Iterator[ShardInfo]:
        """Shards from the journal whose file is there and whole; of several for a unit, the first name's comes last.

        Records of folded units are not opened: the journal keeps them, so reading them all at each fold would make a long
        capture quadratic.
        """
        units = {name: paths.parse_journal_name(name) for name in self.journal_names()}
        names = sorted((n for n, unit in units.items() if unit is not None and unit not in folded), reverse=True)
        return (shard for shard in each(self._journalled, names, self.root) if shard is not None)

    def journal_names(self) -> list[str]:
        """The base names of the journal's records."""
        return [path.name for path in (self.root / paths.JOURNAL).iterdir()]

    def _journalled(self, name: str) -> ShardInfo | None:
        try:
            shard = read_journal_record(self.root / paths.JOURNAL / name)
            if shard.unit < self._first.plan.num_units and (self.root / shard.name).stat().st_size == shard.num_bytes:
                return shard
        except FileNotFoundError:
            return None  # swept since, or its shard was
        except CorruptCacheError as error:
            _log.warning("%s; its unit is done again", error)
        return None

    def _write_shard(self, temp: Path, unit: int, records: Iterable[SequenceRecord], *, sums_to_one: bool) -> ShardStatistics:
        identity = self._first.identity
        vocab_size = identity.teacher.vocab_size
        fields = [*self._codec.fields(), *feature_fields(identity.features)]
        schema = shard_schema(
            fields, unit=unit, vocab_size=vocab_size, selection=identity.selection, codec=identity.codec,
            optional=optional_fields(identity), features=identity.features,
        )  # fmt: skip
        statistics = ShardStatistics(vocab_size)
        with pa.OSFile(str(temp), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for group in self._groups(records, statistics, sums_to_one=sums_to_one):
                batch = encode_records(group, self._codec, schema, self._fixed, self.constants)
                for name, column in zip(schema.names, batch.columns, strict=True):
                    statistics.add_column_bytes(name, column.nbytes)
                writer.write_batch(batch)
        return statistics

    def _groups(
        self, records: Iterable[SequenceRecord], statistics: ShardStatistics, *, sums_to_one: bool
    ) -> Iterator[list[SequenceRecord]]:
        group: list[SequenceRecord] = []
        num_bytes = 0
        for record in records:
            statistics.add(record, self.check(record, sums_to_one=sums_to_one))
            group.append(record)
            num_bytes += sum(4 * values.size for values in record.distributions.features.values())
            num_bytes += 6 * record.distributions.num_entries + 8 * record.sequence.num_tokens
            if num_bytes >= self._record_batch_bytes:
                yield group
                group, num_bytes = [], 0
        if group:
            yield group

    def _publish_shard(
        self, temp: Path, unit: int, statistics: ShardStatistics, account: UnitAccount | msgspec.UnsetType
    ) -> ShardInfo:
        sha256, num_bytes = fs.sha256_of(temp), temp.stat().st_size
        totals = {k: v for k, v in vars(statistics).items() if k != "vocab_size"}
        name = paths.shard_name(unit, sha256)
        fs.publish_file(self.root, temp, name)
        fs.reached("shard published")
        return ShardInfo(unit=unit, name=name, sha256=sha256, num_bytes=num_bytes, account=account, **totals)

    def _sweep_redundant(self, manifest: Manifest) -> None:
        needed = {shard.name for shard in manifest.shards} | self._index_names()
        needed |= {paths.journal_name(shard.unit, shard.sha256) for shard in manifest.shards} | self._sidecar_names()
        # The journal record goes first: a record without its shard would be a promise that nothing keeps.
        for directory in (paths.FAILED, paths.JOURNAL, paths.DATA, paths.INDEX, paths.SIDECARS):
            for path in own_files(self.root / directory):
                name = f"{directory}/{path.name}"
                if paths.is_own_name(name) and name not in needed:
                    path.unlink(missing_ok=True)
                    fs.reached("swept one")

    def _index_names(self) -> set[str]:
        """The indexes of all manifests: a reader of an older snapshot needs its own."""
        return {manifest.index.name for manifest in self._manifests() if manifest.index is not None}

    def _sidecar_names(self) -> set[str]:
        """The sidecars of all manifests."""
        return {paths.sidecar_name(sidecar.sha256) for manifest in self._manifests() for sidecar in manifest.sidecars}

    def _manifests(self) -> Iterator[Manifest]:
        for number in chain.manifest_numbers(self.root):
            with suppress(CorruptCacheError):  # an older snapshot that nobody can read any more
                yield chain.read_manifest(self.root, number)


@contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{what}: {error}; {_RESUME}") from error
    except KdcacheError:
        raise  # some of ours are OSErrors too
    except OSError as error:
        raise StorageError(f"{what}: {reason_of(error)}; {_RESUME}") from error
