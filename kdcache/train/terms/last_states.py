"""The teacher's last states and its output projection, for terms that make whole distributions of them again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.manifest import FeatureInfo, Manifest
from kdcache.format.output_projection import OUTPUT_PROJECTION, OutputProjection
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.chunks import Head
from kdcache.loss.fused import Projection
from kdcache.loss.states.exact_kl import TeacherStates, low_rank
from kdcache.train.terms.base import Setting

LAST_STATES = "hidden_last"
"""The name that a capture gives the feature, as a rule."""


def find_last_states(manifest: Manifest, feature: str, term: str) -> FeatureInfo:
    """What the cache says of the feature, which must be whole states after the final norm, or their coordinates.

    Raises:
        ConfigError: it is not there, or is something else; says what to capture.
    """
    needed = "capture it with features: [{layer: -1}], or with projection {kind: pca} for fewer bytes"
    info = next((found for found in manifest.identity.features if found.name == feature), None)
    if info is None:
        has = ", ".join(found.name for found in manifest.identity.features) or "none"
        raise ConfigError(f"loss term {term!r}: the cache has no feature {feature!r}, it has {has}; {needed}")
    refused = {
        "kind": (info.kind, info.kind != "hidden"),
        "layer": (info.layer, not info.is_after_norm),
        "pooling": (info.pooling, info.pooling != "none"),
        "stride": (info.stride, info.stride != 1),
        "max_positions": (info.max_positions, info.max_positions is not None),
        "projection": (info.projection and info.projection.kind, info.projection is not None and info.projection.kind != "pca"),
    }
    for name, (value, is_refused) in refused.items():
        if is_refused:
            raise ConfigError(
                f"loss term {term!r}: feature {feature!r} has {name} {value!r}, but the teacher's distribution can only be "
                f"made of its last state, after the final norm, at every position; {needed}"
            )
    return info


def teacher_projection(setting: Setting, info: FeatureInfo, term: str) -> Projection:
    """The teacher's output projection, on the student's device, in the dtype in which it is kept.

    Raises:
        ConfigError: it takes states of another size than the feature's, or has other ids than the teacher.
        CorruptCacheError: a tensor is missing or does not fit.
    """
    tensors = setting.sidecar(OUTPUT_PROJECTION)
    found = OutputProjection.from_arrays({name: _as_array(tensor) for name, tensor in tensors.items()})
    num_ids, width = found.weight_VH.shape
    if width != info.full_size:
        raise ConfigError(
            f"loss term {term!r}: the sidecar {OUTPUT_PROJECTION!r} takes states of {width} numbers, but feature "
            f"{info.name!r} has {info.full_size}: they are of different teachers"
        )
    vocab_size = setting.manifest.identity.teacher.vocab_size
    if num_ids != vocab_size:
        raise ConfigError(
            f"loss term {term!r}: the sidecar {OUTPUT_PROJECTION!r} makes logits of {num_ids} ids, but the cache's teacher has "
            f"{vocab_size}: they are of different teachers"
        )
    weight_VH, bias_V = tensors["weight"].to(setting.device), tensors.get("bias")
    head = Head(logit_scale=found.logit_scale, softcap=found.softcap)
    return Projection(weight_VH, None if bias_V is None else bias_V.to(setting.device), head)


def _as_array(tensor: Tensor) -> NDArray[Any]:
    """The same memory where that is the CPU's; bfloat16 as its bits."""
    tensor = tensor.detach().cpu()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


class LastStates:
    """Makes the teacher's side of each batch; the projection is folded with a basis and cast once.

    Args:
        projection: of the teacher.
        feature: name of its last states.
        dtype: of states and projection; None for that of both where they are half precision of one dtype, else float32.
    """

    def __init__(self, projection: Projection, feature: str, dtype: torch.dtype | None = None) -> None:
        self.projection, self._feature, self._dtype, self._is_ready = projection, feature, dtype, False

    def of(self, batch: TorchBatch) -> TeacherStates:
        """The teacher's states at the batch's positions, or their coordinates."""
        assert batch.features is not None
        vectors: FeatureVectors[Tensor] = batch.features[self._feature]
        if not self._is_ready:
            self._make_ready(vectors)
        states_FH = vectors.values_FH if vectors.values_FH.dtype == self.projection.weight_VH.dtype else vectors.float32()
        if len(states_FH) != len(batch.flat_positions_P):  # at all positions: those that are trained on
            states_FH = states_FH[torch.searchsorted(vectors.slots_F, batch.flat_positions_P)]
        return TeacherStates(states_FH.to(self.projection.weight_VH.dtype), self.projection)

    def _make_ready(self, vectors: FeatureVectors[Tensor]) -> None:
        projection = self.projection
        if vectors.basis is not None:
            projection = low_rank(projection, vectors.basis, vectors.center)
        stored = vectors.values_FH.dtype
        dtype = self._dtype or (stored if stored == projection.weight_VH.dtype else torch.float32)
        bias_V = projection.bias_V
        self.projection = Projection(
            projection.weight_VH.to(dtype),
            None if bias_V is None else bias_V.to(torch.promote_types(bias_V.dtype, dtype)),
            projection.head,
            projection.chunk_positions,
        )
        self._is_ready = True
