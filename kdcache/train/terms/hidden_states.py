"""The term `hidden_states`: a layer of the student is brought near to a layer of the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdcache.errors import ConfigError
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.identity import FeatureInfo
from kdcache.format.manifest import Manifest
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.states.vectors import VECTOR_LOSSES, vector_loss
from kdcache.train.terms.base import Needs, Setting, StudentStates, Term
from kdcache.train.terms.vectors import (
    COUNTED,
    check_choice,
    check_kind,
    check_pooled,
    check_whole,
    feature_of,
    features_of_kind,
    generator_for,
    has_position_S,
    pooled_vectors,
    vectors_of,
    weights_of,
)

_NAME = "hidden_states"
_PROJECTORS = ("auto", "linear", "none")
_MOST_ELEMENTS = 1 << 24
"""Of the teacher's vectors in float32 at once, 64 MiB: stored ones are half or a quarter of that."""


class HiddenStatesTerm(Term):
    """The distance of a layer's hidden states from the teacher's: cosine, mean square, or relative to their size.

    The mean over positions; over sequences where the feature is pooled.

    Several pairs of layers share one projector, and their mean is the term's: with `balance: equal` that is ModelOpt's recipe.
    Pairs with projectors of their own are terms of their own.

    Args:
        feature: name of the cache's feature, of kind `hidden`, or a list of names.
        layer: of the student: 0 the embeddings, i after layer i, the last one before the final norm, -1 after it; or a list,
            one for each feature.
        loss: `cosine`, `mse`, `relative_mse` or `normalized_mse`, see `vector_loss`.
        projector: `linear`: a learned linear map from the student's size to that of the stored vectors, thrown away at the end;
            `none`; `auto`: `linear` where the sizes differ.
        positions: `supervised`: by the weights of the positions; `all`: every position that has a vector counts 1.
    """

    needed = "a feature of kind `hidden`"

    def __init__(
        self,
        *,
        feature: str | Sequence[str],
        layer: int | Sequence[int] = -1,
        loss: str = "cosine",
        projector: str = "auto",
        positions: str = "supervised",
    ) -> None:
        super().__init__()
        features = (feature,) if isinstance(feature, str) else tuple(feature)
        layers = (layer,) if isinstance(layer, int) else tuple(layer)
        if len(features) != len(layers) or not features:
            raise ConfigError(
                f"feature names {len(features)} of the cache's features and layer {len(layers)} of the student's layers; "
                "they are paired, so give one layer for each feature"
            )
        for one in layers:
            check_whole("layer", one, least=-1)
        check_choice("loss", loss, VECTOR_LOSSES)
        check_choice("projector", projector, _PROJECTORS)
        check_choice("positions", positions, COUNTED)
        self.pairs = tuple(zip(features, layers, strict=True))
        self.loss, self.projector, self.positions = loss, projector, positions
        self.reads_weights = positions != "all"
        self.map: Projector | None = None

    @classmethod
    def examples(cls, manifest: Manifest) -> Iterable[dict[str, Any]]:
        """One for each feature of hidden states."""
        names = [name for pooling in (False, True) for name in features_of_kind(manifest, "hidden", is_pooled=pooling)]
        return [{"feature": name} for name in names] or [{"feature": "hidden_last"}]

    def needs(self) -> Needs:
        """The features and the student's layers."""
        features, layers = zip(*self.pairs, strict=True)
        return Needs(features=features, layers=layers)

    def check(self, manifest: Manifest) -> None:
        """Refuse a feature that was not captured, is of another kind or pooled over some positions, and several unlike ones."""
        infos = [feature_of(manifest, name, _NAME) for name, _ in self.pairs]
        for info in infos:
            check_kind(info, "hidden", _NAME)
            if info.pooling != "none":
                check_pooled(info, _NAME)
        self._find_weights(infos[0])
        other = next((info for info in infos if _form(info) != _form(infos[0])), None)
        if other is not None:
            raise ConfigError(
                f"loss term {_NAME!r} compares several layers with one projector, but features {infos[0].name!r} and "
                f"{other.name!r} have other sizes or positions; give each a term of its own"
            )

    def set_up(self, setting: Setting) -> None:
        """Make the projector.

        Raises:
            ConfigError: `projector: none` between other sizes.
        """
        info = feature_of(setting.manifest, self.pairs[0][0], _NAME)
        self._find_weights(info)
        is_same = info.size == setting.hidden_size and info.projection is None
        if self.projector == "none" and not is_same:
            how = "" if info.projection is None else f" after the capture's projection of kind {info.projection.kind!r}"
            raise ConfigError(
                f"loss term {_NAME!r}: projector is 'none', but the student's states have {setting.hidden_size} numbers and "
                f"feature {info.name!r} has {info.size}{how}; use `projector: linear`"
            )
        if self.projector == "linear" or not is_same:
            generator = generator_for(setting.seed, _NAME, self.pairs)
            self.map = Projector(setting.hidden_size, info.size, generator).to(setting.device)

    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        """The sum over positions of weight * loss, or over sequences of loss; the mean over pairs of layers."""
        sums = [self._sum(student.layer_BTH(layer), batch, vectors_of(batch, name), weights_P) for name, layer in self.pairs]
        return torch.stack(sums).mean()

    def count(self, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        """The weight of the positions that have a vector; how many sequences do, where pooled."""
        vectors = vectors_of(batch, self.pairs[0][0])
        if vectors.info.pooling != "none":
            return has_position_S(batch, vectors.info)[vectors.slots_F].sum()
        return weights_of(batch, weights_P, vectors, self.positions).sum()

    def _find_weights(self, info: FeatureInfo) -> None:
        self.reads_weights = self.positions != "all" and info.pooling == "none"

    def _sum(self, states_BTH: Tensor, batch: TorchBatch, vectors: FeatureVectors[Tensor], weights_P: Tensor) -> Tensor:
        if vectors.info.pooling != "none":
            both = pooled_vectors(batch, states_BTH, vectors)
            return self._losses(both.student_SH, both.teacher).sum()
        weights = weights_of(batch, weights_P, vectors, self.positions)
        if self.positions != "all":  # vectors that count 0 are not compared: less work, and what stands there does not matter
            counted = weights.nonzero().flatten()
            vectors, weights = vectors.at(counted), weights[counted]
        states = states_BTH.flatten(0, 1).index_select(0, vectors.slots_F)
        size = max(_MOST_ELEMENTS // vectors.info.size, 1)
        if len(states) <= size:
            return self._weighted(states, vectors, weights)
        # Decoded and projected a block at a time, and again in the backward pass.
        blocks = zip(states.split(size), _split(vectors, size), weights.split(size), strict=True)
        parts = [checkpoint(self._weighted, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
        return torch.stack(parts).sum()

    def _weighted(self, states: Tensor, vectors: FeatureVectors[Tensor], weights: Tensor) -> Tensor:
        return (self._losses(states, vectors.float32()) * weights).sum()

    def _losses(self, states: Tensor, teacher: Tensor) -> Tensor:
        return vector_loss(self.loss, states if self.map is None else self.map(states), teacher)


def _form(info: FeatureInfo) -> tuple[Any, ...]:
    """What features of one term have in common."""
    return info.size, info.projection is None, info.positions, info.stride, info.offset, info.max_positions, info.pooling


class Projector(nn.Module):
    """A linear map of vectors that keeps lengths as well as it can at the start: the identity between equal sizes.

    Args:
        from_size: of the student's vectors.
        to_size: of the teacher's.
        generator: of the first weights.
    """

    def __init__(self, from_size: int, to_size: int, generator: torch.Generator) -> None:
        super().__init__()
        weight = torch.eye(to_size)
        if from_size != to_size:
            weight = nn.init.orthogonal_(torch.empty(to_size, from_size), generator=generator)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(to_size))

    def forward(self, states: Tensor) -> Tensor:
        """(..., to_size), multiplied in the dtype of the states."""
        return nn.functional.linear(states, self.weight.to(states.dtype), self.bias.to(states.dtype))


def _split(vectors: FeatureVectors[Tensor], size: int) -> Sequence[FeatureVectors[Tensor]]:
    starts = range(0, len(vectors), size)
    return [vectors.at(torch.arange(start, min(start + size, len(vectors)), device=vectors.slots_F.device)) for start in starts]
