"""A second proof of a cache's alignment, without its teacher: stored states through the stored output projection must give the
stored logprobs. A state at the wrong position, of the wrong layer or of another model does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError
from kdcache.format.feature_positions import feature_positions
from kdcache.format.identity import FeatureInfo
from kdcache.format.manifest import Manifest
from kdcache.format.output_projection import OUTPUT_PROJECTION, OutputProjection
from kdcache.format.record import SequenceRecord
from kdcache.store.reader import CacheReader

MOST_POSITIONS = 64
"""Looked at, spread over the cache: each takes a product with the whole projection."""

_CHUNK = 8192
"""Lines of the projection that are float32 at once."""
_FLOOR_NATS = 0.05
"""What rounding may move a logprob by, whatever the teacher: below it nothing is wrong."""


@dataclass(frozen=True)
class StatesProof:
    """Stored logprobs against those that stored states give.

    Attributes:
        feature: the name of the states.
        num_positions: compared.
        difference: mean of |stored - recomputed| over exact entries, nats.
        moved: the same with each state moved to the next position that is compared: what a wrong one would give.
    """

    feature: str
    num_positions: int
    difference: float
    moved: float

    @property
    def problem(self) -> str | None:
        """A sentence where the states are not those of the logprobs."""
        if self.difference <= max(_FLOOR_NATS, self.moved / 2):
            return None
        return (
            f"feature {self.feature!r}: through the output projection its states give logprobs that are {self.difference:.3g} "
            f"nats from the stored ones, and {self.moved:.3g} where they are moved by a position: they do not belong to them"
        )


def prove_states(reader: CacheReader) -> StatesProof | None:
    """Compare a sample of a cache's positions; None where it has no states after the final norm, or no output projection.

    Raises:
        CorruptCacheError: a record or the sidecar is damaged.
    """
    feature = _states_of(reader.manifest)
    if feature is None:
        return None
    found = list(_sample(reader, feature))
    if not found:
        return None
    projection = OutputProjection.from_arrays(reader.sidecar(OUTPUT_PROJECTION))
    shape = reader.manifest.identity.teacher.vocab_size, feature.size
    if projection.weight_VH.shape != shape:
        raise CorruptCacheError(
            f"sidecar {OUTPUT_PROJECTION!r}: its weight has the shape {projection.weight_VH.shape}, expected {shape}"
        )
    states_PH = np.stack([state for state, _, _ in found])
    moved_PH = np.roll(states_PH, 1, axis=0)
    ids, logprobs = [ids for _, ids, _ in found], [logprobs for _, _, logprobs in found]
    difference, moved = (_difference(projection, states, ids, logprobs) for states in (states_PH, moved_PH))
    return StatesProof(feature.name, len(found), difference, moved if len(found) > 1 else np.inf)


def _states_of(manifest: Manifest) -> FeatureInfo | None:
    """Whole vectors after the final norm, those with the finest numbers first."""
    if all(sidecar.name != OUTPUT_PROJECTION for sidecar in manifest.sidecars) or manifest.identity.selection.filters:
        return None
    fitting = [
        feature
        for feature in manifest.identity.features
        if feature.kind == "hidden" and feature.layer == -1 and feature.pooling == "none" and feature.projection is None
    ]
    return min(fitting, key=lambda feature: ("float16", "bfloat16", "int8").index(feature.dtype), default=None)


def _sample(
    reader: CacheReader, feature: FeatureInfo
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]]:
    """State, ids and logprobs of exact entries at some positions, a few of each of some sequences."""
    candidates = np.flatnonzero(reader.num_positions_S > 0)
    chosen = np.unique(candidates[np.linspace(0, max(len(candidates) - 1, 0), 16).astype(int)]) if len(candidates) else []
    for index in chosen:
        yield from _positions_of(reader[int(index)], feature, -(-MOST_POSITIONS // len(chosen)))


def _positions_of(
    record: SequenceRecord, feature: FeatureInfo, most: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]]:
    d, supervised_N = record.distributions, record.sequence.supervised_N
    positions_F = feature_positions(feature, supervised_N)
    exact_P = d.num_entries_P if d.num_exact_P is None else d.num_exact_P
    p_of_N = np.cumsum(supervised_N) - 1
    usable = [f for f, t in enumerate(positions_F.tolist()) if supervised_N[t] and exact_P[p_of_N[t]] > 0]
    for f in usable[:: max(1, len(usable) // most)][:most]:
        p = int(p_of_N[positions_F[f]])
        entries = slice(int(d.offsets_P1[p]), int(d.offsets_P1[p] + exact_P[p]))
        finite = np.isfinite(d.logprobs_E[entries])
        yield d.features[feature.name][f], d.token_ids_E[entries][finite], d.logprobs_E[entries][finite]


def _difference(
    projection: OutputProjection,
    states_PH: NDArray[np.float32],
    ids: list[NDArray[np.int32]],
    logprobs: list[NDArray[np.float32]],
) -> float:
    """Mean over entries of |stored - recomputed|, the projection taken a part at a time."""
    log_z_P = np.full(len(states_PH), -np.inf)
    of_P = np.repeat(np.arange(len(ids)), [len(one) for one in ids])
    ids_E, stored_E = np.concatenate(ids), np.concatenate(logprobs)
    logits_E = np.zeros(len(ids_E))
    bias_V = projection.bias_V
    for start in range(0, len(projection.weight_VH), _CHUNK):
        here = slice(start, start + _CHUNK)
        part = replace(projection, weight_VH=projection.weight_VH[here], bias_V=None if bias_V is None else bias_V[here])
        logits_PC = part.logits(states_PH).astype(np.float64)
        log_z_P = np.logaddexp(log_z_P, np.logaddexp.reduce(logits_PC, axis=1))
        is_here_E = (ids_E >= start) & (ids_E < start + logits_PC.shape[1])
        logits_E[is_here_E] = logits_PC[of_P[is_here_E], ids_E[is_here_E] - start]
    off_E = np.abs(logits_E - log_z_P[of_P] - stored_E)
    return float(off_E.mean()) if len(off_E) else 0.0
