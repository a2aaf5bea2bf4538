"""What a selection finds on its way from the logits to the record: padded where it is made, ragged on the host.

What else is kept of a position stands in the columns of one float32 array, `scalars`: the tail mass (except for `top_k`, where
it follows from the entries), the entropy and the normalisers, in this order, as far as the selection asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions, TokenSequence, find_targets
from kdcache.format.selection import has_estimates, most_entries
from kdcache.teacher.base import answer, nan_error


@dataclass(frozen=True)
class Layout:
    """What is found at one position.

    Attributes:
        num_columns: the most entries.
        is_ragged: whether the number of entries varies; then it is stored, with the number of exact ones.
        num_scalars: columns of `scalars`.
    """

    num_columns: int
    is_ragged: bool
    num_scalars: int

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one position, padded, with the target's logprob and a mark."""
        return 8 * self.num_columns + 8 * self.is_ragged + 4 * self.num_scalars + 5


def layout_of(selection: SelectionInfo, vocab_size: int) -> Layout:
    """The layout of a selection over a vocabulary."""
    is_ragged = selection.kind != "top_k"
    num_scalars = is_ragged + selection.entropy + len(selection.temperatures)
    return Layout(most_entries(selection, vocab_size), is_ragged, num_scalars)


Array = TypeVar("Array")
"""A tensor where the logits are, a NumPy array on the host."""


class Selected(NamedTuple, Generic[Array]):
    """What was found at P positions, padded. NaN in a logprob or scalar where the model gave NaN.

    Attributes:
        token_ids_PK: int32; exact entries, then estimates, then anything.
        logprobs_PK: float32, nats.
        target_logprobs_P: float32, nats; without meaning where nothing follows.
        counts_P2: int32, how many entries are exact, and how many there are; (P, 0) where all K are exact.
        scalars: (P, num_scalars) float32; see the module's docstring.
    """

    token_ids_PK: Array
    logprobs_PK: Array
    target_logprobs_P: Array
    counts_P2: Array
    scalars: Array


class Found(NamedTuple):
    """What was found at P positions, ragged, as NumPy arrays.

    Attributes:
        token_ids_E, logprobs_E: int32, float32 nats; exact entries of a position before estimates.
        offsets_P1: int64, as in `Distributions`.
        num_exact_P: int64.
        target_logprobs_P: float32, nats; without meaning where nothing follows.
        scalars: (P, num_scalars) float32; see the module's docstring.
    """

    token_ids_E: NDArray[np.int32]
    logprobs_E: NDArray[np.float32]
    offsets_P1: NDArray[np.int64]
    num_exact_P: NDArray[np.int64]
    target_logprobs_P: NDArray[np.float32]
    scalars: NDArray[np.float32]

    @classmethod
    def from_padded(cls, selected: Selected[NDArray[Any]]) -> Found:
        """Drop the padding."""
        ids_PK, logprobs_PK, target_ids_P, counts_P2, scalars = selected
        num_positions, k = ids_PK.shape
        if not counts_P2.shape[1]:
            counts_P2 = np.full((num_positions, 2), k, np.int32)
            return cls(ids_PK.reshape(-1), logprobs_PK.reshape(-1), *_offsets(counts_P2), target_ids_P, scalars)
        filled_PK = np.arange(k) < counts_P2[:, 1:]
        return cls(ids_PK[filled_PK], logprobs_PK[filled_PK], *_offsets(counts_P2), target_ids_P, scalars)

    def positions(self, start: int, end: int) -> Found:
        """Views of positions start..end-1."""
        first, last = self.offsets_P1[start], self.offsets_P1[end]
        return Found(
            token_ids_E=self.token_ids_E[first:last],
            logprobs_E=self.logprobs_E[first:last],
            offsets_P1=self.offsets_P1[start : end + 1] - first,
            num_exact_P=self.num_exact_P[start:end],
            target_logprobs_P=self.target_logprobs_P[start:end],
            scalars=self.scalars[start:end],
        )


def record_of(sequence: TokenSequence, selection: SelectionInfo, found: Found) -> Distributions:
    """The record of a sequence, from what was found at its supervised positions.

    Raises:
        TeacherError: a number is NaN: the model overflowed.
    """
    scalars = found.scalars
    if np.isnan(scalars).any():
        raise nan_error(sequence, int(np.isnan(scalars).any(axis=-1).argmax()))
    if selection.kind == "top_k":
        shape = (len(found.offsets_P1) - 1, -1)
        entries = (found.token_ids_E.reshape(shape), found.logprobs_E.reshape(shape))
        distributions = answer(sequence, *entries, found.target_logprobs_P)
    else:
        distributions = _ragged(sequence, selection, found)
        scalars = scalars[:, 1:]
    if selection.entropy:
        distributions = replace(distributions, entropy_P=np.maximum(scalars[:, 0], 0.0))
        scalars = scalars[:, 1:]
    return replace(distributions, log_z_PL=np.ascontiguousarray(scalars)) if selection.temperatures else distributions


def record_of_most_probable(
    sequence: TokenSequence,
    selection: SelectionInfo,
    found: tuple[NDArray[np.integer], NDArray[np.floating], NDArray[np.floating]],
) -> Distributions:
    """The record of `top_k` or `top_p_k`, from an engine that gives the k most probable tokens and their logprobs.

    Args:
        sequence: the one that was asked about.
        selection: what to keep.
        found: token ids (P, K), by falling logprob; logprobs (P, K); target logprobs (P,).

    Raises:
        TeacherError: a logprob is NaN.
    """
    if selection.kind == "top_k":
        return answer(sequence, *found)
    ids_PK, logprobs_PK, target_ids_P = found
    mass_PK = np.cumsum(np.exp(logprobs_PK.astype(np.float64)), axis=-1)
    counts_P = np.minimum(1 + (mass_PK < selection.params["p"]).sum(axis=-1), ids_PK.shape[1])
    tail_P1 = np.clip(1.0 - np.take_along_axis(mass_PK, counts_P[:, None] - 1, axis=-1), 0.0, 1.0)
    entries = (ids_PK.astype(np.int32), logprobs_PK.astype(np.float32), target_ids_P.astype(np.float32))
    counts_P2 = np.stack([counts_P, counts_P], axis=-1)
    return record_of(sequence, selection, Found.from_padded(Selected(*entries, counts_P2, tail_P1.astype(np.float32))))


def concatenate(parts: Sequence[Distributions]) -> Distributions:
    """Join distributions of one selection, in order; without features, which no selection makes."""
    shifts = np.cumsum([0, *(part.num_entries for part in parts)])
    offsets = [part.offsets_P1[1:] + shift for part, shift in zip(parts, shifts[:-1], strict=True)]

    def joined(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    names = [field.name for field in fields(Distributions) if field.name not in ("offsets_P1", "features")]
    return Distributions(**{name: joined(name) for name in names}, offsets_P1=np.concatenate([[0], *offsets]).astype(np.int64))


def _offsets(counts_P2: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    offsets_P1 = np.zeros(len(counts_P2) + 1, np.int64)
    np.cumsum(counts_P2[:, 1], out=offsets_P1[1:])
    return offsets_P1, counts_P2[:, 0].astype(np.int64)


def _ragged(sequence: TokenSequence, selection: SelectionInfo, found: Found) -> Distributions:
    positions_E = np.repeat(np.arange(len(found.num_exact_P)), np.diff(found.offsets_P1))
    nan_E = np.isnan(found.logprobs_E)
    if nan_E.any():
        raise nan_error(sequence, int(positions_E[nan_E.argmax()]))
    order_E = _order(found, positions_E)
    distributions = Distributions(
        token_ids_E=found.token_ids_E[order_E],
        logprobs_E=np.minimum(found.logprobs_E[order_E], 0.0),
        offsets_P1=found.offsets_P1,
        tail_mass_P=np.clip(found.scalars[:, 0], 0.0, 1.0),
        outside_target_logprobs=np.empty(0, np.float32),
        num_exact_P=found.num_exact_P if has_estimates(selection) else None,
    )
    target_ids_P = sequence.target_ids_P
    has_target_P, inside_P, _ = find_targets(distributions, target_ids_P)
    outside = np.minimum(found.target_logprobs_P[has_target_P & ~inside_P], 0.0)
    if np.isnan(outside).any():
        raise nan_error(sequence, int((has_target_P & np.isnan(found.target_logprobs_P)).argmax()))
    return replace(distributions, outside_target_logprobs=outside)


def _order(found: Found, positions_E: NDArray[np.int64]) -> NDArray[np.int64] | slice:
    """The order of a record: position, exact before estimates, falling logprob, rising id. Sorts only where it must."""
    ranks_E = np.arange(len(positions_E)) - found.offsets_P1[positions_E]
    is_estimate_E = ranks_E >= found.num_exact_P[positions_E]
    ids_E, logprobs_E = found.token_ids_E, found.logprobs_E
    same_E = (positions_E[1:] == positions_E[:-1]) & (is_estimate_E[1:] == is_estimate_E[:-1])
    falls_E = (logprobs_E[:-1] > logprobs_E[1:]) | ((logprobs_E[:-1] == logprobs_E[1:]) & (ids_E[:-1] < ids_E[1:]))
    if (falls_E | ~same_E).all():
        return slice(None)
    return np.lexsort((ids_E, -logprobs_E, is_estimate_E, positions_E))
