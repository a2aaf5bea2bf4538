"""A second proof of a cache's alignment, without its teacher: stored states through the stored output projection must give the
stored logprobs. A state at the wrong position, of the wrong layer or of another model does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdcache.codec import get_codec
from kdcache.codec.features.constants import NOTHING
from kdcache.errors import CorruptCacheError
from kdcache.format.feature_positions import feature_positions
from kdcache.format.identity import FeatureInfo
from kdcache.format.manifest import Manifest
from kdcache.format.output_projection import OUTPUT_PROJECTION, OutputProjection, as_float32
from kdcache.format.record import SequenceRecord
from kdcache.store.reader import CacheReader

MOST_POSITIONS = 64
"""Looked at, spread over the cache: each takes a product with the whole projection."""

_CHUNK = 8192
"""Lines of the projection that are float32 at once."""
_ENGINE_NATS, _ENGINE_NATS_COARSE = {"float32": 1e-3, "float16": 0.02}, 0.1
"""Allowed for the teacher's own arithmetic, in the mean: it made its logits in its dtype, these are made in float32."""


@dataclass(frozen=True)
class StatesProof:
    """Stored logprobs against those that stored states give.

    Attributes:
        feature: the name of the states.
        num_positions: compared.
        difference: mean of |stored - recomputed| over exact entries, nats.
        moved: the same with each state moved to the next position that is compared: what a wrong one would give.
        allowed: difference that the rounding of states and entries and the teacher's arithmetic explain.
    """

    feature: str
    num_positions: int
    difference: float
    moved: float
    allowed: float

    @property
    def problem(self) -> str | None:
        """A sentence where the states are not those of the logprobs."""
        if self.difference <= min(self.allowed, self.moved / 2):
            return None
        return (
            f"feature {self.feature!r}: through the output projection its states give logprobs that are {self.difference:.3g} "
            f"nats from the stored ones (allowed: {self.allowed:.3g}), and {self.moved:.3g} moved by a position: "
            "they do not belong to them"
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
    allowed = _Rounding(reader, feature, projection).allowed(states_PH, ids, logprobs)
    return StatesProof(feature.name, len(found), difference, moved if len(found) > 1 else np.inf, allowed)


class _Rounding:
    """How far apart stored logprobs and those made of stored states may be."""

    def __init__(self, reader: CacheReader, feature: FeatureInfo, projection: OutputProjection) -> None:
        identity = reader.manifest.identity
        self._feature, self._projection = feature, projection
        self._constants = reader.constants().get(feature.name, NOTHING)
        self._codec = get_codec(identity.codec.codec_id, identity.codec.params, identity.selection)
        self._engine = _ENGINE_NATS.get(identity.teacher.dtype, _ENGINE_NATS_COARSE)

    def allowed(
        self, states_PH: NDArray[np.float32], ids: list[NDArray[np.int32]], logprobs: list[NDArray[np.float32]]
    ) -> float:
        """Nats, in the mean over entries."""
        off_E = np.concatenate([self._of_states(state_H, one) for state_H, one in zip(states_PH, ids, strict=True)])
        of_codec_E = self._codec.max_error_nats(np.concatenate(logprobs))
        return self._engine + (float((off_E + of_codec_E).mean()) if len(off_E) else 0.0)

    def _of_states(self, state_H: NDArray[np.float32], ids: NDArray[np.int32]) -> NDArray[np.float64]:
        """Three standard deviations of a logprob whose state is rounded, of each entry."""
        weight = as_float32(self._projection.weight_VH[ids]).astype(np.float64)
        deviations = np.sqrt(np.square(weight * self._steps(state_H)).sum(axis=-1) / 12)
        return 3 * 2**0.5 * abs(self._projection.logit_scale) * deviations

    def _steps(self, state_H: NDArray[np.float32]) -> NDArray[np.float64]:
        """(H,) how far apart the numbers are that a state's are rounded to."""
        size_H = np.abs(state_H).astype(np.float64)
        if self._feature.dtype != "int8":
            return size_H * (2.0**-10 if self._feature.dtype == "float16" else 2.0**-7)
        mean_H, scale_H = self._constants.mean_H, self._constants.scale_H
        if mean_H is None or scale_H is None:
            return np.full_like(size_H, size_H.max() / 127)
        return max(1.0, float((np.abs(state_H - mean_H) / scale_H).max())) * scale_H.astype(np.float64) / 127


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
