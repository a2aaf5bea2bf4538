"""Features of every kind with known vectors, for the tests of every room; pure functions, as in `cache_making`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cache_making import make_identity, make_manifest, make_record
from numpy.typing import NDArray

from kdcache.codec.features.constants import NOTHING, FeatureConstants
from kdcache.codec.features.fit import FittedFeature, fit_feature, needs_fit
from kdcache.codec.features.projection import project_features
from kdcache.format.feature_positions import feature_positions
from kdcache.format.manifest import FeatureInfo, Manifest, ProjectionInfo
from kdcache.format.record import SequenceRecord, distances_key
from kdcache.store.writing.writer import CacheWriter

H = 12
"""Numbers per vector that this teacher gives."""

ALL_KINDS = (
    FeatureInfo(name="plain", layer=2, size=H, num_layers=4),
    FeatureInfo(name="brain", layer=4, size=H, num_layers=4, dtype="bfloat16", positions="all"),
    FeatureInfo(name="strided", layer=-1, size=H, num_layers=4, positions="all", stride=3, offset=1, dtype="int8"),
    FeatureInfo(name="few", layer=1, size=H, num_layers=4, max_positions=4),
    FeatureInfo(name="channels", layer=3, size=H, num_layers=4, dtype="int8", scale="channel"),
    FeatureInfo(name="queries_2", kind="queries", layer=2, size=H, num_layers=4, num_heads=3, head_dim=4, dtype="int8"),
    FeatureInfo(name="keys_2", kind="keys", layer=2, size=4, num_layers=4, num_heads=1, head_dim=4, positions="all"),
    FeatureInfo(
        name="small", layer=-1, size=5, num_layers=4, dtype="int8", scale="channel",
        projection=ProjectionInfo(kind="pca", full_size=H),
    ),
    FeatureInfo(name="mixed", layer=2, size=6, num_layers=4, projection=ProjectionInfo(kind="random", full_size=H, seed=7)),
    FeatureInfo(name="whole", layer=-1, size=H, num_layers=4, pooling="mean", positions="all", dtype="bfloat16"),
    FeatureInfo(name="attention_2", kind="attention", layer=2, size=6, num_layers=4, num_heads=2, top_keys=3),
)  # fmt: skip
UNFITTED = {feature.name: feature for feature in ALL_KINDS}


def full_vectors(seed: int, feature: FeatureInfo, num_vectors: int) -> NDArray[np.float32]:
    """(F, full_size): normal numbers around another mean in each channel, one channel a hundred times larger."""
    rng = np.random.default_rng([seed, len(feature.name), feature.layer + 1])
    size = feature.full_size
    scale_H = np.where(np.arange(size) == 1, 100.0, 1.0)
    return (np.linspace(-2, 2, size) + rng.normal(0, scale_H, (num_vectors, size))).astype(np.float32)


def attention(seed: int, feature: FeatureInfo, positions_F: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Top keys of random attention: probabilities falling, each key once, fewer at the start of the sequence."""
    rng = np.random.default_rng([seed, 99])
    shape = len(positions_F), feature.num_heads or 1, feature.top_keys or 1
    probabilities, distances = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for f, t in enumerate(positions_F.tolist()):
        for head in range(shape[1]):
            count = min(shape[2], t + 1)
            found = rng.dirichlet(np.ones(t + 2))[: t + 1]  # what is left is no key's: a sink, say
            order = np.argsort(-found)[:count]
            probabilities[f, head, :count] = found[order].astype(np.float16)
            distances[f, head, :count] = t - order
    distances[probabilities == 0] = 0
    return {
        feature.name: probabilities.reshape(shape[0], feature.size),
        distances_key(feature): distances.reshape(shape[0], feature.size),
    }


def full_features(seed: int, record: SequenceRecord, features: Sequence[FeatureInfo]) -> dict[str, NDArray[Any]]:
    """What the teacher gives for a record's sequence, before any projection."""
    values: dict[str, NDArray[Any]] = {}
    for feature in features:
        positions_F = feature_positions(feature, record.sequence.supervised_N)
        if feature.kind == "attention":
            values |= attention(seed, feature, positions_F)
        else:
            values[feature.name] = full_vectors(seed, feature, 1 if feature.pooling != "none" else len(positions_F))
    return values


def fitted(features: Sequence[FeatureInfo]) -> list[FittedFeature]:
    """The features, fitted to 200 of these vectors where they need it."""
    made = []
    for feature in features:
        if needs_fit(feature):
            made.append(fit_feature(feature, full_vectors(1234, feature, 200)))
        else:
            made.append(FittedFeature(feature, (), NOTHING))
    return made


def record_with(seed: int, fits: Sequence[FittedFeature], **options: Any) -> SequenceRecord:
    """A record whose features are as a writer takes them."""
    record = make_record(seed, **options)
    return replace(record, distributions=replace(record.distributions, features=features_with(seed, record, fits)))


def features_with(seed: int, record: SequenceRecord, fits: Sequence[FittedFeature]) -> dict[str, NDArray[Any]]:
    """The features of a record, projected where they are."""
    features, constants = [fit.info for fit in fits], {fit.info.name: fit.constants for fit in fits}
    return project_features(features, constants, full_features(seed, record, features))


def open_writer(path: Path | str, fits: Sequence[FittedFeature], num_units: int = 1, **options: Any) -> CacheWriter:
    """A writer of a cache with these features."""
    identity = msgspec.structs.replace(make_identity("packed"), features=tuple(fit.info for fit in fits))
    sidecars = [sidecar for fit in fits for sidecar in fit.sidecars]
    return CacheWriter.open(path, make_manifest(num_units, identity), sidecars=sidecars, **options)


def make_feature_cache(
    path: Path | str, records: Sequence[SequenceRecord], fits: Sequence[FittedFeature], **options: Any
) -> Manifest:
    """A cache of one unit."""
    writer = open_writer(path, fits, **options)
    writer.write_unit(0, records)
    return writer.fold()


def most_off(feature: FeatureInfo, values_FH: NDArray[np.float32], constants: FeatureConstants) -> NDArray[Any]:
    """The bound that the dtype states, for each number."""
    size = np.abs(values_FH)
    if feature.dtype == "float16":
        return size * 2.0**-11 + 2.0**-25
    if feature.dtype == "bfloat16":
        return size * 2.0**-8
    scale_H, mean_H = (1.0, 0.0) if constants.scale_H is None else (constants.scale_H, constants.mean_H)
    z = np.abs((values_FH - mean_H) / scale_H)
    return z.max(axis=-1, keepdims=True, initial=0) / 254 * scale_H * 1.0001 + 1e-5 * np.abs(mean_H)
