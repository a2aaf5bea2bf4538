"""Features as columns: hidden states of named layers, beside the entries and independent of their codec.

`float16`: rounded, off by at most |x| 2^-11 (2^-25 near 0); a value beyond 65504 is refused. `int8`: each row has a scale, its
largest magnitude / 127; a value is off by at most half of it. A value x is stored as round(x / scale).

Shape letters: P supervised positions, R rows of a feature (P, or 1 where it is pooled), H its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec.base import ColumnValues, checked_column, list_array
from kdcache.errors import FormatError
from kdcache.format.manifest import FeatureInfo

_STEPS = 127
_HALF_END = 65520.0
"""From here on float16 rounds to infinity."""


def feature_fields(features: Sequence[FeatureInfo]) -> list[pa.Field]:
    """The columns, in order: of each feature its values, row by row, and with `int8` the rows' scales."""
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
        sequences: of each, feature name -> (R, H) float32.
        features: what the cache keeps.

    Raises:
        FormatError: a sequence has other features, one is of another size or not finite, or a value does not fit float16.
    """
    for values in sequences:
        _check_names(values, features)
    columns = []
    for feature in features:
        arrays = [_checked(values[feature.name], feature) for values in sequences]
        if feature.dtype == "float16":
            columns.append(list_array([_half(a, feature).reshape(-1) for a in arrays], pa.float16()))
            continue
        quantized = [quantize_rows(a) for a in arrays]
        columns.append(list_array([q.reshape(-1) for q, _ in quantized], pa.int8()))
        columns.append(list_array([scale for _, scale in quantized], pa.float32()))
    return columns


def check_features(values: Mapping[str, NDArray[np.float32]], features: Sequence[FeatureInfo], num_positions: int) -> None:
    """Raise FormatError unless a sequence with so many supervised positions has these features, each with its rows, in numbers
    that can be stored."""
    _check_names(values, features)
    for feature in features:
        values_RH = _checked(values[feature.name], feature)
        if feature.dtype == "float16":
            _check_half(values_RH, feature)
        found, expected = len(values_RH), feature.num_rows(num_positions)
        if found != expected:
            raise FormatError(f"feature {feature.name!r} has {found} rows, expected {expected}")


def decode_features(
    columns: ColumnValues, features: Sequence[FeatureInfo], num_positions: int
) -> dict[str, NDArray[np.float32]]:
    """One sequence's features back: name -> (R, H) float32.

    Raises:
        CorruptCacheError: a column of another length.
    """
    found = {}
    for feature in features:
        num_rows = feature.num_rows(num_positions)
        is_half = feature.dtype == "float16"
        stored = checked_column(columns, _column(feature), np.float16 if is_half else np.int8, num_rows * feature.size)
        values = stored.reshape(num_rows, feature.size).astype(np.float32)
        if not is_half:
            scale_R = checked_column(columns, _scale_column(feature), np.float32, num_rows)
            with np.errstate(over="ignore", invalid="ignore"):  # `verify` refuses what is not finite
                values *= scale_R[:, None]
        found[feature.name] = values
    return found


def quantize_rows(values_RH: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(R, H) int8 and the rows' (R,) float32 scales: |values - int8 * scale| <= scale / 2, up to the rounding of float32."""
    scale_R = (np.abs(values_RH).max(axis=-1, initial=0.0) / _STEPS).astype(np.float32)
    # A row of zeros, or so small that its scale is 0 in float32, is stored as zeros.
    divisor_R = np.where(scale_R > 0, scale_R, np.float32(np.inf))
    return np.clip(np.rint(values_RH / divisor_R[:, None]), -_STEPS, _STEPS).astype(np.int8), scale_R


def bytes_per_row(feature: FeatureInfo) -> int:
    """What a row of the feature takes on disk."""
    return 2 * feature.size if feature.dtype == "float16" else feature.size + 4


def _column(feature: FeatureInfo) -> str:
    return f"feature:{feature.name}"


def _scale_column(feature: FeatureInfo) -> str:
    return f"feature:{feature.name}:scale"


def _check_names(values: Mapping[str, NDArray[np.float32]], features: Sequence[FeatureInfo]) -> None:
    names = {feature.name for feature in features}
    if set(values) != names:
        raise FormatError(f"a record has the features {sorted(values)}, the cache keeps {sorted(names)}")


def _checked(values: NDArray[Any], feature: FeatureInfo) -> NDArray[np.float32]:
    if values.ndim != 2 or values.shape[1] != feature.size or values.dtype != np.float32:
        raise FormatError(
            f"feature {feature.name!r} is {values.dtype} of shape {values.shape}, expected float32 of (rows, {feature.size})"
        )
    if not np.isfinite(values).all():
        raise FormatError(f"feature {feature.name!r} is not finite")
    return values


def _half(values_RH: NDArray[np.float32], feature: FeatureInfo) -> NDArray[np.float16]:
    _check_half(values_RH, feature)
    return values_RH.astype(np.float16)


def _check_half(values_RH: NDArray[np.float32], feature: FeatureInfo) -> None:
    largest = float(np.abs(values_RH).max(initial=0.0))
    if largest >= _HALF_END:
        raise FormatError(f"feature {feature.name!r} has a value of {largest:.6g}, float16 ends at 65504: use int8")
