"""Features as columns: states of named layers, next to the entries and independent of their codec.

Of each feature its numbers, vector by vector (see `vectors`); with `int8` the vectors' scales; of `attention` the distances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec.base import ColumnValues, checked_column, list_array
from kdcache.codec.features.constants import NOTHING, FeatureConstants
from kdcache.codec.features.vectors import NUMPY_DTYPES, encode_vectors
from kdcache.errors import CorruptCacheError
from kdcache.format.feature_positions import feature_positions, num_vectors
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.identity import FeatureInfo
from kdcache.format.record import distances_key

ConstantsByName = Mapping[str, FeatureConstants]
"""Feature name -> its constants; a feature without any may be missing."""

_ARROW_TYPES = {"float16": pa.float16(), "bfloat16": pa.uint16(), "int8": pa.int8()}


@dataclass(frozen=True, slots=True, eq=False)
class StoredVectors:
    """A sequence's vectors of one feature as its columns hold them: views, not decoded.

    Attributes:
        values_FH: (F, H), see `FeatureVectors.values_FH`.
        scale_F: (F,) float32, of `int8`.
        distances_FH: (F, H) uint16, of `attention`.
    """

    values_FH: NDArray[Any]
    scale_F: NDArray[np.float32] | None = None
    distances_FH: NDArray[np.uint16] | None = None


def feature_fields(features: Sequence[FeatureInfo]) -> list[pa.Field]:
    """The columns, in order."""
    fields = []
    for feature in features:
        types = [(_column(feature), _ARROW_TYPES[feature.dtype])]
        types += [(_scale_column(feature), pa.float32())] * (feature.dtype == "int8")
        types += [(_distance_column(feature), pa.uint16())] * (feature.kind == "attention")
        fields += [pa.field(name, pa.list_(value_type), nullable=False) for name, value_type in types]
    return fields


def encode_features(
    sequences: Sequence[Mapping[str, NDArray[Any]]], features: Sequence[FeatureInfo], constants: ConstantsByName
) -> list[pa.Array]:
    """One array per field, one value per sequence.

    Args:
        sequences: of each, its `Distributions.features`, checked by `check_record`.
        features: what the cache keeps.
        constants: of the features that have some.
    """
    columns = []
    for feature in features:
        own = constants.get(feature.name, NOTHING)
        encoded = [encode_vectors(feature, values[feature.name], own) for values in sequences]
        columns.append(list_array([stored.reshape(-1) for stored, _ in encoded], _ARROW_TYPES[feature.dtype]))
        if feature.dtype == "int8":
            columns.append(list_array([scale for _, scale in encoded if scale is not None], pa.float32()))
        if feature.kind == "attention":
            distances = [values[distances_key(feature)].astype(np.uint16).reshape(-1) for values in sequences]
            columns.append(list_array(distances, pa.uint16()))
    return columns


def read_vectors(columns: ColumnValues, feature: FeatureInfo, supervised_N: NDArray[np.bool_]) -> StoredVectors:
    """One sequence's vectors of a feature, as they are stored.

    Raises:
        CorruptCacheError: a column of another length, or a key that is outside the sequence.
    """
    count = num_vectors(feature, supervised_N)
    shape = count, feature.size
    dtype = NUMPY_DTYPES[feature.dtype]
    values_FH = checked_column(columns, _column(feature), dtype, count * feature.size).reshape(shape)
    scale_F = checked_column(columns, _scale_column(feature), np.float32, count) if feature.dtype == "int8" else None
    distances_FH = None
    if feature.kind == "attention":
        distances_FH = checked_column(columns, _distance_column(feature), np.uint16, count * feature.size).reshape(shape)
        if (distances_FH > feature_positions(feature, supervised_N)[:, None]).any():
            raise CorruptCacheError(f"feature {feature.name!r}: a key lies in front of the sequence")
    return StoredVectors(values_FH, scale_F, distances_FH)


def decode_features(
    columns: ColumnValues, features: Sequence[FeatureInfo], supervised_N: NDArray[np.bool_], constants: ConstantsByName
) -> dict[str, NDArray[Any]]:
    """One sequence's `Distributions.features` back.

    Raises:
        CorruptCacheError: a column of another length.
    """
    found: dict[str, NDArray[Any]] = {}
    for feature in features:
        stored, own = read_vectors(columns, feature, supervised_N), constants.get(feature.name, NOTHING)
        slots = np.zeros(len(stored.values_FH), np.int64)
        vectors = FeatureVectors(feature, stored.values_FH, slots, stored.scale_F, own.mean_H, own.scale_H)
        with np.errstate(over="ignore", invalid="ignore"):  # `verify` refuses what is not finite
            found[feature.name] = vectors.float32()
        if stored.distances_FH is not None:
            found[distances_key(feature)] = stored.distances_FH.astype(np.int32)
    return found


def _column(feature: FeatureInfo) -> str:
    return f"feature:{feature.name}"


def _scale_column(feature: FeatureInfo) -> str:
    return f"feature:{feature.name}:scale"


def _distance_column(feature: FeatureInfo) -> str:
    return f"feature:{feature.name}:distance"
