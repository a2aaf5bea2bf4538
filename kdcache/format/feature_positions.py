"""Which positions of a sequence a feature has vectors for: a pure function of the feature and the mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.format.identity import FeatureInfo


def feature_positions(feature: FeatureInfo, supervised_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(F,) the token indices t that a feature has vectors for, ascending; of a pooled one, those that it is made of.

    Of the supervised positions, or of all tokens, those with t % stride == offset; of more than max_positions of them, the ones
    with the ranks (i x F) // max_positions.

    Args:
        feature: as the cache describes it.
        supervised_N: (N,) the sequence's mask.
    """
    if feature.positions == "all":
        found = np.arange(feature.offset, len(supervised_N), feature.stride, dtype=np.int64)
    else:
        found = np.flatnonzero(supervised_N)
        if feature.stride > 1:
            found = found[found % feature.stride == feature.offset]
    most = feature.max_positions
    if most is not None and len(found) > most:
        found = found[np.arange(most, dtype=np.int64) * len(found) // most]
    return found


def num_vectors(feature: FeatureInfo, supervised_N: NDArray[np.bool_]) -> int:
    """How many vectors a sequence has: one for each of the feature's positions, or one where they are pooled."""
    return 1 if feature.pooling != "none" else len(feature_positions(feature, supervised_N))
