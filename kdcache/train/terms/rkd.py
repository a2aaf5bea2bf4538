"""The term `rkd`: sequences that the teacher sees as near one another, or at an angle, are so for the student (1904.05068)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.format.manifest import Manifest
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.states.gathering import gathered
from kdcache.loss.states.rkd import rkd
from kdcache.train.terms.base import Needs, Setting, StudentStates, Term
from kdcache.train.terms.vectors import (
    check_kind,
    check_pooled,
    check_whole,
    feature_of,
    features_of_kind,
    has_position_S,
    pooled_vectors,
    vectors_of,
)

_NAME = "rkd"
_MIX = -7046029254386353131
"""An odd multiplier (that of splitmix64) that spreads neighbouring integers over all of int64."""


class RkdTerm(Term):
    """Distances and angles between sequences, as the teacher has them (RKD), over the batches of all ranks together.

    Sequences of accumulated batches are not compared with one another: they are not in memory together.

    Args:
        feature: name of the cache's feature: hidden states, pooled; random projections keep what is compared.
        layer: of the student, whose states are pooled alike: 0..L before the final norm, -1 after it.
        distance_weight, angle_weight: as in the authors' code.
        max_anchors: angles are looked at from this many sequences, drawn by seed and sequence; all of up to
            this many are.
    """

    needed = "a pooled feature of kind `hidden`"
    several_teachers = "wrong"
    reads_weights = False

    def __init__(
        self,
        *,
        feature: str,
        layer: int = -1,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        max_anchors: int = 64,
    ) -> None:
        super().__init__()
        check_whole("layer", layer, least=-1)
        check_whole("max_anchors", max_anchors, least=1)
        if min(distance_weight, angle_weight) < 0 or not distance_weight + angle_weight:
            raise ConfigError(
                f"distance_weight is {distance_weight!r} and angle_weight {angle_weight!r}, but both must "
                "be at least 0, and one above"
            )
        self.feature, self.layer, self.max_anchors = feature, layer, max_anchors
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self.seed = 0
        self.found: dict[str, float] = {}

    @classmethod
    def examples(cls, manifest: Manifest) -> Iterable[dict[str, Any]]:
        """One for each pooled feature."""
        return [{"feature": name} for name in features_of_kind(manifest, "hidden", is_pooled=True)] or [
            {"feature": "hidden_last_mean"}
        ]

    def needs(self) -> Needs:
        """The feature and the student's layer."""
        return Needs(features=(self.feature,), layers=(self.layer,))

    def check(self, manifest: Manifest) -> None:
        """Refuse a feature that is not pooled hidden states."""
        info = feature_of(manifest, self.feature, _NAME)
        check_kind(info, "hidden", _NAME)
        check_pooled(info, _NAME)

    def set_up(self, setting: Setting) -> None:
        """Take the seed of the anchors."""
        self.seed = setting.seed

    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:  # noqa: ARG002 - sequences count
        """This rank's share: its sequences * the loss over all ranks' sequences. A collective."""
        own = pooled_vectors(batch, student.layer_BTH(self.layer), vectors_of(batch, self.feature))
        both = gathered(own.student_SH, own.teacher, own.sequences_S)
        student_SH, teacher, sequences_S = both.tensors
        distance, angle = rkd(student_SH, teacher, self._anchors(sequences_S))
        self.found = {"distance": float(distance.detach()), "angle": float(angle.detach())}
        return both.share(self.distance_weight * distance + self.angle_weight * angle).float()

    def count(self, batch: TorchBatch, weights_P: Tensor) -> Tensor:  # noqa: ARG002 - sequences count
        """How many sequences have a vector."""
        vectors = vectors_of(batch, self.feature)
        return has_position_S(batch, vectors.info)[vectors.slots_F].sum()

    def measures(self) -> dict[str, float]:
        """Both terms, unweighted."""
        return self.found

    def _anchors(self, sequences_S: Tensor) -> Tensor | None:
        """The same of the same sequences, however they lie on ranks; None for all."""
        if len(sequences_S) <= self.max_anchors:
            return None
        drawn = (sequences_S + self.seed) * _MIX
        return (drawn ^ (drawn >> 31)).mul(_MIX).argsort(stable=True)[: self.max_anchors]
