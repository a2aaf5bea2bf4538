"""The term `relations`: how alike a sequence's tokens are to one another, in the teacher and in the student (MiniLMv2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import ConfigError, LossError
from kdcache.format.identity import FeatureInfo
from kdcache.format.manifest import Manifest
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.states.relations import relation_kl
from kdcache.loss.states.vectors import zero_of
from kdcache.train.terms.base import HeadKind, Needs, Setting, StudentStates, Term
from kdcache.train.terms.vectors import (
    COUNTED,
    SequenceSlots,
    check_choice,
    check_kind,
    check_whole,
    feature_of,
    features_of_kind,
    sequences_in,
    vectors_of,
    weights_of,
)

_NAME = "relations"
_OF: dict[str, tuple[HeadKind, HeadKind]] = {
    "qq": ("queries", "queries"), "kk": ("keys", "keys"), "vv": ("values", "values"), "qk": ("queries", "keys")
}  # fmt: skip


class RelationsTerm(Term):
    """KL between how a layer's queries, keys and values are related to one another, token by token (MiniLMv2); no projector.

    The sum over relations, the mean over relation heads and tokens, in nats.

    Args:
        queries, keys, values: names of the cache's features of these kinds, at all positions of the teacher's layer; those that
            the relations need.
        relations: of `qq`, `kk`, `vv` and `qk`; null for the first three, as far as their features are named.
        heads: relation heads, into which all heads of a token are cut again; it must divide the widths of both models. Null for
            the teacher's number of heads.
        layer: of the student, counted from 1; -1 for the last.
        positions: which queries count: `supervised` ones, by their weights, or `all` by 1. Keys are all earlier tokens.
    """

    needed = "features of kind `queries`, `keys` or `values`, at all positions"
    several_teachers = "right"

    def __init__(
        self,
        *,
        queries: str | None = None,
        keys: str | None = None,
        values: str | None = None,
        relations: Sequence[str] | None = None,
        heads: int | None = None,
        layer: int = -1,
        positions: str = "supervised",
    ) -> None:
        super().__init__()
        check_choice("positions", positions, COUNTED)
        named: dict[HeadKind, str | None] = {"queries": queries, "keys": keys, "values": values}
        self.features: dict[HeadKind, str] = {kind: name for kind, name in named.items() if name is not None}
        self.relations = _chosen(relations, self.features)
        if heads is not None:
            check_whole("heads", heads, least=1)
        self.heads, self.layer, self.positions = heads, check_layer(layer), positions
        self.reads_weights = positions != "all"

    @classmethod
    def examples(cls, manifest: Manifest) -> Iterable[dict[str, Any]]:
        """One with the first feature of each kind."""
        found = {kind: features_of_kind(manifest, kind) for kind in ("queries", "keys", "values")}
        return [{kind: names[0] for kind, names in found.items() if names} or {"queries": "queries"}]

    def needs(self) -> Needs:
        """The features, and the same of the student's layer."""
        return Needs(features=tuple(self.features.values()), heads=tuple((kind, self.layer) for kind in self.features))

    def check(self, manifest: Manifest) -> None:
        """Refuse features that are not of whole sequences, or that the relation heads do not divide."""
        for kind, name in self.features.items():
            info = feature_of(manifest, name, _NAME)
            check_kind(info, kind, _NAME)
            _check_all_tokens(info)
        for relation in self.relations:
            self._check_width("teacher", relation, [feature_of(manifest, self.features[kind], _NAME) for kind in _OF[relation]])

    def set_up(self, setting: Setting) -> None:
        """Refuse relation heads that do not divide the student's widths; put in what was left to the cache and the student."""
        self.layer = setting.num_layers if self.layer == -1 else self.layer
        infos = {kind: feature_of(setting.manifest, name, _NAME) for kind, name in self.features.items()}
        self.heads = self.heads or _default_heads(infos.values())
        for relation in self.relations:
            counts = [setting.num_heads if kind == "queries" else setting.num_kv_heads for kind in _OF[relation]]
            _check_divides("student", relation, self.heads, max(counts) * setting.head_dim)

    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        """The sum over tokens of weight * KL, added up over relations."""
        vectors = {kind: vectors_of(batch, name) for kind, name in self.features.items()}
        first = next(iter(vectors.values()))
        weights = weights_of(batch, weights_P, first, self.positions)
        lengths = batch.cu_seqlens_G1.diff().tolist()
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        states: dict[HeadKind, Tensor] = {kind: getattr(student, kind)(self.layer).flatten(0, 1) for kind in self.features}
        parts = {kind: dict(zip(starts, found.split(lengths), strict=False)) for kind, found in states.items()}
        total = zero_of(*states.values())
        for sequence in sequences_in(batch, first):
            _check_whole_sequence(sequence, self.features)
            own = {kind: found[sequence.slots.start] for kind, found in parts.items()}
            told = {kind: found.at(_indices(sequence, found.slots_F)).heads() for kind, found in vectors.items()}
            for relation in self.relations:
                total = total + relation_kl(
                    _pair(own, relation), _pair(told, relation), num_heads=self.heads or 1, weights_N=weights[sequence.vectors]
                )
        return total

    def count(self, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        """The weight of the tokens."""
        name = next(iter(self.features.values()))
        return weights_of(batch, weights_P, vectors_of(batch, name), self.positions).sum()

    def _check_width(self, owner: str, relation: str, infos: list[FeatureInfo]) -> None:
        _check_divides(owner, relation, self.heads or _default_heads(infos), max(info.size for info in infos))


def check_layer(layer: Any) -> int:
    """A layer whose heads are read: counted from 1, -1 for the last; raises ConfigError for another."""
    check_whole("layer", layer, least=-1)
    if layer == 0:
        raise ConfigError("layer is 0, but heads are inside the layers, which count from 1; -1 is the last")
    return layer


def _chosen(relations: Sequence[str] | None, features: dict[HeadKind, str]) -> tuple[str, ...]:
    if relations is None:
        relations = [name for name in ("qq", "kk", "vv") if _OF[name][0] in features]
    for name in relations:
        check_choice("relations", name, _OF)
        missing = next((kind for kind in _OF[name] if kind not in features), None)
        if missing is not None:
            raise ConfigError(f"the relation {name!r} needs the option `{missing}`, the name of a feature of that kind")
    if not relations:
        raise ConfigError("no relation is left to compare; name features in `queries`, `keys` or `values`")
    return tuple(relations)


def _check_all_tokens(info: FeatureInfo) -> None:
    is_whole = info.positions == "all" and info.stride == 1 and info.max_positions is None and info.pooling == "none"
    if not is_whole or info.projection is not None:
        raise ConfigError(
            f"loss term {_NAME!r} relates all tokens of a sequence, but feature {info.name!r} does not have every token's "
            "heads; capture it with `positions: all`, without stride, max_positions, pooling and projection"
        )


def _default_heads(infos: Iterable[FeatureInfo]) -> int:
    return max(info.num_heads or 1 for info in infos)


def _check_divides(owner: str, relation: str, heads: int, width: int) -> None:
    if width % heads:
        raise ConfigError(
            f"loss term {_NAME!r}: {heads} relation heads do not divide the {owner}'s width of {width} in the relation "
            f"{relation!r}; set `heads` to a divisor of both models' widths"
        )


def _check_whole_sequence(sequence: SequenceSlots, features: dict[HeadKind, str]) -> None:
    num_tokens, num_vectors = (part.stop - part.start for part in (sequence.slots, sequence.vectors))
    if num_tokens != num_vectors:
        raise LossError(
            f"loss term {_NAME!r}: the features {', '.join(map(repr, features.values()))} have {num_vectors} vectors for a "
            f"document of {num_tokens} tokens, so packed documents cannot be kept apart; capture them with `positions: all`"
        )


def _indices(sequence: SequenceSlots, slots_F: Tensor) -> Tensor:
    return torch.arange(sequence.vectors.start, sequence.vectors.stop, device=slots_F.device)


def _pair(heads: Mapping[Any, Tensor], relation: str) -> tuple[Tensor, Tensor]:
    """(N, width) left and right: the fewer heads of keys and values are repeated where they meet queries."""
    left, right = (heads[kind] for kind in _OF[relation])
    most = max(left.shape[1], right.shape[1])
    left, right = (part.repeat_interleave(most // part.shape[1], dim=1).flatten(1) for part in (left, right))
    return left, right
