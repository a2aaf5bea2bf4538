"""What the vLLM teacher and its extension of the engine's worker send each other: plain values and bytes, no object per token.

A group of sequences is one buffer over its P supervised positions, sequence after sequence. Each request carries where its
positions start in the buffer and, for each of its tokens, the target id. Back comes the whole buffer, with a mark at each
position that was written. Hidden states follow in a message of their own. Pure functions; neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kdcache.errors import TeacherError
from kdcache.format.feature_positions import feature_positions, num_vectors
from kdcache.format.manifest import FeatureInfo, SelectionInfo
from kdcache.format.record import Distributions, TokenSequence
from kdcache.teacher.base import no_positions
from kdcache.teacher.features import is_read, no_vectors, pooled
from kdcache.teacher.select.found import Found, Layout, Selected, record_of

NOT_SUPERVISED = -2
"""In a request's target ids: the position is not wanted. NO_TARGET: it is, but nothing follows."""

START, TARGET_IDS, KEY, INDEX = "kdcache_start", "kdcache_target_ids", "kdcache_key", "kdcache_index"
"""Keys of a request's extra arguments."""


def pack_requests(sequences: Sequence[TokenSequence]) -> list[dict[str, Any]]:
    """The extra arguments of each sequence's request."""
    packed, start = [], 0
    for index, sequence in enumerate(sequences):
        target_ids_N = np.full(sequence.num_tokens, NOT_SUPERVISED, np.int32)
        target_ids_N[sequence.supervised_N] = sequence.target_ids_P
        packed.append({START: start, TARGET_IDS: target_ids_N.tobytes(), KEY: sequence.key, INDEX: index})
        start += len(sequence.positions_P)
    return packed


class Wanted(NamedTuple):
    """One request: its positions' indices in the group, their target ids, the key that its draws follow from, and which one
    of the group it is."""

    group_index_N: NDArray[np.int64]
    target_ids_N: NDArray[np.int32]
    key: bytes
    which: int

    @property
    def supervised_N(self) -> NDArray[np.bool_]:
        """The sequence's mask."""
        return self.target_ids_N != NOT_SUPERVISED


def unpack_request(extra_args: Mapping[str, Any]) -> Wanted:
    """Inverse of `pack_requests`, in the worker. group_index_N has a meaning at wanted positions only."""
    target_ids_N = np.frombuffer(extra_args[TARGET_IDS], np.int32)
    group_index_N = int(extra_args[START]) + np.cumsum(target_ids_N != NOT_SUPERVISED) - 1
    return Wanted(group_index_N, target_ids_N, extra_args[KEY], int(extra_args[INDEX]))


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """What was selected for a group, in the worker.

    Attributes:
        selected: what was found at each position.
        filled_P: bool, whether it was written.
    """

    selected: Selected[NDArray[Any]]
    filled_P: NDArray[np.bool_]

    @classmethod
    def empty(cls, num_positions: int, layout: Layout) -> Buffer:
        """A buffer in which no position is written."""
        shape = (num_positions, layout.num_columns)
        selected = Selected[NDArray[Any]](
            token_ids_PK=np.empty(shape, np.int32),
            logprobs_PK=np.empty(shape, np.float32),
            target_logprobs_P=np.empty(num_positions, np.float32),
            counts_P2=np.zeros((num_positions, 2 * layout.is_ragged), np.int32),
            scalars=np.empty((num_positions, layout.num_scalars), np.float32),
        )
        return cls(selected, np.zeros(num_positions, np.bool_))

    def write(self, index_C: NDArray[np.int64], found: Sequence[NDArray[Any]]) -> None:
        """Write what was selected at some positions; of a position that is written twice the last one stays."""
        for array, values in zip(self.selected, found, strict=True):
            array[index_C] = values
        self.filled_P[index_C] = True

    def pack(self) -> list[Any]:
        """Sizes and bytes, which cross any process boundary. Ragged entries travel without padding."""
        found = Found.from_padded(self.selected)
        sizes = [len(self.filled_P), found.scalars.shape[1]]
        return [*sizes, *(array.tobytes() for array in (*found, self.filled_P))]


def unpack_buffer(packed: Sequence[Any]) -> tuple[Found, NDArray[np.bool_]]:
    """What `Buffer.pack` sent, as read-only views, and (P,) whether each position was written."""
    num_positions, num_scalars, ids, logprobs, offsets, num_exact, target_ids, scalars, filled = packed
    found = Found(
        token_ids_E=np.frombuffer(ids, np.int32),
        logprobs_E=np.frombuffer(logprobs, np.float32),
        offsets_P1=np.frombuffer(offsets, np.int64),
        num_exact_P=np.frombuffer(num_exact, np.int64),
        target_logprobs_P=np.frombuffer(target_ids, np.float32),
        scalars=np.frombuffer(scalars, np.float32).reshape(num_positions, num_scalars),
    )
    return found, np.frombuffer(filled, np.bool_)


def read_buffer(sequences: Sequence[TokenSequence], selection: SelectionInfo, packed: Sequence[Any]) -> Iterator[Distributions]:
    """The answers to the sequences of a group, in order.

    Args:
        sequences: those of the group.
        selection: what was asked for.
        packed: see `Buffer.pack`.

    Raises:
        TeacherError: a position was not written, or has NaN.
    """
    found, filled_P = unpack_buffer(packed)
    end = 0
    for sequence in sequences:
        start, end = end, end + len(sequence.positions_P)
        if not filled_P[start:end].all():
            missing = sequence.positions_P[~filled_P[start:end]]
            raise TeacherError(
                f"{sequence.source}: the engine's worker never computed {len(missing)} of {end - start} positions, the first "
                f"of them {int(missing[0])}; set teacher.vllm.route to public"
            )
        yield no_positions(selection) if start == end else record_of(sequence, selection, found.positions(start, end))


Packed = tuple[str, bytes]
"""A NumPy dtype's name and the bytes of (vectors, W); `uint16` for the bits of bfloat16."""


@dataclass(frozen=True)
class AskedFeatures:
    """The states that are wanted of a group.

    Attributes:
        features: which ones.
        proves: whether the worker is to prove, in each step, that it sees the layers correctly.
        directly: whether a compiled model is to run its layers one by one, so that hooks see them.
    """

    features: Sequence[FeatureInfo] = ()
    proves: bool = False
    directly: bool = False


NOTHING = AskedFeatures()


def pack_asked(asked: AskedFeatures, sequences: Sequence[TokenSequence]) -> dict[str, Any] | None:
    """What the worker is told: the features, and of each where every sequence's vectors start and end; None for none."""
    if not asked.features:
        return None
    return {
        "features": [msgspec.to_builtins(feature) for feature in asked.features],
        "bounds": [bounds_of(feature, sequences).tolist() for feature in asked.features],
        "proves": asked.proves,
        "directly": asked.directly,
    }


def bounds_of(feature: FeatureInfo, sequences: Sequence[TokenSequence]) -> NDArray[np.int64]:
    """(sequences + 1,) where each sequence's vectors start and end among those of the group, before they are pooled."""
    return np.cumsum([0, *(len(feature_positions(feature, sequence.supervised_N)) for sequence in sequences)], dtype=np.int64)


def pack_feature(feature: FeatureInfo, vectors_FW: NDArray[Any], bounds: Sequence[int]) -> Packed:
    """The vectors of a group's positions; of a pooled feature one float32 vector per sequence."""
    if feature.pooling == "none":
        return vectors_FW.dtype.name, vectors_FW.tobytes()
    parts = [pooled(as_float32(vectors_FW[start:end]), feature.pooling) for start, end in pairwise(bounds)]
    return "float32", np.concatenate(parts).tobytes()


def pack_array(array: NDArray[Any]) -> list[Any]:
    """An array as plain values and bytes."""
    return [array.dtype.name, list(array.shape), array.tobytes()]


def unpack_array(packed: Sequence[Any]) -> NDArray[Any]:
    """Inverse of `pack_array`."""
    name, shape, data = packed
    return np.frombuffer(data, name).reshape(shape)


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Convert values from the model's dtype, exactly."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def with_features(
    answers: Iterable[tuple[TokenSequence, Distributions]], features: Sequence[FeatureInfo], packed: Sequence[Packed]
) -> Iterator[Distributions]:
    """Add their features to the answers of a group.

    Args:
        answers: sequences in order, including those that the worker has never seen, since nothing is wanted of them.
        features: those that were asked for.
        packed: one for each feature, see `GroupFeatures.pack`.
    """
    arrays = [np.frombuffer(data, name).reshape(-1, f.full_size) for f, (name, data) in zip(features, packed, strict=True)]
    starts = [0] * len(features)
    for sequence, distributions in answers:
        values = no_vectors(features)
        for index, feature in enumerate(features if is_read(sequence, features) else ()):
            end = starts[index] + num_vectors(feature, sequence.supervised_N)
            values[feature.name], starts[index] = as_float32(arrays[index][starts[index] : end]), end
        yield replace(distributions, features=values)
