"""Hidden states inside vLLM's worker: the rows of a group's positions, on their way from the step to the host.

They travel in the model's own dtype, so nothing is rounded here; pooled ones are pooled here and travel as a row per sequence.

Shape letters: X rows of a step, C positions of a chunk, P rows (supervised positions) of the group, H hidden.
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
"""In the proof, relative: between the states that the output projection takes and what the final norm makes of the last
layer's. Half precision rounds; what is wrong is off by about 1."""


class GroupFeatures:
    """The hidden states of one group's positions, from `begin` until they are fetched."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        """Room for the rows is made when the first of them come, and with them their dtype.

        Args:
            asked: see `wire.pack_asked`.
        """
        self._features = [msgspec.convert(feature, FeatureInfo) for feature in asked["features"]]
        self._bounds: list[int] = asked["bounds"]
        self._last: int = asked["num_layers"]
        self._proves: bool = asked["proves"]
        self._rows: dict[int, NDArray[Any]] = {}
        self._seen: Any = None
        self._layers = layers_of(self._features)

    def watch(self, seen: Any) -> None:
        """Have the layers before the last seen; `SeenLayers`, or None where none are watched."""
        self._seen = seen
        if seen is not None:
            seen.wanted = frozenset(layer for layer in self._layers if layer < self._last)
            seen.wants_normed = self._proves
            seen.states, seen.normed = {}, None

    def states_of(self, hidden_XH: Tensor) -> dict[int, Tensor]:
        """(X or more, H) of each layer in this step.

        Raises:
            RuntimeError: a layer did not run on all rows of the step at once; or the proof fails.
        """
        states = {**(self._seen.states if self._seen is not None else {}), self._last: hidden_XH}
        for layer in self._layers:
            if layer not in states or len(states[layer]) < len(hidden_XH):
                raise RuntimeError(f"layer {layer} was not seen on all {len(hidden_XH)} rows of a step")
        if self._proves:
            check_normed(None if self._seen is None else self._seen.normed, hidden_XH)
        if self._seen is not None:
            self._seen.states = {}
        return {layer: states[layer] for layer in self._layers}

    def write(self, rows_C: NDArray[np.int64], states: Mapping[int, Tensor]) -> None:
        """The states (C, H) of some rows, on the host; a row that is written twice keeps what came last."""
        for layer, state_CH in states.items():
            values_CH = _numbers(state_CH)
            if layer not in self._rows:
                self._rows[layer] = np.zeros((self._bounds[-1], values_CH.shape[1]), values_CH.dtype)
            self._rows[layer][rows_C] = values_CH

    def unwatch(self) -> None:
        """Have no layer seen any more."""
        if self._seen is not None:
            self._seen.wanted, self._seen.wants_normed = frozenset(), False
            self._seen.states, self._seen.normed = {}, None

    def pack(self) -> list[Any]:
        """One for each feature, in their order; see `wire.pack_feature`. That each row was written is the buffer's to
        say."""
        nothing_PH = np.zeros((self._bounds[-1], self._features[0].size), np.float32)
        return [pack_feature(feature, self._rows.get(feature.layer, nothing_PH), self._bounds) for feature in self._features]


def take_rows(states: Mapping[int, Tensor], places_C: NDArray[np.int64]) -> dict[int, Tensor]:
    """The rows of some places, on the host, or on their way there."""
    taken = {}
    for layer, state_XH in states.items():
        index_C = torch.from_numpy(places_C).to(state_XH.device, non_blocking=True)
        taken[layer] = state_XH[index_C].to("cpu", non_blocking=True)
    return taken


def check_normed(normed_XH: Tensor | None, hidden_XH: Tensor) -> None:
    """Raise RuntimeError unless the last decoder layer's state, as we take it from the layer, behind the final norm is what the
    output projection takes: then the layers before it are taken rightly too."""
    if normed_XH is None:
        raise RuntimeError("the last decoder layer was not seen")
    expected_XH = hidden_XH.float()
    difference_XH = normed_XH[: len(hidden_XH)].float() - expected_XH
    off = float(torch.linalg.vector_norm(difference_XH) / torch.linalg.vector_norm(expected_XH).clamp_min(1e-30))
    if not off <= MOST_OFF:
        raise RuntimeError(f"what its last layer gives is not what the final norm takes: behind it they are {off:.2g} apart")


def _numbers(state_CH: Tensor) -> NDArray[Any]:
    """As NumPy has them: of bfloat16, which it has not, the bits as uint16."""
    if state_CH.dtype == torch.bfloat16:
        return state_CH.contiguous().view(torch.int16).numpy().view(np.uint16)
    return (state_CH if state_CH.dtype == torch.float16 else state_CH.float()).numpy()
