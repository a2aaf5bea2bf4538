"""Hidden states in a batch: which of the caches' features it holds, and how they get there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.features import decode_features
from kdcache.errors import ConfigError, CorruptCacheError, KdcacheError
from kdcache.format.manifest import FeatureInfo, Manifest
from kdcache.format.record import SequenceRecord
from kdcache.store.records.batch import EncodedRecord


def find_features(manifests: Sequence[Manifest], names: Sequence[str]) -> tuple[FeatureInfo, ...]:
    """What the caches say of the features with these names.

    Raises:
        ConfigError: a cache has none of that name, or one of another size or pooling than the first.
    """
    found = [_find(manifest, index, names) for index, manifest in enumerate(manifests)]
    for index, features in enumerate(found):
        for first, other in zip(found[0], features, strict=True):
            if (first.size, first.pooling) != (other.size, other.pooling):
                raise ConfigError(
                    f"loader.features: {first.name!r} has {first.size} numbers and pooling {first.pooling!r} in cache 0, but "
                    f"{other.size} and {other.pooling!r} in cache {index}; they cannot share a batch"
                )
    return found[0]


def batch_features(
    records: Sequence[SequenceRecord | EncodedRecord],
    keeps: Sequence[NDArray[np.bool_] | None],
    features: Sequence[FeatureInfo],
) -> dict[str, NDArray[np.float32]] | None:
    """The batch's features by name: (P, H) float32, or (G, H) where they are pooled. None where none is asked for.

    Args:
        records: the batch's sequences, in its order.
        keeps: of each, which of its stored positions the batch holds; None for all.
        features: that are asked for.

    Raises:
        CorruptCacheError: a record does not have them.
    """
    if not features:
        return None
    decoded = [_features_of(record, features) for record in records]
    made = {}
    for feature in features:
        parts = [values[feature.name] for values in decoded]
        if feature.pooling == "none":
            parts = [vectors if keep is None else vectors[keep] for vectors, keep in zip(parts, keeps, strict=True)]
        made[feature.name] = np.concatenate([np.empty((0, feature.size), np.float32), *parts])
    return made


def _find(manifest: Manifest, index: int, names: Sequence[str]) -> tuple[FeatureInfo, ...]:
    there = {feature.name: feature for feature in manifest.identity.features}
    for name in names:
        if name not in there:
            has = ", ".join(there) or "none"
            raise ConfigError(f"loader.features: cache {index} has no feature {name!r}; it has {has}")
    return tuple(there[name] for name in names)


def _features_of(record: SequenceRecord | EncodedRecord, features: Sequence[FeatureInfo]) -> dict[str, NDArray[np.float32]]:
    if isinstance(record, EncodedRecord):
        # As its own cache stores them: another cache of a mix may have another dtype.
        own = [feature for feature in record.features if feature.name in {asked.name for asked in features}]
        try:
            return decode_features(record.columns, own, record.num_positions)
        except KdcacheError as error:
            raise CorruptCacheError(f"{record.where}: {error}") from error
    values = dict(record.distributions.features)
    for feature in features:
        num_rows = feature.num_vectors(record.distributions.num_positions)
        if feature.name not in values or values[feature.name].shape != (num_rows, feature.size):
            raise CorruptCacheError(f"{record.sequence.source}: the record has no {num_rows} rows of feature {feature.name!r}")
    return values
