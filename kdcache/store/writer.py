"""Writing a cache: units in, published shards out; kill it anywhere and run it again.

A unit is done when its journal record exists. Order of publishing: shard (temp, fsync, rename, fsync of the directory), then
journal record, then, at a fold, index and manifest. A crash between two of these leaves files that no manifest names, which the
next run sweeps or publishes again under the same content-derived name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa

from kdcache.codec import get_codec
from kdcache.errors import CaptureError, CorruptCacheError, MismatchError
from kdcache.format import paths
from kdcache.format.manifest import Manifest, ShardInfo, shard_from_json, shard_to_json
from kdcache.format.record import SequenceRecord
from kdcache.format.schema import shard_schema
from kdcache.store import chain, fs
from kdcache.store.index import publish_index
from kdcache.store.rows import encode_records
from kdcache.store.statistics import ShardStatistics

_log = logging.getLogger(__name__)

MAX_ENTRIES = np.iinfo(np.uint16).max
DEFAULT_RECORD_BATCH_BYTES = 4 * 1024 * 1024


class CacheWriter:
    """One writer of a cache. Several may write the same cache at once: names are private until published, and a unit that is
    done twice is folded once.

    Make one with `CacheWriter.open`.
    """

    def __init__(self, root: Path, manifest: Manifest, record_batch_bytes: int) -> None:
        self.root, self._first, self._record_batch_bytes = root, manifest, record_batch_bytes
        self._codec = get_codec(manifest.identity.codec.codec_id, manifest.identity.codec.params)

    @classmethod
    def open(cls, path: str | Path, manifest: Manifest, *, record_batch_bytes: int = DEFAULT_RECORD_BATCH_BYTES) -> CacheWriter:
        """Start a cache, or go on with the one that is there.

        Args:
            path: the cache's directory; made if missing.
            manifest: number 0, without shards: identity, plan, versions, config.
            record_batch_bytes: about this many bytes of rows per Arrow record batch.

        Raises:
            MismatchError: the directory holds another capture, or files that are no cache.
            CaptureError: the directory cannot be made.
        """
        root = Path(path)
        refuse_foreign_directory(root)
        fs.make_directories(root)
        fs.sweep_temp_files(root)
        if not chain.manifest_numbers(root):
            chain.add_manifest(root, manifest)
        first = chain.read_manifest(root, 0)
        _refuse_other_capture(root, first, manifest)
        return cls(root, first, record_batch_bytes)

    @property
    def manifest(self) -> Manifest:
        """The newest snapshot."""
        return chain.newest_manifest(self.root)

    def published_units(self) -> set[int]:
        """Units that are done: in the newest manifest, or journalled since."""
        return {shard.unit for shard in self.manifest.shards} | {shard.unit for shard in self._journal()}

    def write_unit(self, unit: int, records: Iterable[SequenceRecord]) -> ShardInfo:
        """Encode, write and publish one unit as one shard.

        Args:
            unit: its number in the plan.
            records: its sequences, in order; may be empty. Consumed once; about one record batch of them is held at a time.

        Raises:
            CaptureError: the unit is not in the plan, a position has over 65535 entries, or the disk refuses.
        """
        if not 0 <= unit < self._first.plan.num_units:
            raise CaptureError(f"unit {unit} is not in the plan of {self._first.plan.num_units} units")
        temp = fs.temp_path(self.root)
        try:
            statistics = self._write_shard(temp, unit, records)
            fs.reached("temp file written")
            shard = self._publish_shard(temp, unit, statistics)
            fs.publish_bytes(self.root, shard_to_json(shard), paths.journal_name(unit, shard.sha256))
        except OSError as error:
            raise CaptureError(
                f"unit {unit} could not be written to {str(self.root)!r}: {error}; nothing published is lost"
            ) from error
        finally:
            temp.unlink(missing_ok=True)
        fs.reached("journal published")
        return shard

    def fold(self) -> Manifest:
        """Publish a manifest that names every shard journalled so far; the newest one where there is nothing new.

        When the cache is complete, files of units that were done twice are swept.
        """
        while True:
            newest = self.manifest
            done = {shard.unit for shard in newest.shards}
            new = {shard.unit: shard for shard in self._journal() if shard.unit not in done}
            if not new:
                break
            shards = tuple(sorted([*newest.shards, *new.values()], key=lambda shard: shard.unit))
            index = publish_index(self.root, shards)
            manifest = msgspec.structs.replace(
                newest, number=newest.number + 1, parent=newest.digest, shards=shards, index=index
            )
            chain.add_manifest(self.root, manifest)  # if another writer was first, the next turn of the loop sees its manifest
        if newest.is_complete:
            self._sweep_redundant(newest)
        return newest

    def _journal(self) -> Iterator[ShardInfo]:
        """Shards from the journal whose file is there; of several for a unit, the first name's comes last."""
        names = sorted(p.name for p in (self.root / paths.JOURNAL).iterdir() if paths.parse_journal_name(p.name) is not None)
        for name in reversed(names):
            path = self.root / paths.JOURNAL / name
            try:
                shard = shard_from_json(path.read_bytes(), where=str(path))
            except CorruptCacheError as error:
                _log.warning("%s; its unit is done again", error)
                continue
            if (self.root / shard.name).exists():
                yield shard

    def _write_shard(self, temp: Path, unit: int, records: Iterable[SequenceRecord]) -> ShardStatistics:
        identity = self._first.identity
        vocab_size = identity.teacher.vocab_size
        fields = self._codec.fields()
        schema = shard_schema(fields, unit=unit, vocab_size=vocab_size, selection=identity.selection, codec=identity.codec)
        statistics = ShardStatistics(vocab_size)
        fixed = identity.selection.params.get("k") if identity.selection.kind == "top_k" else None
        with pa.OSFile(str(temp), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for group in self._groups(records, statistics):
                batch = encode_records(group, self._codec, schema, fixed)
                for name, column in zip(schema.names, batch.columns, strict=True):
                    statistics.add_column_bytes(name, column.nbytes)
                writer.write_batch(batch)
        return statistics

    def _groups(self, records: Iterable[SequenceRecord], statistics: ShardStatistics) -> Iterator[list[SequenceRecord]]:
        group: list[SequenceRecord] = []
        num_bytes = 0
        for record in records:
            if record.distributions.num_entries_P.max(initial=0) > MAX_ENTRIES and not self._is_fixed(record):
                raise CaptureError(f"{record.sequence.source}: a position has more than {MAX_ENTRIES} entries")
            statistics.add(record)
            group.append(record)
            num_bytes += 6 * record.distributions.num_entries + 8 * record.sequence.num_tokens
            if num_bytes >= self._record_batch_bytes:
                yield group
                group, num_bytes = [], 0
        if group:
            yield group

    def _is_fixed(self, record: SequenceRecord) -> bool:
        return bool((record.distributions.num_entries_P == self._first.identity.selection.params.get("k")).all())

    def _publish_shard(self, temp: Path, unit: int, statistics: ShardStatistics) -> ShardInfo:
        sha256, num_bytes = fs.sha256_of(temp), temp.stat().st_size
        totals = {k: v for k, v in vars(statistics).items() if k != "vocab_size"}
        name = paths.shard_name(unit, sha256)
        fs.publish_file(self.root, temp, name)
        fs.reached("shard published")
        return ShardInfo(unit=unit, name=name, sha256=sha256, num_bytes=num_bytes, **totals)

    def _sweep_redundant(self, manifest: Manifest) -> None:
        kept = {shard.name for shard in manifest.shards}
        journals = {paths.journal_name(shard.unit, shard.sha256) for shard in manifest.shards}
        # The journal record goes first: a record without its shard would be a promise that nothing keeps.
        for directory, names in ((paths.JOURNAL, journals), (paths.DATA, kept)):
            for path in (self.root / directory).iterdir():
                if f"{directory}/{path.name}" not in names:
                    path.unlink(missing_ok=True)
                    fs.reached("swept one")


def refuse_foreign_directory(root: Path) -> None:
    """Raise MismatchError unless a cache is there or may be made there: a capture asks before it loads a model."""
    if root.exists() and not root.is_dir():
        raise MismatchError(f"output {str(root)!r} is a file; expected a directory for the cache")
    if not root.is_dir():
        return
    foreign = sorted(p.name for p in root.iterdir() if p.name not in paths.DIRECTORIES)
    if foreign and not chain.manifest_numbers(root):
        raise MismatchError(
            f"output directory {str(root)!r} is not a cache and not empty (it holds {foreign[0]!r}); "
            "choose an empty or new directory"
        )


def _refuse_other_capture(root: Path, theirs: Manifest, ours: Manifest) -> None:
    differences = theirs.identity.differences(ours.identity)
    if theirs.plan != ours.plan:
        differences.append(
            f"plan: {theirs.plan.num_units} units {theirs.plan.fingerprint[:12]} != {ours.plan.num_units} units "
            f"{ours.plan.fingerprint[:12]}"
        )
    if differences:
        raise MismatchError(
            f"{str(root)!r} holds another capture (there != asked for): {'; '.join(differences)}; "
            "choose another output.path, or repeat the config that made it to resume"
        )
