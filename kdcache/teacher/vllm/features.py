"""How hidden states pass between vLLM's worker and the teacher: plain values and bytes. Pure functions; neither torch nor vLLM.

Shape letters: P rows (supervised positions) of a group, S its sequences, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kdcache.format.manifest import FeatureInfo
from kdcache.format.record import Distributions, TokenSequence
from kdcache.teacher.features import no_rows, pooled

Packed = tuple[str, bytes]
"""A NumPy dtype's name and the bytes of (rows, H); `uint16` for the bits of bfloat16."""


@dataclass(frozen=True)
class AskedFeatures:
    """What is wanted of a group.

    Attributes:
        features: the hidden states.
        num_layers: of the model: the number of its last layer.
        proves: whether the worker is to prove, in each step, that it sees the layers rightly.
    """

    features: Sequence[FeatureInfo] = ()
    num_layers: int = 0
    proves: bool = False


NOTHING = AskedFeatures()


def pack_asked(asked: AskedFeatures, sequences: Sequence[TokenSequence]) -> dict[str, Any] | None:
    """What the worker is told: that, and where each sequence's rows start and end in the group's; None for nothing."""
    if not asked.features:
        return None
    bounds = np.cumsum([0, *(len(sequence.positions_P) for sequence in sequences)])
    return {
        "features": [msgspec.to_builtins(feature) for feature in asked.features],
        "bounds": bounds.tolist(),
        "num_layers": asked.num_layers,
        "proves": asked.proves,
    }


def pack_feature(feature: FeatureInfo, rows_PH: NDArray[Any], bounds: Sequence[int]) -> Packed:
    """A group's rows; where the feature is pooled, one float32 row per sequence."""
    if feature.pooling == "none":
        return rows_PH.dtype.name, rows_PH.tobytes()
    parts = [pooled(as_float32(rows_PH[start:end]), feature.pooling) for start, end in pairwise(bounds)]
    return "float32", np.concatenate(parts).tobytes()


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Values that came in the model's dtype; exact."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def with_features(
    answers: Iterable[tuple[TokenSequence, Distributions]], features: Sequence[FeatureInfo], packed: Sequence[Packed]
) -> Iterator[Distributions]:
    """The answers to a group's sequences with their features.

    Args:
        answers: sequences in order, those without supervised positions too, of which the worker has not heard.
        features: that were asked for.
        packed: of each feature, see `GroupFeatures.pack`.
    """
    arrays = [np.frombuffer(data, name).reshape(-1, f.size) for f, (name, data) in zip(features, packed, strict=True)]
    starts = [0] * len(features)
    for sequence, distributions in answers:
        num_positions = len(sequence.positions_P)
        values = no_rows(features)
        for number, feature in enumerate(features if num_positions else ()):
            end = starts[number] + feature.num_rows(num_positions)
            values[feature.name], starts[number] = as_float32(arrays[number][starts[number] : end]), end
        yield replace(distributions, features=values)
