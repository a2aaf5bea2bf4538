"""Reading a cache: any sequence by number, memory-mapped or by byte ranges, its digest checked on every read."""

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
from kdcache.config.remote import RemoteConfig
from kdcache.errors import CorruptCacheError, KdcacheError, MismatchError, UnsupportedVersionError
from kdcache.format import paths
from kdcache.format.manifest import Manifest, ShardInfo
from kdcache.format.record import KEY_BYTES, SequenceRecord
from kdcache.format.schema import ShardMetadata
from kdcache.store import chain
from kdcache.store.files.location import Location, locate
from kdcache.store.index import open_index
from kdcache.store.records.arrow_file import open_arrow_file
from kdcache.store.records.batch import BatchReader, EncodedRecord
from kdcache.store.records.mapped import MappedRows, RowFormat
from kdcache.store.remote.look_ahead import LookAhead
from kdcache.store.remote.remote_read import RemoteFile
from kdcache.store.shard_checks import check_shard, open_shard

OPEN_BATCHES = 256
"""Record batches kept open per reader: views of memory maps and one byte per token, about 16 KiB each."""


_readers: weakref.WeakSet[CacheReader] = weakref.WeakSet()


def open_reader(path: str | Path, *, verify: bool = True, remote: RemoteConfig | None = None) -> CacheReader:
    """Open the newest snapshot of a cache.

    Args:
        path: the cache's directory, or its URI: `file://`, `s3://`, `gs://`, `hf://` or `memory://`.
        verify: check each row's digest on every read. What that costs is in benchmarks/results/loader.md; turn it off only to
            measure it.
        remote: how an object store is reached, and where what is read from it is kept.

    Raises:
        CacheNotFoundError: there is no cache at the path.
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
    """

    def __init__(self, root: Location, manifest: Manifest, *, verify: bool = True) -> None:
        self.root, self.manifest, self._verify = root, manifest, verify
        self._codec = _codec_of(manifest, root)
        table = open_index(root, manifest.index)
        self.num_tokens_S: NDArray[np.uint32] = table.column("num_tokens").to_numpy()
        self.num_positions_S: NDArray[np.uint32] = table.column("num_positions").to_numpy()
        self._unit_S, self._batch_S, self._row_S = (table.column(n).to_numpy() for n in ("unit", "record_batch", "row"))
        self._keys_S = _keys(table.column("key"))
        self._keys_address: int = self._keys_S.__array_interface__["data"][0]
        self._row_format: RowFormat | None = None
        if len(table) != manifest.total("num_sequences"):
            raise CorruptCacheError(
                f"{root}: the index has {len(table)} sequences, the manifest {manifest.total('num_sequences')}"
            )
        self._shards = {shard.unit: shard for shard in manifest.shards}
        self._files: dict[int, tuple[pa.RecordBatchFileReader | RemoteFile, ShardMetadata]] = {}
        self._batches: OrderedDict[tuple[int, int], BatchReader] = OrderedDict()
        self._ahead = None if isinstance(root, Path) else LookAhead(root, self._shards, table)
        self._lock = threading.Lock()
        _readers.add(self)

    @property
    def snapshot(self) -> str:
        """The manifest's digest: names exactly this content."""
        return self.manifest.digest

    @property
    def keys_S(self) -> NDArray[np.uint8]:
        """(S, 16) uint8, the key of each sequence, from the index; not to be written."""
        return self._keys_S

    def __len__(self) -> int:
        return len(self.num_tokens_S)

    def __getitem__(self, number: int) -> SequenceRecord:
        """Sequence `number` in the cache's order.

        Raises:
            IndexError: out of range. CorruptCacheError: the shard is missing or damaged; names the file, batch and row.
        """
        return self.encoded(number).decode()

    def encoded(self, number: int) -> EncodedRecord:
        """The same with its entries not decoded yet; raises as `reader[number]` does."""
        num_sequences = len(self.num_tokens_S)
        if not -num_sequences <= number < num_sequences:
            raise IndexError(f"sequence {number} of a cache of {num_sequences}")
        try:
            return self._encoded(number)
        except CorruptCacheError as error:
            if self._ahead is None:
                raise self._placed(error, number) from error
        try:
            # The bytes may have been changed on their way here: the store itself is asked once more.
            self._forget(number)
            return self._encoded(number)
        except CorruptCacheError as error:
            raise self._placed(error, number) from error

    def _placed(self, error: CorruptCacheError, number: int) -> CorruptCacheError:
        """The same, with its place and with what to do."""
        number %= len(self.num_tokens_S)
        unit, batch, _ = self.place(number)
        placed = CorruptCacheError(f"{error}; `kdcache repair {self.root}` sets what is damaged aside")
        shard = self._shards.get(unit)
        placed.path, placed.record_batch = None if shard is None else str(self.root / shard.name), batch
        placed.sequence = number
        return placed

    def _encoded(self, number: int) -> EncodedRecord:
        unit, batch, row = self.place(number)
        reader = self.record_batch(unit, batch)
        if row >= reader.num_rows:
            where = f"{self.root / self._shards[unit].name}: record batch {batch}"
            raise CorruptCacheError(f"{where} has {reader.num_rows} rows, the index names row {row}")
        record = reader.encoded(row, verify=self._verify)
        self.check_sequence(number, record, record.where)
        return record

    def place(self, number: int) -> tuple[int, int, int]:
        """Unit, record batch and row of sequence `number`, from the index."""
        return int(self._unit_S[number]), int(self._batch_S[number]), int(self._row_S[number])

    def check_sequence(self, number: int, record: SequenceRecord | EncodedRecord, where: str) -> None:
        """Raise CorruptCacheError unless a record from the place of sequence `number` is the one that the index means.

        A row's digest says that its bytes are whole, not that they are this sequence's: damage in Arrow's own framing can put
        another sound row in its place.
        """
        if isinstance(record, EncodedRecord):
            found = record.key, record.num_tokens, record.num_positions
        else:
            found = record.sequence.key, record.sequence.num_tokens, record.distributions.num_positions
        expected = self._keys_S[number].tobytes(), int(self.num_tokens_S[number]), int(self.num_positions_S[number])
        if found != expected:
            raise CorruptCacheError(f"{where}: holds {_show(found)}, the index says {_show(expected)}")

    def record_batch(self, unit: int, number: int) -> BatchReader:
        """Record batch `number` of a unit's shard, from the ones kept open or newly mapped and validated."""
        self._check_size(unit)
        with self._lock:
            if (unit, number) in self._batches:
                self._batches.move_to_end((unit, number))
                return self._batches[unit, number]
        reader = self._open_batch(unit, number)
        with self._lock:
            self._batches[unit, number] = reader
            most = OPEN_BATCHES if self._ahead is None else self._ahead.most_open
            while len(self._batches) > most:
                self._batches.popitem(last=False)
        return reader

    def mapped_rows(self, numbers: NDArray[np.int64]) -> MappedRows | None:
        """The rows of sequences of this snapshot, for a compiled loop to read: see `MappedRows`. None where that cannot be, in
        an object store or where something is wrong: `encoded` then reads them, or says what is wrong."""
        if self._ahead is not None:
            return None
        rows = self._row_S[numbers].tolist()
        try:
            found = self._record_batches(zip(self._unit_S[numbers].tolist(), self._batch_S[numbers].tolist(), strict=True))
        except KdcacheError:
            return None
        lines = [reader.line(row) for reader, row in zip(found, rows, strict=True)]
        num_positions_R = self.num_positions_S[numbers]
        # Of the rows themselves: memory is taken for so many, so no index may claim more than there are.
        if not all(lines) or [r.num_positions[row] for r, row in zip(found, rows, strict=True)] != num_positions_R.tolist():
            return None
        places_RJ = np.empty((len(rows), 4), np.int64)
        places_RJ[:, 0], places_RJ[:, 1] = lines, self._keys_address + numbers * KEY_BYTES
        places_RJ[:, 2], places_RJ[:, 3] = self.num_tokens_S[numbers], num_positions_R
        if self._row_format is None and found:
            names, selection = tuple(found[0].views), self.manifest.identity.selection
            self._row_format = RowFormat(names, self._codec, selection, found[0].fixed, self._verify)
        return None if self._row_format is None else MappedRows(self._row_format, places_RJ, found, rows)

    def _record_batches(self, places: Iterable[tuple[int, int]]) -> list[BatchReader]:
        """Several, of which most are kept open already."""
        places = list(places)
        for unit in {unit for unit, _ in places}:
            self._check_size(unit)
        found: list[tuple[tuple[int, int], BatchReader | None]] = []
        with self._lock:
            for place in places:
                found.append((place, self._batches.get(place)))
                if found[-1][1] is not None:
                    self._batches.move_to_end(place)
        return [self.record_batch(*place) if reader is None else reader for place, reader in found]

    @property
    def is_remote(self) -> bool:
        """Whether it is in an object store, so that it is of use to say what is read next."""
        return self._ahead is not None

    @property
    def block_dir(self) -> str | None:
        """The folder in which what was read is kept, where there is one."""
        return None if isinstance(self.root, Path) else self.root.config.block_dir

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Say which sequences are read next, in which order: their record batches are fetched by threads, as far as there is
        room for them, and kept until they are read. Each call replaces the one before. Returns at once, and does nothing for a
        cache on a disk."""
        if self._ahead is not None:
            self._ahead.prefetch(numbers)

    def window_bytes(self, numbers: Iterable[int]) -> int:
        """About how many bytes `prefetch(numbers)` has to keep, computed from the index; 0 for a cache on a disk."""
        return 0 if self._ahead is None else self._ahead.window_bytes(numbers)

    def largest_shards_bytes(self, num_shards: int) -> int:
        """At most how many bytes the record batches of so many shards have; 0 for a cache on a disk."""
        return (
            0 if self._ahead is None else sum(sorted((s.num_bytes for s in self._shards.values()), reverse=True)[:num_shards])
        )

    def reserve(self, num_bytes: int) -> None:
        """Raise ConfigError, with the size needed, unless so many bytes of record batches can be kept."""
        if self._ahead is not None:
            self._ahead.reserve(num_bytes)

    def num_record_batches(self, unit: int) -> int:
        """How many record batches a unit's shard has."""
        return self._file(unit)[0].num_record_batches

    def close(self) -> None:
        """Let go of the maps and threads; the reader can still be used and maps again."""
        with self._lock:
            self._batches.clear()
            self._files.clear()
        if self._ahead is not None:
            self._ahead.shards.close()

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
                f"{state['snapshot']}; another cache was put in its place"
            )
        self.__init__(state["root"], manifest, verify=state["verify"])

    def _check_size(self, unit: int) -> None:
        """Raise CorruptCacheError for a shard on a disk that is not of its size any more: a map that is read beyond its file's
        end ends the process (SIGBUS). About a microsecond. A shard that is deleted can still be read where it is mapped."""
        if self._ahead is not None or unit not in self._files:
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

    def _open_batch(self, unit: int, number: int) -> BatchReader:
        file, metadata = self._file(unit)
        where = f"{self._shards[unit].name}: record batch {number}"
        if number >= file.num_record_batches:
            raise CorruptCacheError(f"{self.root / where}: the shard has {file.num_record_batches} of them")
        try:
            batch = file.get_batch(number)
        except (pa.ArrowException, OSError, IndexError, ValueError) as error:
            raise CorruptCacheError(f"{self.root / where}: {error}") from error
        return BatchReader(batch, metadata, self._codec, str(self.root / where))

    def _forget(self, number: int) -> None:
        """Drop what is kept of a sequence's record batch and shard."""
        unit, batch, _ = self.place(number)
        with self._lock:
            self._batches.pop((unit, batch), None)
            self._files.pop(unit, None)
        if self._ahead is not None and unit in self._shards:
            self._ahead.shards.forget(unit, batch)

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
        if self._ahead is None:
            assert isinstance(self.root, Path)
            return open_shard(self.root, shard, self.manifest)
        file = self._ahead.shards.open(shard.unit)
        return file, check_shard(file.schema, shard, self.manifest, str(self.root / shard.name))

    def read_from(self, copy: Path | None, shard: ShardInfo) -> None:
        """From now on read a shard from a local copy of it; None: from where it is again."""
        opened = None if copy is None else open_arrow_file(copy)
        with self._lock:
            self._files.pop(shard.unit, None)
            for place in [place for place in self._batches if place[0] == shard.unit]:
                del self._batches[place]
            if opened is not None:
                metadata = check_shard(opened.schema, shard, self.manifest, str(self.root / shard.name))
                self._files[shard.unit] = opened, metadata


def _codec_of(manifest: Manifest, root: Location) -> Codec:
    try:
        identity = manifest.identity
        return get_codec(identity.codec.codec_id, identity.codec.params, identity.selection)
    except UnsupportedVersionError as error:
        raise UnsupportedVersionError(f"{root / paths.manifest_name(manifest.number)}: {error}") from error


def _keys(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """(S, 16) uint8, a view where the index is one record batch."""
    keys = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies even a single one
    first = keys.offset * KEY_BYTES
    return np.frombuffer(keys.buffers()[1] or b"", np.uint8)[first : first + len(keys) * KEY_BYTES].reshape(-1, KEY_BYTES)


def _show(row: tuple[bytes, int, int]) -> str:
    return f"key {row[0].hex()} with {row[1]} tokens and {row[2]} positions"


def _renew_locks() -> None:
    # A fork copies a lock as it is; one that another thread held would stay locked in the child for ever.
    for reader in _readers:
        reader._lock = threading.Lock()
        if reader._ahead is not None:
            reader._ahead.shards.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
