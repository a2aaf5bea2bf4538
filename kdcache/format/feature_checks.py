"""The contract of a record's features: what a writer checks before they are stored, and `kdcache verify` after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import FormatError
from kdcache.format.feature_positions import feature_positions
from kdcache.format.identity import FeatureInfo
from kdcache.format.record import distances_key

MAX_DISTANCE = 2**16 - 1
"""Distances are stored in 16 bits."""

_ENDS = {"float16": (65520.0, "float16 ends at 65504: use bfloat16 or int8"), "bfloat16": (3.3961775e38, "bfloat16 ends there")}
"""From here on a number rounds to infinity."""
_SUM_TOLERANCE = 2e-3
"""By how much a head's probabilities may exceed 1: each is rounded to float16."""


def check_features(
    values: Mapping[str, NDArray[Any]], features: Sequence[FeatureInfo], supervised_N: NDArray[np.bool_]
) -> None:
    """Raise FormatError unless a sequence with this mask has just these features, and each can be stored.

    Args:
        values: `Distributions.features`.
        features: what the cache keeps.
        supervised_N: (N,) bool.
    """
    expected = {feature.name for feature in features}
    expected |= {distances_key(feature) for feature in features if feature.kind == "attention"}
    if set(values) != expected:
        raise FormatError(f"features {sorted(values)}, but the cache keeps {sorted(expected)}")
    for feature in features:
        positions_F = feature_positions(feature, supervised_N)
        _check_numbers(values[feature.name], feature, 1 if feature.pooling != "none" else len(positions_F))
        if feature.kind == "attention":
            _check_attention(values[feature.name], values[distances_key(feature)], feature, positions_F)


def _check_numbers(values: NDArray[Any], feature: FeatureInfo, num_vectors: int) -> None:
    name = repr(feature.name)
    if values.ndim != 2 or values.shape[1] != feature.size or values.dtype != np.float32:
        raise FormatError(f"feature {name} is {values.dtype} of shape {values.shape}, expected float32 of (*, {feature.size})")
    if not np.isfinite(values).all():
        raise FormatError(f"feature {name} is not finite")
    end, advice = _ENDS.get(feature.dtype, (np.inf, ""))
    largest = float(np.abs(values).max(initial=0.0))
    if largest >= end:
        raise FormatError(f"feature {name} has a value of {largest:.6g}, {advice}")
    if len(values) != num_vectors:
        raise FormatError(f"feature {name} has {len(values)} vectors, expected {num_vectors}")


def _check_attention(
    values_FH: NDArray[np.float32], distances_FH: NDArray[Any], feature: FeatureInfo, positions_F: NDArray[np.int64]
) -> None:
    num_heads = feature.num_heads or 1
    name, shape = repr(feature.name), (len(values_FH), num_heads, feature.size // num_heads)
    if distances_FH.shape != values_FH.shape or distances_FH.dtype != np.int32:
        raise FormatError(f"feature {name} has distances of {distances_FH.dtype} {distances_FH.shape}, expected int32 like it")
    heads = values_FH.reshape(shape)
    if (heads < 0).any() or (heads.sum(-1, dtype=np.float64) > 1 + _SUM_TOLERANCE).any():
        raise FormatError(f"feature {name}: a head's probabilities are below 0, or sum to more than 1")
    if (heads[..., 1:] > heads[..., :-1]).any():
        raise FormatError(f"feature {name}: a head's probabilities are not in falling order")
    if (distances_FH < 0).any() or (distances_FH > np.minimum(positions_F, MAX_DISTANCE)[:, None]).any():
        raise FormatError(f"feature {name}: a key lies outside the sequence, or more than {MAX_DISTANCE} tokens back")
    if (distances_FH[values_FH == 0] != 0).any():
        raise FormatError(f"feature {name}: a distance of a key that has no probability, expected 0")
    ordered = np.sort(np.where(heads > 0, distances_FH.reshape(shape), -1), axis=-1)
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise FormatError(f"feature {name}: a head has a key twice")
