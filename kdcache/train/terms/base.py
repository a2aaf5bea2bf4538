"""What a term of a loss is: what it needs, what it is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from kdcache.errors import ConfigError
from kdcache.format.manifest import Manifest
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.fused import PLAIN_HEAD, Projection

T = TypeVar("T")

HeadKind = Literal["queries", "keys", "values", "attention"]
Read = tuple[Literal["hidden"] | HeadKind, int]
"""What is read off the student, and the layer."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a term reads, besides the student's logits and the teacher's entries.

    Attributes:
        features: names of the cache's features; the loader puts them into `batch.features`.
        sidecars: names of the cache's sidecars, for `Setting.sidecar`.
        layers: student's layers whose hidden states are read: 0..L before the final norm, -1 after it.
        heads: what is read per head, and inside which of the student's layers 1..L, as in ("queries", 3).
        roles: whether `batch.roles_P` is read.
        domains: whether the batch's domains are read.
        pairs: whether `batch.pairs` is read: the loader then keeps pairs of answers together.
        target_logprobs: whether `batch.teacher.target_logprobs_P` is read.
    """

    features: tuple[str, ...] = ()
    sidecars: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    heads: tuple[tuple[HeadKind, int], ...] = ()
    roles: bool = False
    domains: bool = False
    pairs: bool = False
    target_logprobs: bool = False

    @property
    def reads(self) -> tuple[Read, ...]:
        """All that is read off the student's layers."""
        return (*(("hidden", layer) for layer in self.layers), *self.heads)

    def __or__(self, other: Needs) -> Needs:
        """What both need, each once."""
        return Needs(
            features=_each_once(self.features, other.features),
            sidecars=_each_once(self.sidecars, other.sidecars),
            layers=_each_once(self.layers, other.layers),
            heads=_each_once(self.heads, other.heads),
            roles=self.roles or other.roles,
            domains=self.domains or other.domains,
            pairs=self.pairs or other.pairs,
            target_logprobs=self.target_logprobs or other.target_logprobs,
        )


def _each_once(ours: tuple[T, ...], theirs: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(ours + theirs))


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What a term may know before training.

    Attributes:
        manifest: that of the cache.
        sidecar: name -> its arrays, as CPU tensors; a term names it in its `needs`.
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, vocab_size: the student's.
        num_sequences: of the cache.
        pooled_features: name -> the vectors of a pooled feature of all sequences, in the order of their indices.
        seed: for what the term draws at random, as initial weights: use a generator of its own.
        device: that of the student; parameters belong there, in float32.
        student: the model; None in a loop of one's own.
    """

    manifest: Manifest
    sidecar: Callable[[str], dict[str, Tensor]]
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_sequences: int
    seed: int
    device: torch.device
    pooled_features: Callable[[str], Any]
    student: nn.Module | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StudentStates:
    """What the student makes of a batch, with gradients.

    Attributes:
        hidden_PH: (P, H) what the output projection reads, at the batch's positions.
        projection: the output projection.
        flat_positions_P: (P,) index into B * T of each position, as `batch.flat_positions_P`.
        inner: what was read of the layers: of every term's `needs`, and no more.
    """

    hidden_PH: Tensor
    projection: Projection
    flat_positions_P: Tensor | None = None
    inner: Mapping[Read, Any] = field(default_factory=dict)

    def logits(self) -> Tensor:
        """(P, V) float32: all of them at once, for terms that are not fused with the projection."""
        projection = self.projection
        weight_VH, bias_V, head = projection.weight_VH, projection.bias_V, projection.head or PLAIN_HEAD
        logits_PV = nn.functional.linear(self.hidden_PH, weight_VH, bias_V)[:, : head.vocab_size].float()
        logits_PV = logits_PV * head.logit_scale
        return logits_PV if head.softcap is None else head.softcap * torch.tanh(logits_PV / head.softcap)

    def layer_BTH(self, layer: int) -> Tensor:
        """(B, T, H) the residual stream after this many layers: 0 the embeddings, L before the final norm; -1 after it."""
        return self._read("hidden", layer)

    def queries(self, layer: int) -> Tensor:
        """(B, T, heads, head_dim) what layer 1..L attends with, after a norm of heads and before rotations."""
        return self._read("queries", layer)

    def keys(self, layer: int) -> Tensor:
        """(B, T, key-value heads, head_dim), see `queries`."""
        return self._read("keys", layer)

    def values(self, layer: int) -> Tensor:
        """(B, T, key-value heads, head_dim), see `queries`."""
        return self._read("values", layer)

    def attention(self, layer: int) -> Any:
        """What the attention of layer 1..L was called with, see `attention_call.py`."""
        return self._read("attention", layer)

    def _read(self, kind: Literal["hidden"] | HeadKind, layer: int) -> Any:
        if (kind, layer) not in self.inner:
            raise ConfigError(f"a loss term reads the student's {kind} of layer {layer}, but does not name it in its `needs`")
        return self.inner[kind, layer]


class Term(nn.Module, ABC):
    """One term of a loss; a subclass is registered under its name as an entry point of the group `kdcache.losses`.

    It is made with the config's `options` as keywords, and raises ConfigError, LossError, TypeError or ValueError for wrong
    ones. What it learns itself (projectors) are parameters that `set_up` makes: they have a learning rate of their own and no
    weight decay, are kept in checkpoints, and are not in the exported model. Large constants are plain tensors, no buffers:
    checkpoints would hold them, and DistributedDataParallel would send them around at every step.

    Attributes:
        needed: what is needed of a cache, in a few words, for the table of all terms.
        per_position: names of options that may differ by position.
        several_teachers: what to think of features from caches of different teachers: `wrong` is refused, `doubtful` warned of.
        varied: of these, what the batch at hand has: name -> (P,); see `option`.
        reads_weights: whether `forward` reads its `weights_P`; known after `check` or `set_up`. False where sequences or all
            vectors count alike: weights by position of this term alone are refused then.
    """

    needed: ClassVar[str] = ""
    per_position: ClassVar[tuple[str, ...]] = ()
    several_teachers: ClassVar[Literal["right", "doubtful", "wrong"]] = "doubtful"
    varied: Mapping[str, Tensor] = MappingProxyType({})
    reads_weights: bool = True

    @classmethod
    def examples(cls, manifest: Manifest) -> Iterable[dict[str, Any]]:  # noqa: ARG003
        """Options worth trying on a cache: `kdcache info` lists those with which `check` finds nothing missing."""
        return [{}]

    def needs(self) -> Needs:
        """What is read of the cache and of the student; asked before `set_up`, and what is read of the student after it."""
        return Needs()

    def check(self, manifest: Manifest) -> None:
        """Raise ConfigError, in one sentence, where a cache is not enough; called before anything is trained.

        That features and sidecars of `needs` are there has been looked at before.
        """

    def set_up(self, setting: Setting) -> None:
        """Make parameters and read sidecars: called once, before training and before a checkpoint is loaded."""

    @abstractmethod
    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        """A scalar: the SUM over what the term counts, differentiable with respect to the student's tensors.

        Positions of weight 0 add nothing, whatever the teacher's numbers are, unless others are compared with them, as in
        `relations`; the student's have to be finite. Where positions are counted, the sum over a batch is that over its parts:
        ranks and accumulated batches are then averaged as the rest of the loss is. A batch may have no position.

        Args:
            student: its states.
            batch: the whole batch on the student's device, with `teacher`, `target_ids_P` and the features that are needed.
            weights_P: (P,) >= 0.
        """

    def count(self, batch: TorchBatch, weights_P: Tensor) -> Tensor:  # noqa: ARG002 - others read it
        """A scalar: what the sum is divided by, once both are added up over all ranks and accumulated batches.

        Args:
            batch: on any device; asked for all batches of a step before the first of them is trained on.
            weights_P: (P,) as for `forward`, without what differs by position in this term alone.
        """
        return weights_P.sum()

    def measures(self) -> dict[str, float]:
        """Further numbers of the last forward, for `metrics.jsonl`."""
        return {}

    def exported(self) -> Mapping[str, Tensor]:
        """What belongs to the finished model: tensors that are saved next to it, in `<term>.safetensors`; as a rule, none."""
        return {}

    def option(self, name: str) -> Any:
        """The option of this name: (P,) where it differs by position, else the attribute."""
        return self.varied.get(name, getattr(self, name))
