"""Features as columns: hidden states of named layers, next to the entries and independent of their codec.

`float16`: rounded, off by at most |x| 2^-11 (2^-25 near 0); `check_record` refuses a value beyond 65504. `int8`: each vector
has a scale, its largest magnitude / 127; a value is off by at most half of it. A value x is stored as round(x / scale).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec.base import ColumnValues, checked_column, list_array
from kdcache.format.manifest import FeatureInfo

_STEPS = 127


def feature_fields(features: Sequence[FeatureInfo]) -> list[pa.Field]:
    """The columns, in order: of each feature its values, vector by vector, and with `int8` the vectors' scales."""
    fields = []
    for feature in features:
        is_half = feature.dtype == "float16"
        fields.append(pa.field(_column(feature), pa.list_(pa.float16() if is_half else pa.int8()), nullable=False))
        if not is_half:
            fields.append(pa.field(_scale_column(feature), pa.list_(pa.float32()), nullable=False))
    return fields


def encode_features(sequences: Sequence[Mapping[str, NDArray[np.float32]]], features: Sequence[FeatureInfo]) -> list[pa.Array]:
    """One array per field, one value per sequence.

    Args:
        sequences: of each, feature name -> (vectors, H) float32, checked by `check_record`.
        features: what the cache keeps.
    """
    columns = []
    for feature in features:
        arrays = [values[feature.name] for values in sequences]
        if feature.dtype == "float16":
            columns.append(list_array([a.astype(np.float16).reshape(-1) for a in arrays], pa.float16()))
            continue
        quantized = [quantize_vectors(a) for a in arrays]
        columns.append(list_array([q.reshape(-1) for q, _ in quantized], pa.int8()))
        columns.append(list_array([scale for _, scale in quantized], pa.float32()))
    return columns


def decode_features(
    columns: ColumnValues, features: Sequence[FeatureInfo], num_positions: int
) -> dict[str, NDArray[np.float32]]:
    """One sequence's features back: name -> (vectors, H) float32.

    Raises:
        CorruptCacheError: a column of another length.
    """
    found = {}
    for feature in features:
        num_vectors = feature.num_vectors(num_positions)
        is_half = feature.dtype == "float16"
        stored = checked_column(columns, _column(feature), np.float16 if is_half else np.int8, num_vectors * feature.size)
        values = stored.reshape(num_vectors, feature.size).astype(np.float32)
        if not is_half:
            scales = checked_column(columns, _scale_column(feature), np.float32, num_vectors)
            with np.errstate(over="ignore", invalid="ignore"):  # `verify` refuses what is not finite
                values *= scales[:, None]
        found[feature.name] = values
    return found


def quantize_vectors(vectors: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(vectors, H) int8, and a float32 scale of each: |values - int8 * scale| <= scale / 2, up to the rounding of float32."""
    scales = (np.abs(vectors).max(axis=-1, initial=0.0) / _STEPS).astype(np.float32)
    # A vector of zeros, or so small that its scale is 0 in float32, is stored as zeros.
    divisors = np.where(scales > 0, scales, np.float32(np.inf))
    return np.clip(np.rint(vectors / divisors[:, None]), -_STEPS, _STEPS).astype(np.int8), scales


def bytes_per_vector(feature: FeatureInfo) -> int:
    """How many bytes a vector of the feature takes on disk."""
    return 2 * feature.size if feature.dtype == "float16" else feature.size + 4


def _column(feature: FeatureInfo) -> str:
    return f"feature:{feature.name}"


def _scale_column(feature: FeatureInfo) -> str:
    return f"feature:{feature.name}:scale"
