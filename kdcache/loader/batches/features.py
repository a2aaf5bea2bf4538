"""Features in a batch: which of the caches' features it holds, and how they get there, as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.features.columns import StoredVectors, read_vectors
from kdcache.codec.features.constants import NOTHING, FeatureConstants
from kdcache.codec.features.vectors import NUMPY_DTYPES, encode_vectors
from kdcache.errors import ConfigError, CorruptCacheError, KdcacheError
from kdcache.format.feature_positions import feature_positions, num_vectors
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.manifest import FeatureInfo, Manifest
from kdcache.format.record import SequenceRecord, distances_key
from kdcache.loader.batches.buffers import BufferPool
from kdcache.store.records.batch import EncodedRecord


@dataclass(frozen=True, slots=True)
class AskedFeature:
    """A feature that batches hold, and its constants."""

    info: FeatureInfo
    constants: FeatureConstants = field(default=NOTHING)


def find_features(manifests: Sequence[Manifest], names: Sequence[str]) -> tuple[FeatureInfo, ...]:
    """What the caches say of the features with these names.

    Raises:
        ConfigError: a cache has none of that name, or one that is stored in another way than the first cache's.
    """
    found = [_find(manifest, index, names) for index, manifest in enumerate(manifests)]
    for index, features in enumerate(found):
        for first, other in zip(found[0], features, strict=True):
            if first != other:
                differing = [name for name in first.__struct_fields__ if getattr(first, name) != getattr(other, name)]
                mine, theirs = ([f"{name} {getattr(f, name)!r}" for name in differing] for f in (first, other))
                raise ConfigError(
                    f"loader.features: {first.name!r} has {', '.join(mine)} in cache 0, but {', '.join(theirs)} in cache "
                    f"{index}; they cannot share a batch"
                )
    return found[0]


def batch_features(
    records: Sequence[SequenceRecord | EncodedRecord],
    keeps: Sequence[NDArray[np.bool_] | None],
    starts: Sequence[int],
    features: Sequence[AskedFeature],
    pool: BufferPool,
) -> dict[str, FeatureVectors[NDArray[np.generic]]] | None:
    """The batch's features by name; None where none is asked for.

    Args:
        records: the batch's sequences, in its order.
        keeps: of each, which of its supervised positions the batch holds; None for all.
        starts: of each, the slot of its first token.
        features: that are asked for.
        pool: gives the memory of the numbers.

    Raises:
        CorruptCacheError: a record does not have them.
    """
    if not features:
        return None
    return {asked.info.name: gathered(asked, records, keeps, starts, pool) for asked in features}


def gathered(
    asked: AskedFeature,
    records: Sequence[SequenceRecord | EncodedRecord],
    keeps: Sequence[NDArray[np.bool_] | None],
    starts: Sequence[int],
    pool: BufferPool,
) -> FeatureVectors[NDArray[np.generic]]:
    """The vectors of one feature; arguments as for `batch_features`."""
    feature, slots, kept = asked.info, [], []
    masks = [_mask(record) for record in records]
    for index, (supervised_N, keep_P, start) in enumerate(zip(masks, keeps, starts, strict=True)):
        positions_F, keep_F = _kept(feature, supervised_N, keep_P)
        slots.append(np.array([index], np.int64) if feature.pooling != "none" else positions_F + start)
        kept.append(keep_F)
    offsets = np.cumsum([0, *map(len, slots)])
    vectors = _blank(asked, np.concatenate([np.zeros(0, np.int64), *slots]), pool)
    for record, supervised_N, keep_F, start, end in zip(records, masks, kept, offsets, offsets[1:], strict=False):
        stored = _stored(record, asked, supervised_N)
        for own, out in (
            (stored.values_FH, vectors.values_FH),
            (stored.scale_F, vectors.scale_F),
            (stored.distances_FH, vectors.distances_FH),
        ):
            if own is not None and out is not None:
                out[start:end] = own if keep_F is None else own[keep_F]
    return vectors


def gathered_pooled(
    asked: AskedFeature, num_sequences: int, record_of: Callable[[int], SequenceRecord | EncodedRecord]
) -> FeatureVectors[NDArray[np.generic]]:
    """The vector of each sequence of a pooled feature; one record is held at a time.

    Args:
        asked: a pooled feature.
        num_sequences: of all.
        record_of: gives the record of a sequence by its index.

    Raises:
        CorruptCacheError: a record does not have it.
    """
    vectors = _blank(asked, np.arange(num_sequences), BufferPool(0))
    for index in range(num_sequences):
        record = record_of(index)
        stored = _stored(record, asked, _mask(record))
        vectors.values_FH[index] = stored.values_FH[0]
        if stored.scale_F is not None and vectors.scale_F is not None:
            vectors.scale_F[index] = stored.scale_F[0]
    return vectors


def _blank(asked: AskedFeature, slots_F: NDArray[np.int64], pool: BufferPool) -> FeatureVectors[NDArray[np.generic]]:
    feature, shape = asked.info, (len(slots_F), asked.info.size)
    return FeatureVectors(
        info=feature,
        values_FH=pool.take(shape, NUMPY_DTYPES[feature.dtype], f"feature:{feature.name}"),
        slots_F=slots_F,
        scale_F=np.empty(shape[0], np.float32) if feature.dtype == "int8" else None,
        mean_H=asked.constants.mean_H,
        scale_H=asked.constants.scale_H,
        distances_FH=np.empty(shape, np.int32) if feature.kind == "attention" else None,
        basis=asked.constants.basis,
        center=asked.constants.center,
    )


def _kept(
    feature: FeatureInfo, supervised_N: NDArray[np.bool_], keep_P: NDArray[np.bool_] | None
) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """The positions whose vectors the batch holds, and which of the sequence's vectors these are; None for all.

    A feature at all positions keeps them all: there the mask is data.
    """
    positions_F = feature_positions(feature, supervised_N)
    if keep_P is None or feature.pooling != "none" or feature.positions == "all":
        return positions_F, None
    kept_N = np.zeros(len(supervised_N), bool)
    kept_N[np.flatnonzero(supervised_N)[keep_P]] = True
    keep_F = kept_N[positions_F]
    return positions_F[keep_F], keep_F


def _mask(record: SequenceRecord | EncodedRecord) -> NDArray[np.bool_]:
    return record.supervised_N if isinstance(record, EncodedRecord) else record.sequence.supervised_N


def _find(manifest: Manifest, index: int, names: Sequence[str]) -> tuple[FeatureInfo, ...]:
    there = {feature.name: feature for feature in manifest.identity.features}
    for name in names:
        if name not in there:
            has = ", ".join(there) or "none"
            raise ConfigError(f"loader.features: cache {index} has no feature {name!r}; it has {has}")
    return tuple(there[name] for name in names)


def _stored(record: SequenceRecord | EncodedRecord, asked: AskedFeature, supervised_N: NDArray[np.bool_]) -> StoredVectors:
    feature = asked.info
    if isinstance(record, EncodedRecord):
        try:
            return read_vectors(record.columns, feature, supervised_N)
        except KdcacheError as error:
            raise CorruptCacheError(f"{record.where}: {error}") from error
    values, shape = record.distributions.features, (num_vectors(feature, supervised_N), feature.size)
    if feature.name not in values or values[feature.name].shape != shape:
        raise CorruptCacheError(f"{record.sequence.source}: the record has no {shape[0]} vectors of feature {feature.name!r}")
    stored_FH, scale_F = encode_vectors(feature, values[feature.name], asked.constants)
    return StoredVectors(stored_FH, scale_F, values.get(distances_key(feature)))
