"""Inner states inside vLLM's worker: the vectors of a group's positions, on their way from the step to the host.

They travel in the model's own dtype, so nothing is rounded here. Pooled ones are pooled here and travel as one vector per
sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.format.feature_positions import feature_positions
from kdcache.format.manifest import FeatureInfo
from kdcache.teacher.features import HIDDEN, LAST, Source, source_of
from kdcache.teacher.vllm.wire import TARGET_IDS, Wanted, pack_feature, unpack_request

MOST_OFF = 0.02
"""The most, relative, that the states which the output projection takes may differ in the proof from the last layer's after the
final norm. Half precision rounds; a wrong layer is off by about 1."""


class _Arrived(NamedTuple):
    """Vectors of one feature on their way to the host."""

    name: str
    index_F: NDArray[np.int64]
    values_FW: Tensor


class GroupFeatures:
    """The inner states of one group's positions, from `begin` until they are fetched."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        """Empty; memory is allocated when the first vectors come and show their dtype.

        Args:
            asked: see `wire.pack_asked`.
        """
        self._features = [msgspec.convert(feature, FeatureInfo) for feature in asked["features"]]
        self._bounds: dict[str, list[int]] = dict(zip([f.name for f in self._features], asked["bounds"], strict=True))
        self._proves, self._directly = bool(asked["proves"]), bool(asked["directly"])
        self._vectors: dict[str, NDArray[Any]] = {}
        self._filled = {name: np.zeros(bounds[-1], np.bool_) for name, bounds in self._bounds.items()}
        self._arrived: list[_Arrived] = []
        self._seen: Any = None
        self._sources = {source_of(feature) for feature in self._features}

    def watch(self, seen: Any) -> None:
        """Watch what is inside the model, through `SeenLayers`, or through None where nothing is watched."""
        self._seen = seen
        if seen is not None:
            seen.wanted = frozenset(self._sources - {(HIDDEN, LAST)})
            seen.wants_normed = self._proves
            seen.run_directly(self._directly)
            seen.states, seen.normed = {}, None

    def take(self, hidden: Tensor, spans: Iterable[Any], chunk: int) -> None:
        """Start the wanted states of a step on their way to the host, a chunk of positions at a time.

        Args:
            hidden: (tokens of the step or more, H), what the output projection takes.
            spans: those of the step.
            chunk: the most positions that are copied at once.

        Raises:
            RuntimeError: a layer did not run on all tokens of the step at once, or the proof fails.
        """
        wanted = [(span, unpack_request(span.extra_args)) for span in spans if TARGET_IDS in span.extra_args]
        if not wanted:
            return
        states = self._states_of(hidden)
        for feature in self._features:
            parts = [self._indices(feature, span, request) for span, request in wanted]
            step_F, group_F = (np.concatenate(each) for each in zip(*parts, strict=True))
            for here in np.array_split(np.arange(len(step_F)), -(-len(step_F) // chunk) or 1):
                if len(here):
                    self._send(feature, states[source_of(feature)], step_F[here], group_F[here])

    def settle(self) -> None:
        """Write what has arrived; of a position that is written twice the last one stays."""
        for name, index_F, values_FW in self._arrived:
            values = _as_numpy(values_FW)
            if name not in self._vectors:
                self._vectors[name] = np.zeros((self._bounds[name][-1], values.shape[1]), values.dtype)
            self._vectors[name][index_F] = values
            self._filled[name][index_F] = True
        self._arrived = []

    def unwatch(self) -> None:
        """Stop watching layers."""
        if self._seen is not None:
            self._seen.wanted, self._seen.wants_normed = frozenset(), False
            self._seen.run_directly(False)
            self._seen.states, self._seen.normed = {}, None

    def pack(self) -> list[Any]:
        """What is wrong or None, then one for each feature, in their order; see `wire.pack_feature`."""
        missing = [name for name, filled in self._filled.items() if not filled.all()]
        if missing:
            return [f"the engine's worker never computed {int((~self._filled[missing[0]]).sum())} vectors of {missing[0]!r}"]
        packed = []
        for feature in self._features:
            nothing = np.zeros((0, feature.full_size), np.float32)
            packed.append(pack_feature(feature, self._vectors.get(feature.name, nothing), self._bounds[feature.name]))
        return [None, *packed]

    def _states_of(self, hidden: Tensor) -> dict[Source, Tensor]:
        seen = {} if self._seen is None else self._seen.states
        states = {**seen, (HIDDEN, LAST): hidden}
        for source in sorted(self._sources):
            if source not in states or len(states[source]) < len(hidden):
                kind, layer = source
                what = f"layer {layer}" if kind == HIDDEN else f"the {kind} of layer {layer}"
                raise RuntimeError(f"{what} was not seen on all {len(hidden)} tokens of a step")
        if self._proves:
            check_normed(None if self._seen is None else self._seen.normed, hidden)
        if self._seen is not None:
            self._seen.states = {}
        return states

    def _indices(self, feature: FeatureInfo, span: Any, request: Wanted) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of a span, the feature's positions among the step's tokens, and among the group's vectors."""
        positions = feature_positions(feature, request.supervised_N)
        first, end = np.searchsorted(positions, [span.position, span.position + span.length])
        start = self._bounds[feature.name][request.which]
        return span.start + positions[first:end] - span.position, start + np.arange(first, end)

    def _send(self, feature: FeatureInfo, state: Tensor, step_F: NDArray[np.int64], group_F: NDArray[np.int64]) -> None:
        index_F = torch.from_numpy(step_F).to(state.device, non_blocking=True)
        self._arrived.append(_Arrived(feature.name, group_F, state[index_F].to("cpu", non_blocking=True)))
        if state.device.type == "cpu":
            self.settle()


def check_normed(normed: Tensor | None, hidden: Tensor) -> None:
    """Raise RuntimeError unless the last layer's state, as we take it, gives after the final norm what is projected.

    Then the layers before it are taken correctly too.
    """
    if normed is None:
        raise RuntimeError("the last decoder layer was not seen")
    expected = hidden.float()
    difference = normed[: len(hidden)].float() - expected
    off = float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(expected).clamp_min(1e-30))
    if not off <= MOST_OFF:
        raise RuntimeError(f"what its last layer gives is not what the final norm takes: after it they differ by {off:.2g}")


def _as_numpy(state_CH: Tensor) -> NDArray[Any]:
    """The states as NumPy arrays; bfloat16, which NumPy lacks, as its bits in uint16."""
    if state_CH.dtype == torch.bfloat16:
        return state_CH.contiguous().view(torch.int16).numpy().view(np.uint16)
    return (state_CH if state_CH.dtype == torch.float16 else state_CH.float()).numpy()
