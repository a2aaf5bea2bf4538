"""What a model's layers, heads, neurons and channels do with some text, summed up so that a student can be cut from it.

Everything kept is a sum over positions or sequences, so what several units or ranks have seen is added. Formulas:

- block influence of a layer (ShortGPT, arXiv 2403.03853): 1 - cos(state before, state after), mean over positions;
- angular distance of two depths (arXiv 2403.17887): arccos(cos) / pi at the last token, mean over sequences;
- activations of heads, neurons and channels (Minitron, arXiv 2407.14679, as NVIDIA's Model Optimizer aggregates them): |x|,
  mean over a sequence's tokens, L2 over sequences. Kept are the sums of squares; `importance` takes roots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.errors import ConfigError
from kdcache.teacher.features import find_decoder
from kdcache.teacher.hf.axes import Axes, axes_of, input_axis

Statistics = dict[str, NDArray[Any]]
"""By name, all sums:

- `num_sequences`, `num_positions` (1,) int64;
- `block_influence` (layers,) and `angles` (layers + 1, layers + 1) float64;
- `attention` (layers, heads x head size), `neurons` (layers, neurons), `channels` (norms, hidden size) float64, each
  left out where the model has no such thing; zeros for a layer that has none.
"""


class ActivationWatch:
    """Watches a model of transformers while it is open; `texts` says what a forward reads.

    with ActivationWatch(model) as watch:
        with watch.texts([12, 7]):
            model(input_ids=ids_BT)
    statistics = watch.statistics()
    """

    def __init__(self, model: Any, axes: Axes | None = None) -> None:
        """Find what is to be watched.

        Args:
            model: in evaluation mode.
            axes: of its weights; None finds them, or leaves widths out where they cannot be found.

        Raises:
            ConfigError: the layers are not found.
        """
        self._layers = _layers_of(model)
        self._axes = _axes_or_none(model) if axes is None else axes
        # Norms over queries and keys lie deeper, in the attention.
        self._norms = [
            (at, norm)
            for at, layer in enumerate(self._layers)
            for norm in layer.children()
            if "norm" in type(norm).__name__.lower()
        ]
        self._names = {id(module): name for name, module in model.named_modules()}
        self._texts: _Texts | None = None
        self._sums: dict[str, Tensor] = {}
        self._num_sequences = self._num_positions = 0
        self._handles: list[Any] = []

    def __enter__(self) -> ActivationWatch:
        for at, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_hook(self._see_layer(at), with_kwargs=True))
            for name, index, module in self._watched(at, layer):
                self._handles.append(module.register_forward_hook(self._see_activations(name, index), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def texts(self, lengths: Sequence[int]) -> Iterator[None]:
        """Say which texts the forwards inside read: tokens of each, padding on the right; one forward, or several in chunks."""
        self._texts = _Texts(lengths)
        try:
            yield
            self._add_up(self._texts)
        finally:
            self._texts = None

    def statistics(self) -> Statistics:
        """What was seen so far."""
        counts = {"num_sequences": self._num_sequences, "num_positions": self._num_positions}
        return {name: np.array([count], np.int64) for name, count in counts.items()} | {
            name: total.numpy().copy() for name, total in sorted(self._sums.items())
        }

    def _watched(self, at: int, layer: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
        """(sum, index in it, module) of the projections and norms of a layer."""
        yield from (("channels", index, norm) for index, (owner, norm) in enumerate(self._norms) if owner == at)
        if self._axes is None:
            return
        for name, read in (("attention", "is_heads"), ("neurons", "is_neurons")):
            if read == "is_heads" and not self._axes.are_heads_apart:
                continue
            found = [module for module in layer.modules() if self._gives_hidden(module, read)]
            if len(found) == 1:
                yield name, at, found[0]

    def _gives_hidden(self, module: nn.Module, read: str) -> bool:
        weight = f"{self._names[id(module)]}.weight"
        if self._axes is None or weight not in self._axes.of_weight:
            return False
        both = input_axis(module, self._axes.of_weight[weight])
        return both is not None and both[1].is_hidden and getattr(both[0], read)

    def _see_layer(self, at: int) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if self._texts is not None:
                before = args[0] if args else kwargs["hidden_states"]
                self._texts.see_layer(at, len(self._layers), before, output if isinstance(output, Tensor) else output[0])

        return hook

    def _see_activations(self, name: str, index: int) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if self._texts is not None:
                # A projection is watched for what it reads, a norm for what it gives.
                seen = output if name == "channels" else (args[0] if args else next(iter(kwargs.values())))
                self._texts.see_activations((name, index), seen)

        return hook

    def _add_up(self, texts: _Texts) -> None:
        num_layers = len(self._layers)
        self._add("block_influence", (num_layers,), slice(None), texts.influence(num_layers))
        self._add("angles", (num_layers + 1, num_layers + 1), slice(None), texts.angles())
        for (name, index), squares in texts.squares().items():
            length = len(self._norms) if name == "channels" else num_layers
            self._add(name, (length, len(squares)), index, squares)
        self._num_sequences += len(texts.lengths)
        self._num_positions += sum(texts.lengths)

    def _add(self, name: str, shape: tuple[int, ...], at: Any, values: Tensor) -> None:
        self._sums.setdefault(name, torch.zeros(shape, dtype=torch.float64))[at] += values


class _Texts:
    """What is seen of the texts of one batch, in one forward or in chunks."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.activations: dict[tuple[str, int], Tensor] = {}
        self._start = self._end = 0
        self._influence: dict[int, float] = {}
        self._last: dict[int, list[Tensor | None]] = {}

    def see_layer(self, at: int, num_layers: int, before_BTH: Tensor, after_BTH: Tensor) -> None:
        """Note what a layer does with the states of the tokens that are there."""
        if at == 0:
            self._start, self._end = self._end, self._end + before_BTH.shape[1]
        is_there_BT = self._is_there(before_BTH)
        cos_BT = _cos(before_BTH.float(), after_BTH.float())
        turned = float((1.0 - cos_BT.double())[is_there_BT].sum())
        self._influence[at] = self._influence.get(at, 0.0) + turned
        self._keep_last(at, before_BTH)
        if at == num_layers - 1:
            self._keep_last(num_layers, after_BTH)

    def see_activations(self, key: tuple[str, int], values: Tensor) -> None:
        """Add up |x| over the tokens that are there."""
        seen = (values.float().abs() * self._is_there(values)[..., None]).sum(dim=1, dtype=torch.float32)
        before = self.activations.get(key)
        self.activations[key] = seen if before is None else before + seen

    def influence(self, num_layers: int) -> Tensor:
        """(layers,) sums over positions of 1 - cos."""
        return torch.tensor([self._influence.get(at, 0.0) for at in range(num_layers)], dtype=torch.float64)

    def angles(self) -> Tensor:
        """(layers + 1, layers + 1) sums over sequences of the angles between depths at the last token, as shares of pi."""
        depths = [torch.stack([v for v in self._last[at] if v is not None]) for at in sorted(self._last)]
        states = torch.stack(depths, dim=1).double()
        states = states / states.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        cos = (states @ states.transpose(1, 2)).clamp(-1.0, 1.0)
        between = torch.arccos(cos) / math.pi
        return (between * (1 - torch.eye(len(depths), dtype=torch.float64))).sum(dim=0)

    def squares(self) -> dict[tuple[str, int], Tensor]:
        """Per sum: (width,) over sequences, the square of the mean of |x|."""
        lengths_B1 = torch.tensor(self.lengths, dtype=torch.float64)[:, None]
        return {key: ((seen.double().cpu() / lengths_B1) ** 2).sum(dim=0) for key, seen in self.activations.items()}

    def _is_there(self, values: Tensor) -> Tensor:
        positions_T = torch.arange(self._start, self._start + values.shape[1], device=values.device)
        return positions_T[None] < torch.tensor(self.lengths, device=values.device)[:, None]

    def _keep_last(self, depth: int, states_BTH: Tensor) -> None:
        kept = self._last.setdefault(depth, [None] * len(self.lengths))
        for b, length in enumerate(self.lengths):
            if self._start < length <= self._end:
                kept[b] = states_BTH[b, length - 1 - self._start].float().cpu()


def added(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> Statistics:
    """What two captures of the same model have seen, together."""
    return {name: one[name] + other[name] for name in one if name in other}


def block_influence(statistics: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """(layers,) 0 for a layer that leaves the states' directions alone, up to 2."""
    return statistics["block_influence"] / statistics["num_positions"][0]


def angular_distances(statistics: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """(layers + 1, layers + 1) mean angle between the states at two depths, as a share of pi."""
    return statistics["angles"] / statistics["num_sequences"][0]


def importance(statistics: Mapping[str, NDArray[Any]], name: str) -> NDArray[np.float64]:
    """The L2 norm over sequences of one kind of activations, in the shape of its sums."""
    return np.sqrt(statistics[name])


def _cos(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp_min(1e-30)


def _layers_of(model: Any) -> Any:
    found = find_decoder(model, int(model.config.get_text_config().num_hidden_layers))
    if found is None:
        raise ConfigError(f"the layers of {type(model).__name__} are not found, so what they do cannot be measured")
    return found[1]


def _axes_or_none(model: Any) -> Axes | None:
    try:
        return axes_of(model)
    except ConfigError:
        return None
