"""Hidden states inside vLLM's worker: the vectors of a group's positions, on their way from the step to the host.

They travel in the model's own dtype, so nothing is rounded here. Pooled ones are pooled here and travel as one vector per
sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.format.manifest import FeatureInfo
from kdcache.teacher.features import layers_of
from kdcache.teacher.vllm.wire import pack_feature

MOST_OFF = 0.02
"""The most, relative, that the states which the output projection takes may differ in the proof from the last layer's after the
final norm. Half precision rounds; a wrong layer is off by about 1."""


class GroupFeatures:
    """The hidden states of one group's positions, from `begin` until they are fetched."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        """Empty; memory is allocated when the first vectors come and show their dtype.

        Args:
            asked: see `wire.pack_asked`.
        """
        self._features = [msgspec.convert(feature, FeatureInfo) for feature in asked["features"]]
        self._bounds: list[int] = asked["bounds"]
        self._last: int = asked["num_layers"]
        self._proves: bool = asked["proves"]
        self._vectors: dict[int, NDArray[Any]] = {}
        self._seen: Any = None
        self._layers = layers_of(self._features)

    def watch(self, seen: Any) -> None:
        """Watch the layers before the last, through `SeenLayers`, or through None where none are watched."""
        self._seen = seen
        if seen is not None:
            seen.wanted = frozenset(layer for layer in self._layers if layer < self._last)
            seen.wants_normed = self._proves
            seen.states, seen.normed = {}, None

    def states_of(self, hidden: Tensor) -> dict[int, Tensor]:
        """The states (tokens of the step or more, H) of each layer in this step.

        Raises:
            RuntimeError: a layer did not run on all tokens of the step at once, or the proof fails.
        """
        states = {**(self._seen.states if self._seen is not None else {}), self._last: hidden}
        for layer in self._layers:
            if layer not in states or len(states[layer]) < len(hidden):
                raise RuntimeError(f"layer {layer} was not seen on all {len(hidden)} tokens of a step")
        if self._proves:
            check_normed(None if self._seen is None else self._seen.normed, hidden)
        if self._seen is not None:
            self._seen.states = {}
        return {layer: states[layer] for layer in self._layers}

    def write(self, group_index_C: NDArray[np.int64], states: Mapping[int, Tensor]) -> None:
        """Keep the states (C, H) of some positions, on the host; of a position that is written twice the last one stays."""
        for layer, state_CH in states.items():
            values_CH = _as_numpy(state_CH)
            if layer not in self._vectors:
                self._vectors[layer] = np.zeros((self._bounds[-1], values_CH.shape[1]), values_CH.dtype)
            self._vectors[layer][group_index_C] = values_CH

    def unwatch(self) -> None:
        """Stop watching layers."""
        if self._seen is not None:
            self._seen.wanted, self._seen.wants_normed = frozenset(), False
            self._seen.states, self._seen.normed = {}, None

    def pack(self) -> list[Any]:
        """One for each feature, in their order; see `wire.pack_feature`. The buffer says whether each position was written."""
        nothing_PH = np.zeros((self._bounds[-1], self._features[0].size), np.float32)
        return [pack_feature(feature, self._vectors.get(feature.layer, nothing_PH), self._bounds) for feature in self._features]


def take_at(states: Mapping[int, Tensor], step_index_C: NDArray[np.int64]) -> dict[int, Tensor]:
    """The states at some tokens of the step, on the host or on their way there."""
    taken = {}
    for layer, state in states.items():
        index_C = torch.from_numpy(step_index_C).to(state.device, non_blocking=True)
        taken[layer] = state[index_C].to("cpu", non_blocking=True)
    return taken


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
