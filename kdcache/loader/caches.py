"""The caches that a loader reads, as one: their sequences are indexed together, one cache after another."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from os import PathLike, fspath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec import get_codec
from kdcache.codec.features.constants import read_constants
from kdcache.config.loader import LoaderConfig
from kdcache.errors import ConfigError, CorruptCacheError, MismatchError
from kdcache.format.manifest import Manifest
from kdcache.loader.base import Reader
from kdcache.loader.batches.assemble import EntryColumns, Record
from kdcache.loader.batches.features import AskedFeature, find_features
from kdcache.loader.cache import Cache, cache_of, open_cache
from kdcache.loader.order.mix import CacheTable
from kdcache.loader.order.pairs import Bundles, find_bundles, joined
from kdcache.store.records.batch import EncodedRecord

CacheLike = str | PathLike[str] | Cache
"""A cache's address, or an open cache: `kdcache.open(...)` or a selection of it."""


class CacheSet:
    """One cache or several. Can be pickled if the readers can.

    Args:
        caches: addresses are opened here, and closed by `close`; open caches stay the caller's. A Reader of another kind does
            as well.
        config: what batches hold; see LoaderConfig.

    Raises:
        ConfigError: no cache is given, or one lacks such a feature or has logprobs that are not float16, or no groups where
            pairs are asked for. MismatchError: several that do not fit together. Whatever opening raises.
    """

    def __init__(
        self,
        caches: CacheLike | Reader | Sequence[CacheLike | Reader],
        config: LoaderConfig = LoaderConfig(),  # noqa: B008 - frozen
    ) -> None:
        self._own: list[Cache] = []
        self.with_roles, self.with_domains, features = config.with_roles, config.with_domains, config.features
        several: Sequence[Any] = caches if isinstance(caches, (list, tuple)) else [caches]
        if not several:
            raise ConfigError("no cache was given; give an address, an open cache, or a list of them")
        try:
            self.caches = [self._opened(cache) for cache in several]
            manifests = [cache.manifest for cache in self.caches]
            check_together(manifests)
            self.features = self._asked(manifests, features) if features else ()
            self.logprob_dtype = np.dtype(config.logprob_dtype)
            check_logprobs(manifests, self.logprob_dtype)
            self.bundles = [bundles_of(cache, index) for index, cache in enumerate(self.caches)] if config.pairs else None
        except BaseException:
            self.close()
            raise
        self._bases = [0, *accumulate(map(len, self.caches))]
        identities = [manifest.identity for manifest in manifests]
        vocab_size = max(identity.teacher.vocab_size for identity in identities)
        columns = EntryColumns.of([identity.selection for identity in identities], vocab_size)
        self.columns = replace(columns, has_target_logprobs=config.with_target_logprobs)
        # Of each chosen answer, the rejected one that goes with it.
        self.partners_S = None
        if self.bundles is not None:
            self.partners_S = joined(self.bundles, list(map(len, self.caches))).partners_S(len(self))

    def __len__(self) -> int:
        return self._bases[-1]

    def ask_for(self, config: LoaderConfig) -> None:
        """Let batches hold other features, roles, domains or logprobs of target ids; raises ConfigError as the constructor."""
        manifests = [cache.manifest for cache in self.caches]
        self.features = self._asked(manifests, config.features) if config.features else ()
        self.with_roles, self.with_domains = config.with_roles, config.with_domains
        self.columns = replace(self.columns, has_target_logprobs=config.with_target_logprobs)

    @property
    def snapshots(self) -> list[str]:
        """The snapshot of each."""
        return [cache.snapshot for cache in self.caches]

    def tables(self) -> list[CacheTable]:
        """What order and packing know of each."""
        tables = [CacheTable(cache.num_tokens_S, _shard_sizes(cache)) for cache in self.caches]
        if self.bundles is None:
            return tables
        return [table.of_bundles(bundles) for table, bundles in zip(tables, self.bundles, strict=True)]

    def by_reader(self, indices: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64] | slice, Reader, NDArray[np.int64]]]:
        """For each cache that has some of these sequences: which of them, its reader, and their indices for that."""
        if len(self.caches) == 1:
            yield slice(None), self.caches[0].reader, self.caches[0].snapshot_indices(indices)
            return
        which_cache = np.searchsorted(self._bases, indices, "right") - 1
        for index in np.unique(which_cache).tolist():
            which, cache = np.flatnonzero(which_cache == index), self.caches[index]
            yield which, cache.reader, cache.snapshot_indices(indices[which] - self._bases[index])

    def record(self, index: int) -> Record:
        """Read a sequence, without decoding its entries where its reader can do that.

        Raises:
            CorruptCacheError: its record is damaged, or not as long as the index says.
        """
        which = bisect_right(self._bases, index) - 1
        cache, own = self.caches[which], index - self._bases[which]
        record = cache.reader.encoded(int(cache.snapshot_indices(own)))
        if not isinstance(record, EncodedRecord):  # a CacheReader has compared it with its index
            found, expected = record.sequence.num_tokens, cache.num_tokens_S[own]
            if found != expected:
                raise CorruptCacheError(f"sequence {own}: its record holds {found} tokens, the index says {expected}")
        return record

    def close(self) -> None:
        """Close what was opened here."""
        for cache in self._own:
            cache.close()

    def _asked(self, manifests: Sequence[Manifest], names: Sequence[str]) -> tuple[AskedFeature, ...]:
        found = find_features(manifests, names)  # alike in all caches, so that the first one's constants are those of all
        sidecar = self.caches[0].sidecar
        return tuple(AskedFeature(feature, read_constants(feature, sidecar)) for feature in found)

    def _opened(self, cache: CacheLike | Reader) -> Cache:
        if isinstance(cache, (str, PathLike)):
            self._own.append(open_cache(fspath(cache)))
            return self._own[-1]
        return cache if isinstance(cache, Cache) else cache_of(cache)


def bundles_of(cache: Cache, index: int) -> Bundles:
    """The pairs of a cache's answers, and the sequences without a partner.

    Raises:
        ConfigError: the capture was not told which answers belong together, or none of them makes a pair.
    """
    if cache.groups_S is None:
        raise ConfigError(
            f"loader.pairs: cache {index} does not say which answers belong to one prompt; capture it again with "
            "input.group_field and input.preference_field"
        )
    bundles = find_bundles(*cache.groups_S)
    if not bundles.num_pairs:
        raise ConfigError(
            f"loader.pairs: of the {len(cache)} sequences of cache {index} no two are the chosen and the rejected answer of "
            "one group; look at input.group_field and input.preference_field of its capture"
        )
    return bundles


def check_together(manifests: Sequence[Manifest]) -> None:
    """Raise MismatchError unless caches can share a batch: equal token ids, and entries that mean the same."""
    first = manifests[0].identity
    for index, manifest in enumerate(manifests[1:], 1):
        other = manifest.identity
        pairs = first.token_pairs(other) | {
            "selection": (first.selection.kind, other.selection.kind),
            "further temperatures": (first.selection.temperatures, other.selection.temperatures),
            "entropy": (first.selection.entropy, other.selection.entropy),
        }
        differences = [f"{name} {left!r} and {right!r}" for name, (left, right) in pairs.items() if left != right]
        if differences:
            raise MismatchError(
                f"cache 0 ({first.tokenizer.name}) and cache {index} ({other.tokenizer.name}) cannot be mixed: "
                f"{'; '.join(differences)}; a batch needs one tokenizer, one vocabulary and one kind of selection"
            )


def check_logprobs(manifests: Sequence[Manifest], dtype: np.dtype[Any]) -> None:
    """Raise ConfigError unless the caches' logprobs are of this dtype, float32 holding all of them."""
    for index, manifest in enumerate(manifests):
        codec, selection = manifest.identity.codec, manifest.identity.selection
        if dtype == np.float16 and not get_codec(codec.codec_id, codec.params, selection).stores_half_logprobs:
            raise ConfigError(
                f"logprob_dtype is 'float16', but cache {index} (codec {codec.codec_id!r} {codec.params}, selection "
                f"{selection.kind!r}) has logprobs that are not float16; use 'float32', or a cache of exact entries with codec "
                "'packed', or 'archive' of 16 bits"
            )


def _shard_sizes(cache: Cache) -> NDArray[np.int64]:
    """As `Cache.shard_sizes`; a cache whose manifest names no shards is one."""
    sizes = cache.shard_sizes
    return sizes if int(sizes.sum()) == len(cache) else np.array([len(cache)], np.int64)
