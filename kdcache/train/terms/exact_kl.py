"""The exact divergence over the whole vocabulary, the teacher's distributions made again of its last states."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdcache.errors import LossError
from kdcache.format.manifest import Manifest
from kdcache.format.output_projection import OUTPUT_PROJECTION
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.states.exact_kl import check_temperature, exact_kd_loss, whole_divergence
from kdcache.train.terms.base import Needs, Setting, StudentStates, Term
from kdcache.train.terms.last_states import LAST_STATES, LastStates, find_last_states, teacher_projection


class ExactKL(Term):
    """T^2 times a divergence of whole distributions: the ceiling for what any selection of entries can teach.

    Costs one more product with a (V, H) matrix than the fused sparse loss has, and one more buffer of a chunk's logits.

    Args:
        divergence: `forward_kl`, `reverse_kl`, `jensen_shannon`, `skew_kl`, `skew_reverse_kl`, `total_variation`, `hellinger`
            or `alpha_beta`.
        divergence_options: the divergence's own parameters.
        temperature: of both sides; no normalisers are needed.
        feature: the teacher's last states, whole or as coordinates of `projection {kind: pca}`.
    """

    needed = "the last states and the sidecar `output_projection`"
    several_teachers = "right"  # where they share an output projection; else the sidecars differ

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        divergence_options: dict[str, float] | None = None,
        temperature: float = 1.0,
        feature: str = LAST_STATES,
    ) -> None:
        super().__init__()
        self._feature, self._temperature = feature, temperature
        try:
            check_temperature(temperature)
            self._divergence = whole_divergence(divergence, **(divergence_options or {}))
        except LossError as error:
            raise ValueError(str(error)) from error
        self._teacher: LastStates | None = None

    @classmethod
    def examples(cls, manifest: Manifest) -> list[dict[str, Any]]:
        """The features of the cache that may be its last states."""
        return [{"feature": info.name} for info in manifest.identity.features if info.layer == -1]

    def needs(self) -> Needs:
        return Needs(features=(self._feature,), sidecars=(OUTPUT_PROJECTION,))

    def check(self, manifest: Manifest) -> None:
        find_last_states(manifest, self._feature, "exact_kl")

    def set_up(self, setting: Setting) -> None:
        info = find_last_states(setting.manifest, self._feature, "exact_kl")
        self._teacher = LastStates(teacher_projection(setting, info, "exact_kl"), self._feature)

    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        assert self._teacher is not None, "set_up comes first"
        return exact_kd_loss(
            student.hidden_PH,
            student.projection,
            self._teacher.of(batch),
            divergence=self._divergence,
            temperature=self._temperature,
            weights=weights_P,
            reduction="sum",
        )
