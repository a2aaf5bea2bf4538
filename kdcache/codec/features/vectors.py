"""Vectors of float32 as the numbers that are stored, and how far off these are.

- `float16`: off by at most |x| 2^-11 (2^-25 near 0); `check_record` refuses a value beyond 65504.
- `bfloat16`: off by at most |x| 2^-8. Neither NumPy nor Arrow has it: it is stored as its bits, uint16.
- `int8`, scale `vector`: a vector's scale s is its largest magnitude / 127; x is stored as round(x / s), off by at most s / 2.
- `int8`, scale `channel`: z = (x - mean) / scale of each channel is stored like that. A vector outside of what the sample
  showed gets a larger s, so that nothing is ever clipped.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.features.constants import NOTHING, FeatureConstants
from kdcache.format.identity import FeatureInfo

STEPS = 127

NUMPY_DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16), "int8": np.dtype(np.int8)}
"""A feature's dtype -> that of its stored numbers."""


def encode_vectors(
    feature: FeatureInfo, vectors_FH: NDArray[np.float32], constants: FeatureConstants = NOTHING
) -> tuple[NDArray[np.generic], NDArray[np.float32] | None]:
    """The stored numbers (F, H), and with `int8` the scale of each vector (F,).

    Args:
        feature: says how.
        vectors_FH: checked by `check_record`.
        constants: of the feature: mean and scale of each channel, where they are used.
    """
    if feature.dtype == "float16":
        return vectors_FH.astype(np.float16), None
    if feature.dtype == "bfloat16":
        return bfloat16_bits(vectors_FH), None
    if feature.scale == "channel":
        mean_H, scale_H = constants.channels(feature)
        vectors_FH = (vectors_FH - mean_H) / scale_H
    return quantize_vectors(vectors_FH)


def quantize_vectors(vectors: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(vectors, H) int8, and a float32 scale of each: |values - int8 * scale| <= scale / 2, up to the rounding of float32."""
    scales = (np.abs(vectors).max(axis=-1, initial=0.0) / STEPS).astype(np.float32)
    # A vector of zeros, or so small that its scale is 0 in float32, is stored as zeros.
    divisors = np.where(scales > 0, scales, np.float32(np.inf))
    return np.clip(np.rint(vectors / divisors[:, None]), -STEPS, STEPS).astype(np.int8), scales


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest bfloat16 of each finite value, ties to even, as its bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def bytes_per_vector(feature: FeatureInfo) -> int:
    """How many bytes a vector of the feature takes on disk."""
    if feature.kind == "attention":
        return 4 * feature.size
    return feature.size + 4 if feature.dtype == "int8" else 2 * feature.size
