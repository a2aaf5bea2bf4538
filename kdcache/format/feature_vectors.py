"""Feature vectors: what a batch holds of one of the teacher's features, as it is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from kdcache.errors import LossError
from kdcache.format.identity import FeatureInfo

ArrayT = TypeVar("ArrayT")

ARRAYS = ("values_FH", "slots_F", "scale_F", "mean_H", "scale_H", "distances_FH", "basis", "center")
"""The fields of FeatureVectors that are arrays."""
_PER_VECTOR = ("values_FH", "slots_F", "scale_F", "distances_FH")


@dataclass(frozen=True, slots=True, eq=False)
class FeatureVectors(Generic[ArrayT]):
    """The vectors of one feature, as NumPy arrays or torch tensors, in the dtype in which they are stored.

    The loader makes them as `batch.features[name]`. A value is `mean_H + values_FH * scale_F * scale_H`, what is missing left
    out; `float32` computes it.

    Attributes:
        info: what the cache says of the feature.
        values_FH: (F, H) as stored: float16, int8, or bfloat16, which NumPy holds as the bits, uint16. Of `attention`: for each
            head the probabilities of its top keys, falling; 0 where there are fewer.
        slots_F: (F,) int64, ascending: index into B*T of each vector's position; of a pooled feature, which of the batch's
            sequences it is of, 0..num_sequences-1.
        scale_F: (F,) float32, of `int8` only.
        mean_H, scale_H: (H,) float32, of `int8` with scale `channel` only.
        distances_FH: (F, H) int32, of `attention` only: position minus key, 0 for the token itself; 0 where a key is missing.
        basis, center: float32, of projection `pca` only: (H, full size) orthonormal lines, and (full size,).
    """

    info: FeatureInfo
    values_FH: ArrayT
    slots_F: ArrayT
    scale_F: ArrayT | None = None
    mean_H: ArrayT | None = None
    scale_H: ArrayT | None = None
    distances_FH: ArrayT | None = None
    basis: ArrayT | None = None
    center: ArrayT | None = None

    def __repr__(self) -> str:
        return f"FeatureVectors({self.info.name!r}, {len(self):,} vectors of {self.info.size:,} numbers, {self.info.dtype})"

    @property
    def num_vectors(self) -> int:
        """F."""
        return len(self.values_FH)  # pyright: ignore[reportArgumentType]

    def __len__(self) -> int:
        return self.num_vectors

    def float32(self) -> ArrayT:
        """(F, H) float32: the vectors decoded, on their device."""
        values: Any = _as_float32(self.values_FH, self.info.dtype)
        if self.scale_F is not None:
            values = values * self.scale_F[:, None]  # pyright: ignore[reportIndexIssue]
        if self.scale_H is not None:
            values = values * self.scale_H + self.mean_H
        return values

    def reconstructed(self) -> ArrayT:
        """(F, full size) float32: the vectors before the projection, as well as its basis can say; `float32` without one.

        Raises:
            LossError: a random projection, which cannot be undone.
        """
        projection = self.info.projection
        if projection is None:
            return self.float32()
        if self.basis is None or self.center is None:
            raise LossError(
                f"feature {self.info.name!r} was made by a projection of kind {projection.kind!r}, which cannot be undone; "
                "capture it with projection {kind: pca} or without one"
            )
        decoded: Any = self.float32()
        return decoded @ self.basis + self.center

    def heads(self) -> ArrayT:
        """(F, heads, numbers per head) float32: of queries, keys and values; of `attention`, (F, heads, top_keys).

        Raises:
            LossError: hidden states, or a projected feature: it has no heads.
        """
        if self.info.num_heads is None or self.info.projection is not None:
            raise LossError(f"feature {self.info.name!r} of kind {self.info.kind!r} has no heads to tell apart")
        values: Any = self.float32()
        return values.reshape(len(values), self.info.num_heads, self.info.size // self.info.num_heads)

    def tails(self) -> ArrayT:
        """(F, heads) float32: the probability that each head gives to keys that are not kept; of `attention` alone."""
        sums: Any = self.heads()
        return (1.0 - sums.sum(-1)).clip(0.0, 1.0)

    def at(self, index: ArrayT) -> FeatureVectors[ArrayT]:
        """Some of the vectors: by flags, or by their indices."""
        return self._with({name: array[index] for name, array in self._arrays(_PER_VECTOR)})

    def map(self, function: Callable[[Any], Any]) -> FeatureVectors[Any]:
        """The same with `function` applied to every array."""
        return self._with({name: function(array) for name, array in self._arrays(ARRAYS)})

    def to(self, device: Any, *, non_blocking: bool = False) -> FeatureVectors[ArrayT]:
        """The tensors on a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _arrays(self, names: Sequence[str]) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]

    def _with(self, arrays: dict[str, Any]) -> FeatureVectors[Any]:
        return replace(self, **arrays)


def stacked_vectors(parts: Sequence[FeatureVectors[Any]], slot_offsets: Sequence[int]) -> FeatureVectors[Any]:
    """The vectors of several batches as one; NumPy arrays.

    Args:
        parts: of one feature of the same caches.
        slot_offsets: what is added to the slots of each.
    """
    slots = [part.slots_F + offset for part, offset in zip(parts, slot_offsets, strict=True)]
    first = parts[0]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name, _ in first._arrays(_PER_VECTOR)}
    return replace(first, **arrays | {"slots_F": np.concatenate(slots)})


def _as_float32(values: Any, dtype: str) -> Any:
    if not isinstance(values, np.ndarray):
        return values.float()
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
