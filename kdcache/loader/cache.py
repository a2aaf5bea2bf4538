"""A cache as a map-style data set: any sequence by number, several at once, a selection of them.

Shape letters: S sequences (of the cache or the selection), C shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from operator import index
from os import PathLike, fspath
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdcache.config.remote import RemoteConfig
from kdcache.errors import ConfigError
from kdcache.format.manifest import Manifest
from kdcache.format.record import SequenceRecord
from kdcache.store.reader import CacheReader, open_reader
from kdcache.store.records.batch import EncodedRecord
from kdcache.store.records.mapped import MappedRows

Columns = Mapping[str, NDArray[np.generic]]


def open_cache(uri: str | PathLike[str], *, verify: bool = True, remote: RemoteConfig | None = None) -> Cache:
    """Open the newest snapshot of a cache: `kdcache.open`.

    Args:
        uri: the cache's directory or address: `file://`, `s3://`, `gs://`, `hf://` or `memory://`.
        verify: check each row's digest on every read. What that costs is in benchmarks/results/loader.md; turn it off only to
            measure it.
        remote: how an object store is reached, and where what is read from it is kept.

    Raises:
        CacheNotFoundError: there is no cache there. StorageError: the store is out of reach.
        CorruptCacheError, UnsupportedVersionError: the manifest or the index cannot be read.
    """
    return Cache(open_reader(fspath(uri), verify=verify, remote=remote))


class Cache:
    """A snapshot of a cache, or a selection of its sequences: `len(cache)`, `cache[i]` a SequenceRecord.

    Safe to use from several threads; can be pickled (it opens the same snapshot again, in a forked or spawned process too).
    Selections share the reader: closing one closes all, and reading opens it again.

    Args:
        reader: of the snapshot.
        numbers_S: (S,) int64, the sequences of the snapshot that are selected, in their order here; None for all.
    """

    def __init__(self, reader: CacheReader, numbers_S: NDArray[np.int64] | None = None) -> None:
        self.reader, self._numbers_S = reader, None if numbers_S is None else _read_only(numbers_S)
        # Of the whole snapshot these are views of the mapped index; of a selection its own, taken once.
        self._num_tokens_S = self._selected(reader.num_tokens_S)
        self._num_positions_S = self._selected(reader.num_positions_S)

    def __reduce__(self) -> tuple[type[Cache], tuple[CacheReader, NDArray[np.int64] | None]]:
        return Cache, (self.reader, self._numbers_S)

    @property
    def manifest(self) -> Manifest:
        """What describes the snapshot, the whole of it."""
        return self.reader.manifest

    @property
    def snapshot(self) -> str:
        """Names exactly this content: the manifest's digest, and behind it, for a selection, that of its numbers."""
        return self._snapshot

    @cached_property
    def _snapshot(self) -> str:
        # Kept: a loader's state names it, and there is one behind every batch.
        if self._numbers_S is None:
            return self.reader.snapshot
        return f"{self.reader.snapshot}/{hashlib.sha256(self._numbers_S.astype('<i8').tobytes()).hexdigest()}"

    @property
    def num_tokens_S(self) -> NDArray[np.uint32]:
        """(S,) tokens of each sequence, from the index: no record is touched."""
        return self._num_tokens_S

    @property
    def num_positions_S(self) -> NDArray[np.uint32]:
        """(S,) supervised positions of each sequence."""
        return self._num_positions_S

    @property
    def shard_sizes_C(self) -> NDArray[np.int64]:
        """(C,) sequences of each shard, in their order here; of a selection, of each stretch that lies in one shard."""
        sizes_C = np.array([shard.num_sequences for shard in self.manifest.shards], np.int64)
        if self._numbers_S is None or not len(self._numbers_S):
            return sizes_C if self._numbers_S is None else np.zeros(0, np.int64)
        shards_S = np.searchsorted(np.cumsum(sizes_C), self._numbers_S, "right")
        starts = np.append(0, np.flatnonzero(np.diff(shards_S)) + 1)
        return np.diff(np.append(starts, len(shards_S)))

    def __len__(self) -> int:
        return len(self.reader) if self._numbers_S is None else len(self._numbers_S)

    def __getitem__(self, number: int) -> SequenceRecord:
        """Sequence `number`; negative numbers count from the end.

        Raises:
            IndexError: out of range. CorruptCacheError: its shard is missing or damaged; names the file, batch and row.
        """
        return self.reader[self.number(number)]

    def __getitems__(self, numbers: Iterable[int]) -> list[SequenceRecord]:
        """Several at once, as torch's fetchers ask for them."""
        return self.get(numbers)

    def get(self, numbers: Iterable[int]) -> list[SequenceRecord]:
        """Several sequences, in the order asked for; read in the order in which they are stored. Raises as `cache[i]` does."""
        wanted = [self.number(number) for number in numbers]
        records = {number: self.reader[number] for number in sorted(set(wanted))}
        return [records[number] for number in wanted]

    def encoded(self, number: int) -> EncodedRecord:
        """A sequence whose entries are not decoded yet; raises as `cache[number]` does."""
        return self.reader.encoded(self.number(number))

    def mapped_rows(self, numbers: NDArray[np.int64]) -> MappedRows | None:
        """Sequences from 0 on for a compiled loop to read; see `CacheReader.mapped_rows`."""
        return self.reader.mapped_rows(self._in_snapshot(numbers))

    def number(self, number: int) -> int:
        """The number in the whole snapshot of sequence `number` here; raises IndexError out of range."""
        place, num_sequences = index(number), len(self)
        if not -num_sequences <= place < num_sequences:
            raise IndexError(f"sequence {place} of {num_sequences}")
        place %= num_sequences
        return place if self._numbers_S is None else int(self._numbers_S[place])

    @property
    def is_remote(self) -> bool:
        """Whether it is in an object store, so that it is of use to say what is read next."""
        return self.reader.is_remote

    @property
    def block_dir(self) -> str | None:
        """The folder in which what was read is kept, where there is one."""
        return self.reader.block_dir

    def prefetch(self, numbers: ArrayLike) -> None:
        """Say which sequences are read next, in which order; see `CacheReader.prefetch`."""
        self.reader.prefetch(self._in_snapshot(numbers))

    def window_bytes(self, numbers: ArrayLike) -> int:
        """About how many bytes `prefetch(numbers)` has to keep."""
        return self.reader.window_bytes(self._in_snapshot(numbers))

    def largest_shards_bytes(self, num_shards: int) -> int:
        """At most how many bytes the record batches of so many shards have."""
        return self.reader.largest_shards_bytes(num_shards)

    def reserve(self, num_bytes: int) -> None:
        """Raise ConfigError, with the size needed, unless so many bytes of record batches can be kept."""
        self.reader.reserve(num_bytes)

    def _in_snapshot(self, numbers: ArrayLike) -> NDArray[np.int64]:
        places = np.asarray(numbers, np.int64)
        return places if self._numbers_S is None else self._numbers_S[places]

    def select(self, numbers: ArrayLike) -> Cache:
        """The cache of these sequences alone, in this order; some may come twice.

        Args:
            numbers: integers in [-S, S), or S flags.

        Raises:
            ConfigError: out of range, or neither integers nor S flags.
        """
        asked = np.asarray(numbers)
        if asked.dtype == np.bool_ and asked.shape == (len(self),):
            asked = np.flatnonzero(asked)
        if not asked.size:
            asked = asked.astype(np.int64)
        if asked.ndim != 1 or not np.issubdtype(asked.dtype, np.integer):
            raise ConfigError(f"select got {asked.dtype} of shape {asked.shape}; expected integers, or {len(self)} flags")
        outside = asked[(asked < -len(self)) | (asked >= len(self))]
        if len(outside):
            raise ConfigError(f"select got {outside[0]}, but the cache has {len(self)} sequences")
        places = asked.astype(np.int64) % max(1, len(self))
        return Cache(self.reader, places if self._numbers_S is None else self._numbers_S[places])

    def filter(self, keep: Callable[[Columns], ArrayLike]) -> Cache:
        """The cache of the sequences that a function of the index's columns keeps.

        Args:
            keep: is called once with `columns()` and gives S flags, as in `lambda c: c["num_tokens"] <= 512`.
        """
        flags = np.asarray(keep(self.columns()))
        if flags.dtype != np.bool_ or flags.shape != (len(self),):
            raise ConfigError(f"filter got {flags.dtype} of shape {flags.shape} from its function; expected {len(self)} flags")
        return self.select(flags)

    def columns(self) -> Columns:
        """The index: `num_tokens`, `num_positions`, `unit` (of the capture's plan) and `number` (in the snapshot), (S,)
        each."""
        numbers_S = np.arange(len(self.reader)) if self._numbers_S is None else self._numbers_S
        ends_C = np.cumsum([shard.num_sequences for shard in self.manifest.shards])
        units_C = np.array([shard.unit for shard in self.manifest.shards], np.int64)
        unit_S = units_C[np.searchsorted(ends_C, numbers_S, "right")]
        return {"num_tokens": self.num_tokens_S, "num_positions": self.num_positions_S, "unit": unit_S, "number": numbers_S}

    def sources(self) -> list[str]:
        """Where each sequence came from, in the cache's words; reads each sequence's record."""
        return [self.encoded(number).sequence.source for number in range(len(self))]

    def close(self) -> None:
        """Let go of open files; the cache can still be used and opens them again."""
        self.reader.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _selected(self, values_S: NDArray[np.uint32]) -> NDArray[np.uint32]:
        return values_S if self._numbers_S is None else values_S[self._numbers_S]


def _read_only(numbers_S: NDArray[np.int64]) -> NDArray[np.int64]:
    """A view: `columns` gives the numbers out, and a selection is what its snapshot names."""
    view = numbers_S.view()
    view.flags.writeable = False
    return view
