"""Fewer numbers per vector: coefficients in a PCA basis, or products with a random matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.features.constants import NOTHING, FeatureConstants
from kdcache.errors import FormatError
from kdcache.format.identity import FeatureInfo

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def project_features(
    features: Sequence[FeatureInfo], constants: Mapping[str, FeatureConstants], values: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """A sequence's features as its record holds them, from the teacher's whole vectors (pooled where they are pooled).

    Args:
        features: as the cache describes them, fitted.
        constants: of the features that have some: `CacheWriter.constants`.
        values: as `Distributions.features`, but (F, full_size).
    """
    projected = {f.name: project_vectors(f, values[f.name], constants.get(f.name, NOTHING)) for f in features if f.projection}
    return {**values, **projected}


def project_vectors(
    feature: FeatureInfo, vectors: NDArray[np.float32], constants: FeatureConstants = NOTHING
) -> NDArray[np.float32]:
    """(F, H) float32 of (F, full_size): what is kept of the vectors.

    Raises:
        FormatError: a PCA that has not been fitted.
    """
    projection = feature.projection
    if projection is None:
        return vectors
    if projection.kind == "random":
        return vectors @ random_matrix(projection.full_size, feature.size, projection.seed)
    if constants.basis is None or constants.center is None:
        raise FormatError(f"feature {feature.name!r} has no basis: it has not been fitted")
    return ((vectors - constants.center) @ constants.basis.T).astype(np.float32, copy=False)


@lru_cache(maxsize=16)
def random_matrix(full_size: int, size: int, seed: int) -> NDArray[np.float32]:
    """(full_size, size) float32, not to be written: normal numbers of variance 1 / size, so that lengths are kept on average.

    Entry i, the matrix read line by line, is of the pair j = i // 2: with u1 and u2 the outputs 2 j and 2 j + 1, from 0, of a
    splitmix64 whose state starts as splitmix64(seed), sqrt(-2 log u1) times the cosine (i even) or sine (i odd) of 2 pi u2.
    """
    num_pairs = -(-full_size * size // 2)
    with np.errstate(over="ignore"):
        state = splitmix64(np.array([seed], np.uint64))
        uniforms = _units(splitmix64(np.arange(2 * num_pairs, dtype=np.uint64) * _GOLDEN + state))
    radius, angle = np.sqrt(-2.0 * np.log(uniforms[0::2])), 2.0 * np.pi * uniforms[1::2]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)[: full_size * size]
    matrix = (normal.reshape(full_size, size) / np.sqrt(size)).astype(np.float32)
    matrix.flags.writeable = False
    return matrix


def splitmix64(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The outputs of splitmix64 after these states (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        z = states + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _units(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """In (0, 1]: 53 bits of each."""
    return ((bits >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
