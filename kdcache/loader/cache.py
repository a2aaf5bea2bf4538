"""An open cache: any sequence by its index, several at once, or a selection of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from operator import index as as_index
from os import PathLike, fspath
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdcache.codec.features.constants import read_constants
from kdcache.config.remote import RemoteConfig
from kdcache.errors import ConfigError
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.manifest import Manifest
from kdcache.format.record import SequenceRecord
from kdcache.loader.base import Reader
from kdcache.loader.batches.features import AskedFeature, find_features, gathered_pooled
from kdcache.store.reader import open_reader

Columns = Mapping[str, NDArray[np.generic]]


def open_cache(uri: str | PathLike[str], *, verify: bool = True, remote: RemoteConfig | None = None) -> Cache:
    """Open the newest snapshot of a cache: `kdcache.open`.

    Args:
        uri: the cache's directory or address: `file://`, `s3://`, `gs://`, `hf://` or `memory://`.
        verify: check each sequence's digest on every read. benchmarks/results/loader.md says what that costs; turn it off
            only to measure it.
        remote: how an object store is reached, and where what is read from it is kept.

    Raises:
        CacheNotFoundError: nothing there is a cache. StorageError: the store is out of reach.
        CorruptCacheError, UnsupportedVersionError: the manifest or the index cannot be read.
    """
    return cache_of(open_reader(fspath(uri), verify=verify, remote=remote))


def cache_of(reader: Reader, indices_S: NDArray[np.int64] | None = None) -> Cache:
    """The cache that a reader reads, or a selection of its sequences.

    Args:
        reader: of the snapshot.
        indices_S: (S,) int64, the sequences of the snapshot that are selected, in this order; None for all.
    """
    cache = object.__new__(Cache)
    cache.reader, cache._indices_S = reader, None if indices_S is None else _read_only(indices_S)
    # Of the whole snapshot these are views of the mapped index; of a selection its own, taken once.
    cache._num_tokens_S, cache._num_positions_S = (
        values_S if indices_S is None else values_S[indices_S] for values_S in (reader.num_tokens_S, reader.num_positions_S)
    )
    return cache


class Cache:
    """A snapshot of a cache, or a selection of its sequences: `len(cache)`, `cache[i]` a SequenceRecord.

    Made by `kdcache.open`, `select` and `filter`. Safe to use from several threads.
    Can be pickled, also into a forked or spawned process: it opens the same snapshot there.
    Selections share the open files: closing one closes all, and reading opens them again.
    """

    reader: Reader
    _indices_S: NDArray[np.int64] | None
    _num_tokens_S: NDArray[np.uint32]
    _num_positions_S: NDArray[np.uint32]

    def __init__(self) -> None:
        raise TypeError("a Cache is made by kdcache.open")

    def __reduce__(self) -> tuple[Callable[..., Cache], tuple[Reader, NDArray[np.int64] | None]]:
        return cache_of, (self.reader, self._indices_S)

    @property
    def manifest(self) -> Manifest:
        """What describes the whole snapshot."""
        return self.reader.manifest

    @property
    def snapshot(self) -> str:
        """Names exactly this content: the manifest's digest, followed, for a selection, by that of its indices."""
        return self._snapshot

    @cached_property
    def _snapshot(self) -> str:
        # Kept: a loader's state names it, and there is a state with every batch.
        if self._indices_S is None:
            return self.reader.snapshot
        return f"{self.reader.snapshot}/{hashlib.sha256(self._indices_S.astype('<i8').tobytes()).hexdigest()}"

    @property
    def num_tokens_S(self) -> NDArray[np.uint32]:
        """(S,) tokens of each sequence, from the index: no record is touched."""
        return self._num_tokens_S

    @property
    def num_positions_S(self) -> NDArray[np.uint32]:
        """(S,) supervised positions of each sequence."""
        return self._num_positions_S

    @property
    def groups_S(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
        """(S, 16) the group of answers that each sequence belongs to, zeros for none, and (S,) codes of PREFERENCES; None in a
        cache without groups."""
        found = self.reader.groups_S
        if found is None or self._indices_S is None:
            return found
        return found[0][self._indices_S], found[1][self._indices_S]

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """int64, sequences of each shard in their order here; of a selection, of each stretch that lies in one shard."""
        sizes = np.array([shard.num_sequences for shard in self.manifest.shards], np.int64)
        if self._indices_S is None or not len(self._indices_S):
            return sizes if self._indices_S is None else np.zeros(0, np.int64)
        shards_S = np.searchsorted(np.cumsum(sizes), self._indices_S, "right")
        starts = np.append(0, np.flatnonzero(np.diff(shards_S)) + 1)
        return np.diff(np.append(starts, len(shards_S)))

    def __len__(self) -> int:
        return len(self._num_tokens_S)

    def __getitem__(self, index: int) -> SequenceRecord:
        """Read a sequence; negative indices count from the end.

        Raises:
            IndexError: out of range. CorruptCacheError: its shard is missing or damaged; names file, record batch and sequence.
        """
        return self.reader[self._in_snapshot(index)]

    def __getitems__(self, indices: Iterable[int]) -> list[SequenceRecord]:
        """Read several at once, as torch's fetchers ask for them."""
        return self.get(indices)

    def get(self, indices: Iterable[int]) -> list[SequenceRecord]:
        """Read several sequences in the order in which they are stored, and return them in the order asked for.

        Raises:
            IndexError, CorruptCacheError: as `cache[i]`.
        """
        wanted = [self._in_snapshot(index) for index in indices]
        records = {index: self.reader[index] for index in sorted(set(wanted))}
        return [records[index] for index in wanted]

    def snapshot_indices(self, indices: ArrayLike) -> NDArray[np.int64]:
        """The indices in the whole snapshot of sequences here; these count from 0 and are in range."""
        asked = np.asarray(indices, np.int64)
        return asked if self._indices_S is None else self._indices_S[asked]

    def prefetch(self, indices: ArrayLike) -> None:
        """Say which sequences are read next, in which order: an object store's are then fetched by threads.

        Each call replaces the one before. Returns at once; does nothing for a cache on a disk.
        """
        if self.reader.ahead is not None:
            self.reader.ahead.prefetch(self.snapshot_indices(indices))

    def select(self, indices: ArrayLike) -> Cache:
        """The cache of these sequences alone, in this order; an index may come twice.

        Args:
            indices: integers in [-S, S), or S flags.

        Raises:
            ConfigError: out of range, or neither integers nor S flags.
        """
        asked = np.asarray(indices)
        if asked.dtype == np.bool_ and asked.shape == (len(self),):
            asked = np.flatnonzero(asked)
        if not asked.size:
            asked = asked.astype(np.int64)
        if asked.ndim != 1 or not np.issubdtype(asked.dtype, np.integer):
            raise ConfigError(f"select got {asked.dtype} of shape {asked.shape}; expected integers, or {len(self)} flags")
        outside = asked[(asked < -len(self)) | (asked >= len(self))]
        if len(outside):
            raise ConfigError(f"select got {outside[0]}, but the cache has {len(self)} sequences")
        return cache_of(self.reader, self.snapshot_indices(asked.astype(np.int64) % max(1, len(self))))

    def filter(self, keep: Callable[[Columns], ArrayLike]) -> Cache:
        """The cache of the sequences that a function of the index's columns keeps.

        Args:
            keep: is called once with `columns()` and returns S flags, as in `lambda c: c["num_tokens"] <= 512`.

        Raises:
            ConfigError: the function returns something else.
        """
        flags = np.asarray(keep(self.columns()))
        if flags.dtype != np.bool_ or flags.shape != (len(self),):
            raise ConfigError(f"filter got {flags.dtype} of shape {flags.shape} from its function; expected {len(self)} flags")
        return self.select(flags)

    def columns(self) -> Columns:
        """What is known of each sequence, (S,) each: `num_tokens`, `num_positions`, `unit` (of the capture's plan) and `index`
        (in the snapshot)."""
        indices_S = np.arange(len(self.reader)) if self._indices_S is None else self._indices_S
        ends = np.cumsum([shard.num_sequences for shard in self.manifest.shards])
        units = np.array([shard.unit for shard in self.manifest.shards], np.int64)
        unit_S = units[np.searchsorted(ends, indices_S, "right")]
        return {"num_tokens": self.num_tokens_S, "num_positions": self.num_positions_S, "unit": unit_S, "index": indices_S}

    def sidecar(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays of one of the cache's sidecars (`manifest.sidecars` lists them), read and checked on every call.

        bfloat16 comes as its bits, uint16; `kdcache.loader.torch_batches.sidecar_tensors` gives tensors.

        Raises:
            ConfigError: the cache has none of this name. CorruptCacheError: it is missing or damaged.
        """
        return self.reader.sidecar(name)

    def pooled_features(self, name: str) -> FeatureVectors[NDArray[Any]]:
        """A pooled feature of all sequences, as it is stored, in the order of the cache: slots_F counts from 0.

        It takes the memory of the vectors alone: a million of 4096 float16 numbers are 8 GB.

        Raises:
            ConfigError: the cache has no such feature, or it is not pooled. CorruptCacheError: as `cache[i]`.
        """
        (feature,) = find_features([self.manifest], [name])
        if feature.pooling == "none":
            raise ConfigError(f"feature {name!r} has a vector for each position; only a pooled one has one for each sequence")
        asked = AskedFeature(feature, read_constants(feature, self.sidecar))
        return gathered_pooled(asked, len(self), lambda index: self.reader.encoded(self._in_snapshot(index)))

    def sources(self) -> list[str]:
        """Where each sequence came from, in the cache's words; reads each sequence."""
        return [self.reader.encoded(self._in_snapshot(index)).sequence.source for index in range(len(self))]

    def close(self) -> None:
        """Release open files; the cache can still be used, and opens them again."""
        self.reader.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _in_snapshot(self, index: int) -> int:
        """The index in the whole snapshot; raises IndexError out of range."""
        found, num_sequences = as_index(index), len(self)
        if not -num_sequences <= found < num_sequences:
            raise IndexError(f"sequence {found} of a cache of {num_sequences}")
        return int(self.snapshot_indices(found % num_sequences))


def _read_only(indices_S: NDArray[np.int64]) -> NDArray[np.int64]:
    """A view: `columns` gives the indices out, and a selection is what its snapshot names."""
    view = indices_S.view()
    view.flags.writeable = False
    return view
