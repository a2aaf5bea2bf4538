"""Reading a cache: any sequence by its index, memory-mapped or by byte ranges, its digest checked on every read."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec import get_codec
from kdcache.codec.base import Codec
from kdcache.codec.features.constants import FeatureConstants
from kdcache.config.remote import RemoteConfig
from kdcache.errors import CorruptCacheError, KdcacheError, MismatchError, UnsupportedVersionError
from kdcache.format import paths
from kdcache.format.manifest import Manifest, ShardInfo
from kdcache.format.record import KEY_BYTES, SequenceRecord
from kdcache.format.schema import GROUP_FIELDS, ShardMetadata
from kdcache.store import chain
from kdcache.store.files.location import Location, locate
from kdcache.store.index import snapshot_index
from kdcache.store.records.arrow_file import open_arrow_file
from kdcache.store.records.batch import BatchReader, EncodedRecord
from kdcache.store.records.mapped import MAPPED_SEQUENCE, MappedSequences, SequenceFormat
from kdcache.store.remote.look_ahead import LookAhead
from kdcache.store.remote.remote_read import RemoteFile
from kdcache.store.shard_checks import check_shard, open_shard
from kdcache.store.sidecars import find_sidecar, read_sidecar, sidecar_constants

OPEN_BATCHES = 256
"""Record batches kept open per reader: views of memory maps and one byte per token, about 16 KiB each."""


_readers: weakref.WeakSet[CacheReader] = weakref.WeakSet()


def open_reader(path: str | Path, *, verify: bool = True, remote: RemoteConfig | None = None) -> CacheReader:
    """Open the newest snapshot of a cache.

    Args:
        path: the cache's directory, or its URI: `file://`, `s3://`, `gs://`, `hf://` or `memory://`.
        verify: check each sequence's digest on every read. benchmarks/results/loader.md says what that costs; turn it off only
            to measure it.
        remote: how an object store is reached, and where what is read from it is kept.

    Raises:
        CacheNotFoundError: no cache at the path.
        CorruptCacheError, UnsupportedVersionError: the manifest or the index cannot be read.
        StorageError: the store is out of reach. ConfigError: an unknown scheme, or a folder for blocks that cannot be used.
    """
    root = locate(path, remote)
    return CacheReader(root, chain.newest_manifest(root), verify=verify)


class CacheReader:
    """A snapshot of a cache: `len(reader)` sequences, `reader[i]` a SequenceRecord. Never writes to the cache.

    Safe to use from several threads; can be pickled (it re-opens the same snapshot) and used after a fork.

    Attributes:
        manifest: what the snapshot holds.
        num_tokens_S: (S,) uint32, tokens of each sequence, from the index.
        num_positions_S: (S,) uint32, supervised positions of each sequence, from the index.
        groups_S: (S, 16) uint8 groups and (S,) uint8 preferences, from the index; None where the cache has none.
        ahead: fetches what is read next from an object store; None for a cache on a disk, where nothing is gained by it.
    """

    def __init__(self, root: Location, manifest: Manifest, *, verify: bool = True) -> None:
        self.root, self.manifest, self._verify = root, manifest, verify
        self._codec = _codec_of(manifest, root)
        self._entry_format = self._codec.entry_format()
        table = _index_of(root, manifest)
        self.num_tokens_S: NDArray[np.uint32] = table.column("num_tokens").to_numpy()
        self.num_positions_S: NDArray[np.uint32] = table.column("num_positions").to_numpy()
        self._unit_S, self._batch_S, self._in_batch_S = (table.column(n).to_numpy() for n in ("unit", "record_batch", "row"))
        self._keys_S = _keys(table.column("key"))
        self.groups_S = _groups(table)
        self._keys_address: int = self._keys_S.__array_interface__["data"][0]
        self._format: SequenceFormat | None = None
        self._constants: dict[str, FeatureConstants] | None = None
        self._shards = {shard.unit: shard for shard in manifest.shards}
        self._files: dict[int, tuple[pa.RecordBatchFileReader | RemoteFile, ShardMetadata]] = {}
        self._batches: OrderedDict[tuple[int, int], BatchReader] = OrderedDict()
        self.ahead = None if isinstance(root, Path) else LookAhead(root, self._shards, table)
        self._lock = threading.Lock()
        _readers.add(self)

    @property
    def snapshot(self) -> str:
        """The manifest's digest: names exactly this content."""
        return self.manifest.digest

    @property
    def keys_S(self) -> NDArray[np.uint8]:
        """The key of each sequence, (S, 16) uint8, from the index; not to be written."""
        return self._keys_S

    def __len__(self) -> int:
        return len(self.num_tokens_S)

    def __getitem__(self, index: int) -> SequenceRecord:
        """Read a sequence by its index in the cache's order.

        Raises:
            IndexError: out of range. CorruptCacheError: the shard is missing or damaged; names file, record batch and sequence.
        """
        return self.encoded(index).decode()

    def encoded(self, index: int) -> EncodedRecord:
        """Read a sequence without decoding its entries; raises as `reader[index]` does."""
        num_sequences = len(self.num_tokens_S)
        if not -num_sequences <= index < num_sequences:
            raise IndexError(f"sequence {index} of a cache of {num_sequences}")
        try:
            return self._encoded(index)
        except CorruptCacheError as error:
            if self.ahead is None:
                raise self._located(error, index) from error
        try:
            # The bytes may have been changed on their way here: the store itself is asked once more.
            self._forget(index)
            return self._encoded(index)
        except CorruptCacheError as error:
            raise self._located(error, index) from error

    def _located(self, error: CorruptCacheError, index: int) -> CorruptCacheError:
        """Add to an error where the damage is and what to do."""
        index %= len(self.num_tokens_S)
        unit, batch, _ = self.locate(index)
        located = CorruptCacheError(f"{error}; `kdcache repair {self.root}` sets what is damaged aside")
        shard = self._shards.get(unit)
        located.path, located.record_batch = None if shard is None else str(self.root / shard.name), batch
        located.sequence = index
        return located

    def _encoded(self, index: int) -> EncodedRecord:
        unit, batch, which = self.locate(index)
        reader = self.record_batch(unit, batch)
        if which >= reader.num_sequences:
            where = f"{self.root / self._shards[unit].name}: record batch {batch}"
            raise CorruptCacheError(f"{where} has {reader.num_sequences} sequences, the index names sequence {which} of it")
        record = reader.encoded(which, verify=self._verify)
        self.check_sequence(index, record, record.where)
        return record

    def locate(self, index: int) -> tuple[int, int, int]:
        """The unit of a sequence, its record batch in the unit's shard, and its index in the record batch."""
        return int(self._unit_S[index]), int(self._batch_S[index]), int(self._in_batch_S[index])

    def check_sequence(self, index: int, record: SequenceRecord | EncodedRecord, where: str) -> None:
        """Raise CorruptCacheError unless a record is the one that the index names.

        A digest says that a sequence's bytes are whole, not that they are this sequence's: damage in Arrow's own framing can
        put another sound sequence there.

        Args:
            index: of the sequence.
            record: what was read for it.
            where: shard, record batch and sequence, for the message.
        """
        if isinstance(record, EncodedRecord):
            found = record.key, record.num_tokens, record.num_positions
        else:
            found = record.sequence.key, record.sequence.num_tokens, record.distributions.num_positions
        expected = self._keys_S[index].tobytes(), int(self.num_tokens_S[index]), int(self.num_positions_S[index])
        if found != expected:
            raise CorruptCacheError(f"{where}: holds {_show(found)}, the index says {_show(expected)}")

    def record_batch(self, unit: int, index: int) -> BatchReader:
        """A record batch of a unit's shard, from the ones kept open or newly mapped and validated."""
        self._check_size(unit)
        with self._lock:
            if (unit, index) in self._batches:
                self._batches.move_to_end((unit, index))
                return self._batches[unit, index]
        reader = self._open_batch(unit, index)
        with self._lock:
            self._batches[unit, index] = reader
            most = OPEN_BATCHES if self.ahead is None else self.ahead.most_open
            while len(self._batches) > most:
                self._batches.popitem(last=False)
        return reader

    def mapped(self, indices: NDArray[np.int64]) -> MappedSequences | None:
        """Sequences of this snapshot, for a compiled loop to read.

        None where that cannot be: in an object store, for a codec that no compiled loop reads, and where something is wrong.
        `encoded` then reads them, or says what is wrong.
        """
        if self.ahead is not None or self._entry_format is None:
            return None
        which = self._in_batch_S[indices].tolist()
        try:
            found = self._record_batches(zip(self._unit_S[indices].tolist(), self._batch_S[indices].tolist(), strict=True))
        except KdcacheError:
            return None
        lines = [reader.line(index) for reader, index in zip(found, which, strict=True)]
        num_positions = self.num_positions_S[indices]
        # Of the sequences themselves: memory is taken for this many, so no index may claim more than there are.
        if not all(lines) or [r.num_positions[i] for r, i in zip(found, which, strict=True)] != num_positions.tolist():
            return None
        table = np.empty(len(which), MAPPED_SEQUENCE)
        table["line"], table["key"] = lines, self._keys_address + indices * KEY_BYTES
        table["num_tokens"], table["num_positions"] = self.num_tokens_S[indices], num_positions
        if self._format is None and found:
            names, selection = tuple(found[0].views), self.manifest.identity.selection
            self._format = SequenceFormat(names, self._entry_format, selection, found[0].fixed, self._verify)
        return None if self._format is None else MappedSequences(self._format, table, found, which)

    def _record_batches(self, wanted: Iterable[tuple[int, int]]) -> list[BatchReader]:
        """The record batches of these units and indices, of which most are kept open already."""
        wanted = list(wanted)
        for unit in {unit for unit, _ in wanted}:
            self._check_size(unit)
        found: list[tuple[tuple[int, int], BatchReader | None]] = []
        with self._lock:
            for key in wanted:
                found.append((key, self._batches.get(key)))
                if found[-1][1] is not None:
                    self._batches.move_to_end(key)
        return [self.record_batch(*key) if reader is None else reader for key, reader in found]

    def sidecar(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays of one of the cache's sidecars, read and checked; bfloat16 as its bits, uint16.

        Raises:
            ConfigError: the cache has none of this name. CorruptCacheError: it is missing or damaged.
        """
        return read_sidecar(self.root, find_sidecar(self.manifest, name, str(self.root)))

    def constants(self) -> dict[str, FeatureConstants]:
        """What the stored numbers of the features refer to; read from the sidecars when it is first asked for."""
        if self._constants is None:
            self._constants = sidecar_constants(self.root, self.manifest)
        return self._constants

    def num_record_batches(self, unit: int) -> int:
        """How many record batches a unit's shard has."""
        return self._file(unit)[0].num_record_batches

    def close(self) -> None:
        """Release the maps and threads; the reader can still be used, and maps again."""
        with self._lock:
            self._batches.clear()
            self._files.clear()
        if self.ahead is not None:
            self.ahead.shards.close()

    def __enter__(self) -> CacheReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        root = self.root.absolute()  # another process may stand in another directory
        return {"root": root, "number": self.manifest.number, "snapshot": self.snapshot, "verify": self._verify}

    def __setstate__(self, state: dict[str, Any]) -> None:
        manifest = chain.read_manifest(state["root"], state["number"])
        if manifest.digest != state["snapshot"]:
            raise MismatchError(
                f"{str(state['root'])!r}: manifest {manifest.number} is {manifest.digest}, the reader that was pickled had "
                f"{state['snapshot']}; another cache has taken its path"
            )
        self.__init__(state["root"], manifest, verify=state["verify"])

    def _check_size(self, unit: int) -> None:
        """Raise CorruptCacheError for a shard on a disk that is not of its size any more: a map that is read beyond its file's
        end ends the process (SIGBUS). About a microsecond. A shard that is deleted can still be read where it is mapped."""
        if self.ahead is not None or unit not in self._files:
            return
        shard = self._shards[unit]
        try:
            num_bytes = os.stat(f"{self.root}/{shard.name}").st_size
        except OSError:
            return
        if num_bytes != shard.num_bytes:
            raise CorruptCacheError(
                f"{self.root / shard.name}: has {num_bytes} bytes, the manifest says {shard.num_bytes}; the shard has been "
                "changed since it was opened"
            )

    def _open_batch(self, unit: int, index: int) -> BatchReader:
        file, metadata = self._file(unit)
        where = f"{self._shards[unit].name}: record batch {index}"
        if index >= file.num_record_batches:
            raise CorruptCacheError(f"{self.root / where}: the shard has {file.num_record_batches} of them")
        try:
            batch = file.get_batch(index)
        except (pa.ArrowException, OSError, IndexError, ValueError) as error:
            raise CorruptCacheError(f"{self.root / where}: {error}") from error
        return BatchReader(batch, metadata, self._codec, str(self.root / where), self.constants)

    def _forget(self, index: int) -> None:
        """Close a sequence's record batch and shard, and drop what is kept of them."""
        unit, batch, _ = self.locate(index)
        with self._lock:
            self._batches.pop((unit, batch), None)
            self._files.pop(unit, None)
        if self.ahead is not None and unit in self._shards:
            self.ahead.shards.forget(unit, batch)

    def _file(self, unit: int) -> tuple[pa.RecordBatchFileReader | RemoteFile, ShardMetadata]:
        with self._lock:
            opened = self._files.get(unit)
        if opened is None:
            if unit not in self._shards:
                raise CorruptCacheError(f"{self.root}: the index names unit {unit}, which the manifest does not have")
            opened = self._open_shard(self._shards[unit])  # without the lock: in an object store it takes a request
            with self._lock:
                self._files[unit] = opened
        return opened

    def _open_shard(self, shard: ShardInfo) -> tuple[pa.RecordBatchFileReader | RemoteFile, ShardMetadata]:
        if self.ahead is None:
            assert isinstance(self.root, Path)
            return open_shard(self.root, shard, self.manifest)
        file = self.ahead.shards.open(shard.unit)
        return file, check_shard(file.schema, shard, self.manifest, str(self.root / shard.name))

    def read_from(self, copy: Path | None, shard: ShardInfo) -> None:
        """Read a shard from a local copy from now on; None for the shard itself again."""
        opened = None if copy is None else open_arrow_file(copy)
        with self._lock:
            self._files.pop(shard.unit, None)
            for key in [key for key in self._batches if key[0] == shard.unit]:
                del self._batches[key]
            if opened is not None:
                metadata = check_shard(opened.schema, shard, self.manifest, str(self.root / shard.name))
                self._files[shard.unit] = opened, metadata


def _groups(table: pa.Table) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
    group, preference = (field.name for field in GROUP_FIELDS)
    return (_keys(table.column(group)), table.column(preference).to_numpy()) if group in table.schema.names else None


def _index_of(root: Location, manifest: Manifest) -> pa.Table:
    """The index of a snapshot; the error of a damaged one ends with what to do."""
    try:
        return snapshot_index(root, manifest)
    except CorruptCacheError as error:
        damaged = CorruptCacheError(f"{error}; `kdcache repair {root}` makes the index again from the shards")
        damaged.path = None if manifest.index is None else str(root / manifest.index.name)
        raise damaged from error


def _codec_of(manifest: Manifest, root: Location) -> Codec:
    try:
        identity = manifest.identity
        return get_codec(identity.codec.codec_id, identity.codec.params, identity.selection)
    except UnsupportedVersionError as error:
        raise UnsupportedVersionError(f"{root / paths.manifest_name(manifest.number)}: {error}") from error


def _keys(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """The keys of all sequences, (S, 16) uint8; a view where the index is one record batch."""
    keys = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies even a single one
    first = keys.offset * KEY_BYTES
    return np.frombuffer(keys.buffers()[1] or b"", np.uint8)[first : first + len(keys) * KEY_BYTES].reshape(-1, KEY_BYTES)


def _show(found: tuple[bytes, int, int]) -> str:
    return f"key {found[0].hex()} with {found[1]} tokens and {found[2]} positions"


def _renew_locks() -> None:
    # A fork copies a lock as it is; one that another thread held would stay locked in the child for ever.
    for reader in _readers:
        reader._lock = threading.Lock()
        if reader.ahead is not None:
            reader.ahead.shards.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
