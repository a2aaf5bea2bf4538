"""What terms on states have in common: the cache's features, and which positions and sequences of a batch they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import ConfigError, LossError
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.identity import FeatureInfo
from kdcache.format.manifest import Manifest
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.states.pooling import pooled, sequences_of_slots

COUNTED = ("supervised", "all")
"""Which of a feature's positions count: those trained on, by their weights, or every one that has a vector, by 1."""


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise ConfigError unless an option has one of its values."""
    known = tuple(known)
    if value not in known:
        raise ConfigError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, known))}")


def check_whole(name: str, value: Any, *, least: int) -> None:
    """Raise ConfigError unless an option is an integer of at least this."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}, but must be an integer of at least {least}")


def check_positive(name: str, value: Any) -> None:
    """Raise ConfigError unless an option is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{name} is {value!r}, but must be above 0")


def feature_of(manifest: Manifest, name: str, term: str) -> FeatureInfo:
    """What the cache says of a feature.

    Raises:
        ConfigError: it was not captured; names those that were.
    """
    found = {info.name: info for info in manifest.identity.features}
    if name not in found:
        has = f"has {', '.join(map(repr, found))}" if found else "has no features"
        raise ConfigError(
            f"loss term {term!r} reads feature {name!r}, which was not captured: the cache {has}; name one of these, or "
            "capture again with it in `features`"
        )
    return found[name]


def features_of_kind(manifest: Manifest, kind: str, *, is_pooled: bool = False) -> list[str]:
    """Names of the cache's features of a kind: pooled ones, or those of positions."""
    features = manifest.identity.features
    return [info.name for info in features if info.kind == kind and (info.pooling != "none") == is_pooled]


def check_kind(info: FeatureInfo, kind: str, term: str) -> None:
    """Raise ConfigError unless a feature is of this kind."""
    if info.kind != kind:
        raise ConfigError(f"loss term {term!r} needs a feature of kind {kind!r}, but {info.name!r} is of kind {info.kind!r}")


def check_pooled(info: FeatureInfo, term: str) -> None:
    """Raise ConfigError unless a feature is a vector per sequence, which a student can be pooled like."""
    if info.pooling == "none":
        raise ConfigError(
            f"loss term {term!r} compares sequences, but feature {info.name!r} is a vector per position; capture one with "
            "`pooling: mean` or `pooling: last`"
        )
    if info.stride != 1 or info.max_positions is not None:
        raise ConfigError(
            f"loss term {term!r} pools the student's states over the same positions as the teacher's, but feature "
            f"{info.name!r} is pooled over some of them; capture it without stride and max_positions"
        )


def vectors_of(batch: TorchBatch, name: str) -> FeatureVectors[Tensor]:
    """The vectors of a feature in a batch.

    Raises:
        LossError: the batch was made without it.
    """
    found: Any = (batch.features or {}).get(name)
    if found is None:
        raise LossError(
            f"the batch has no feature {name!r}; name it in `loader.features`, as LoaderConfig(features=({name!r},))"
        )
    return found


def weights_of(batch: TorchBatch, weights_P: Tensor, vectors: FeatureVectors[Tensor], counted: str) -> Tensor:
    """(F,) what each vector of a feature of positions counts, see COUNTED."""
    if counted == "all":
        return torch.ones(len(vectors.slots_F), dtype=weights_P.dtype, device=weights_P.device)
    weights = weights_P.new_zeros(batch.input_ids_BT.numel())
    weights[batch.flat_positions_P] = weights_P
    return weights[vectors.slots_F]


@dataclass(frozen=True, slots=True, eq=False)
class PooledVectors:
    """Vectors of the batch's sequences that have one.

    Attributes:
        teacher: (S, size) float32.
        student_SH: (S, H) pooled as the teacher's, over the same positions.
        sequences_S: index of each in the cache; -1 where the batch does not tell.
    """

    teacher: Tensor
    student_SH: Tensor
    sequences_S: Tensor


def has_position_S(batch: TorchBatch, info: FeatureInfo) -> Tensor:
    """(num_sequences,) bool: whether a sequence has a position to pool over; without one its vector is zeros."""
    return torch.bincount(_pooled_over(batch, info)[1], minlength=batch.num_sequences)[: batch.num_sequences] > 0


def pooled_vectors(batch: TorchBatch, states_BTH: Tensor, vectors: FeatureVectors[Tensor]) -> PooledVectors:
    """Both models' vectors of the batch's sequences.

    Raises:
        LossError: the loader's mask leaves positions out over which the teacher's vectors were pooled.
    """
    slots, sequences = _pooled_over(batch, vectors.info)
    states = states_BTH.flatten(0, 1).index_select(0, slots)
    student_SH = pooled(states, sequences, batch.num_sequences, vectors.info.pooling)
    has_position = has_position_S(batch, vectors.info)[vectors.slots_F]
    kept = vectors.slots_F[has_position]
    indices = batch.sequence_indices_S
    chosen = torch.full_like(kept, -1) if indices is None else indices[kept]
    return PooledVectors(vectors.at(has_position).float32(), student_SH.index_select(0, kept), chosen)


def _pooled_over(batch: TorchBatch, info: FeatureInfo) -> tuple[Tensor, Tensor]:
    """The slots that a pooled feature is over, and which of the batch's sequences each is in."""
    sequences = sequences_of_slots(batch.segment_ids_BT)
    if info.positions == "all":
        slots = (sequences >= 0).nonzero().flatten()
        return slots, sequences[slots]
    if batch.num_masked:
        raise LossError(
            f"feature {info.name!r} is pooled over all supervised positions, but the loader's mask leaves out "
            f"{batch.num_masked} of this batch's: train without loader.mask, or capture the feature with `positions: all`"
        )
    return batch.flat_positions_P, sequences[batch.flat_positions_P]


@dataclass(frozen=True, slots=True)
class SequenceSlots:
    """Where one of a batch's sequences is.

    Attributes:
        slots: from the first of its slots, an index into B*T, to after its last.
        vectors: which of a feature's vectors are its own.
    """

    slots: slice
    vectors: slice


def sequences_in(batch: TorchBatch, vectors: FeatureVectors[Tensor]) -> Iterator[SequenceSlots]:
    """The batch's sequences with their share of a feature of positions; padding is left out."""
    bounds = batch.cu_seqlens_G1.long()
    is_sequence = batch.segment_ids_BT.flatten()[bounds[:-1]] > 0
    found = torch.searchsorted(vectors.slots_F, bounds.to(vectors.slots_F.device))
    edges, firsts = bounds.tolist(), found.tolist()
    for g, is_one in enumerate(is_sequence.tolist()):
        if is_one:
            yield SequenceSlots(slice(edges[g], edges[g + 1]), slice(firsts[g], firsts[g + 1]))


def generator_for(seed: int, *purpose: Any) -> torch.Generator:
    """A generator of its own for each seed and purpose, on the CPU: the same numbers on every device and rank."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
