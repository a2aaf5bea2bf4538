"""The caches that a loader reads, as one: their sequences are numbered together, those of each behind those of the one before.

Shape letters: S sequences of a cache, C shards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from os import PathLike, fspath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec import get_codec
from kdcache.errors import ConfigError, MismatchError
from kdcache.format.manifest import Manifest
from kdcache.loader.base import Reader
from kdcache.loader.batches.assemble import EntryColumns, Record
from kdcache.loader.batches.features import find_features
from kdcache.loader.cache import Cache, open_cache
from kdcache.loader.order.mix import CacheTable

CacheLike = str | PathLike[str] | Reader
"""A cache's address, or one that is open: `kdcache.open(...)`, a selection of it, a CacheReader."""


class CacheSet:
    """One cache or several. Can be pickled if the readers can.

    Args:
        caches: addresses are opened here, and closed by `close`; open ones stay the caller's.
        features: names of those that batches hold.
        logprob_dtype, with_roles: of the batches; see LoaderConfig.

    Raises:
        ConfigError: none, or one without such a feature or with logprobs that are no float16. MismatchError: several that do
            not fit together. Whatever opening raises.
    """

    def __init__(
        self,
        caches: CacheLike | Sequence[CacheLike],
        features: Sequence[str] = (),
        logprob_dtype: str = "float32",
        *,
        with_roles: bool = False,
    ) -> None:
        self._own: list[Cache] = []
        self.with_roles = with_roles
        several: Sequence[Any] = caches if isinstance(caches, (list, tuple)) else [caches]
        if not several:
            raise ConfigError("no cache was given; give an address, an open cache, or a list of them")
        try:
            self.readers = [self._opened(cache) for cache in several]
            check_together([reader.manifest for reader in self.readers])
            self.features = find_features([reader.manifest for reader in self.readers], features)
            self.logprob_dtype = np.dtype(logprob_dtype)
            check_logprobs([reader.manifest for reader in self.readers], self.logprob_dtype)
        except BaseException:
            self.close()
            raise
        self._bases = [0, *accumulate(len(reader) for reader in self.readers)]
        identities = [reader.manifest.identity for reader in self.readers]
        vocab_size = max(identity.teacher.vocab_size for identity in identities)
        self.columns = EntryColumns.of([identity.selection for identity in identities], vocab_size)

    def __len__(self) -> int:
        return self._bases[-1]

    @property
    def snapshots(self) -> list[str]:
        """What each of them holds, by name."""
        return [reader.snapshot for reader in self.readers]

    def tables(self) -> list[CacheTable]:
        """What order and packing know of each."""
        return [CacheTable(reader.num_tokens_S, _shard_sizes(reader)) for reader in self.readers]

    def locate(self, number: int) -> tuple[Reader, int]:
        """The cache of a sequence, and its number there."""
        cache = bisect_right(self._bases, number) - 1
        return self.readers[cache], number - self._bases[cache]

    def by_cache(self, numbers_R: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64] | slice, Reader, NDArray[np.int64]]]:
        """Of each cache that has some of these sequences: which of them, the cache, and their numbers there."""
        if len(self.readers) == 1:
            yield slice(None), self.readers[0], numbers_R
            return
        cache_R = np.searchsorted(self._bases, numbers_R, "right") - 1
        for cache in np.unique(cache_R).tolist():
            where = np.flatnonzero(cache_R == cache)
            yield where, self.readers[cache], numbers_R[where] - self._bases[cache]

    def record(self, number: int) -> Record:
        """A sequence's record, its entries not decoded yet where the cache can give it so."""
        reader, place = self.locate(number)
        encoded = getattr(reader, "encoded", None)
        return reader[place] if encoded is None else encoded(place)

    def close(self) -> None:
        """Close what was opened here."""
        for cache in self._own:
            cache.close()

    def _opened(self, cache: CacheLike) -> Reader:
        if isinstance(cache, (str, PathLike)):
            self._own.append(open_cache(fspath(cache)))
            return self._own[-1]
        return cache


def check_together(manifests: Sequence[Manifest]) -> None:
    """Raise MismatchError unless caches can share a batch: equal token ids, and entries that mean the same."""
    first = manifests[0].identity
    for number, manifest in enumerate(manifests[1:], 1):
        other = manifest.identity
        pairs = first.token_pairs(other) | {
            "selection": (first.selection.kind, other.selection.kind),
            "further temperatures": (first.selection.temperatures, other.selection.temperatures),
            "entropy": (first.selection.entropy, other.selection.entropy),
        }
        differences = [f"{name} {left!r} and {right!r}" for name, (left, right) in pairs.items() if left != right]
        if differences:
            raise MismatchError(
                f"cache 0 ({first.tokenizer.name}) and cache {number} ({other.tokenizer.name}) cannot be mixed: "
                f"{'; '.join(differences)}; a batch needs one tokenizer, one vocabulary and one kind of selection"
            )


def check_logprobs(manifests: Sequence[Manifest], dtype: np.dtype[Any]) -> None:
    """Raise ConfigError unless the caches' logprobs are of this dtype, float32 holding all of them."""
    for number, manifest in enumerate(manifests):
        codec, selection = manifest.identity.codec, manifest.identity.selection
        if dtype == np.float16 and not get_codec(codec.codec_id, codec.params, selection).stores_half_logprobs:
            raise ConfigError(
                f"logprob_dtype is 'float16', but cache {number} (codec {codec.codec_id!r} {codec.params}, selection "
                f"{selection.kind!r}) has logprobs that are no float16; use 'float32', or a cache of exact entries with codec "
                "'packed', or 'archive' of 16 bits"
            )


def _shard_sizes(reader: Reader) -> NDArray[np.int64]:
    """(C,) as `Cache.shard_sizes_C`; a reader whose manifest names no shards is one."""
    if isinstance(reader, Cache):
        return reader.shard_sizes_C
    sizes_C = np.array([shard.num_sequences for shard in reader.manifest.shards], np.int64)
    return sizes_C if int(sizes_C.sum()) == len(reader) else np.array([len(reader)], np.int64)
