"""How the vLLM teacher and the extension of the engine's worker talk: plain values and bytes, no object per token.

A group of sequences is one buffer of P rows, one per supervised position, sequence after sequence. With each request goes where
its rows start and, for each of its tokens, what the row is about; back comes the whole buffer, with a mark at each row that was
written. Hidden states that are wanted follow in a message of their own. Pure functions; neither torch nor vLLM.

Shape letters: N tokens of a sequence, P rows (supervised positions) of a group, K entries per position (padded), S scalars.
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
from kdcache.format.manifest import FeatureInfo, SelectionInfo
from kdcache.format.record import Distributions, TokenSequence
from kdcache.teacher.base import no_positions
from kdcache.teacher.features import no_rows, pooled
from kdcache.teacher.select.found import Found, Layout, Selected, record_of

NOT_SUPERVISED = -2
"""In a request's targets: no row for this position. NO_TARGET: a row, but nothing follows."""

ROW, TARGETS, KEY = "kdcache_row", "kdcache_targets", "kdcache_key"
"""Keys of a request's extra arguments."""


def pack_requests(sequences: Sequence[TokenSequence]) -> list[dict[str, Any]]:
    """The extra arguments of each sequence's request."""
    packed, row = [], 0
    for sequence in sequences:
        targets_N = np.full(sequence.num_tokens, NOT_SUPERVISED, np.int32)
        targets_N[sequence.supervised_N] = sequence.target_ids_P
        packed.append({ROW: row, TARGETS: targets_N.tobytes(), KEY: sequence.key})
        row += len(sequence.positions_P)
    return packed


class Wanted(NamedTuple):
    """Of one request: the buffer's rows of its positions, and their targets; the sequence's key, from which draws follow."""

    rows_N: NDArray[np.int64]
    targets_N: NDArray[np.int32]
    key: bytes


def unpack_request(extra_args: Mapping[str, Any]) -> Wanted:
    """Inverse of `pack_requests`, in the worker. rows_N is a row before the first where a position has none."""
    targets_N = np.frombuffer(extra_args[TARGETS], np.int32)
    return Wanted(int(extra_args[ROW]) + np.cumsum(targets_N != NOT_SUPERVISED) - 1, targets_N, extra_args[KEY])


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """The rows of a group, in the worker.

    Attributes:
        selected: what was found at each position.
        filled_P: bool, whether it was written.
    """

    selected: Selected[NDArray[Any]]
    filled_P: NDArray[np.bool_]

    @classmethod
    def empty(cls, num_rows: int, layout: Layout) -> Buffer:
        """With no row written."""
        shape = (num_rows, layout.num_columns)
        selected = Selected[NDArray[Any]](
            token_ids_PK=np.empty(shape, np.int32),
            logprobs_PK=np.empty(shape, np.float32),
            target_logprobs_P=np.empty(num_rows, np.float32),
            counts_P2=np.zeros((num_rows, 2 * layout.is_ragged), np.int32),
            scalars_PS=np.empty((num_rows, layout.num_scalars), np.float32),
        )
        return cls(selected, np.zeros(num_rows, np.bool_))

    def write(self, rows_C: NDArray[np.int64], found: Sequence[NDArray[Any]]) -> None:
        """What was selected for some rows; a row that is written twice keeps what came last."""
        for array, values in zip(self.selected, found, strict=True):
            array[rows_C] = values
        self.filled_P[rows_C] = True

    def pack(self) -> list[Any]:
        """Sizes and bytes, which cross any process boundary; of ragged rows, the entries alone."""
        found = Found.from_padded(self.selected)
        sizes = [len(self.filled_P), found.scalars_PS.shape[1]]
        return [*sizes, *(array.tobytes() for array in (*found, self.filled_P))]


def unpack_buffer(packed: Sequence[Any]) -> tuple[Found, NDArray[np.bool_]]:
    """What `Buffer.pack` sent, and (P,) whether a row was written; read-only views."""
    num_rows, num_scalars, ids, logprobs, offsets, num_exact, targets, scalars, filled = packed
    found = Found(
        token_ids_E=np.frombuffer(ids, np.int32),
        logprobs_E=np.frombuffer(logprobs, np.float32),
        offsets_P1=np.frombuffer(offsets, np.int64),
        num_exact_P=np.frombuffer(num_exact, np.int64),
        target_logprobs_P=np.frombuffer(targets, np.float32),
        scalars_PS=np.frombuffer(scalars, np.float32).reshape(num_rows, num_scalars),
    )
    return found, np.frombuffer(filled, np.bool_)


def read_buffer(sequences: Sequence[TokenSequence], selection: SelectionInfo, packed: Sequence[Any]) -> Iterator[Distributions]:
    """The answers to the sequences of a group, in order.

    Args:
        sequences: the group's.
        selection: what was asked for.
        packed: see `Buffer.pack`.

    Raises:
        TeacherError: a position without a row, or one with NaN.
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
        yield no_positions(selection) if start == end else record_of(sequence, selection, found.rows(start, end))


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
