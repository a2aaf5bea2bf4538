"""Dual-space distillation, version 2: compared in the student's space and in the teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import LossError
from kdcache.format.manifest import Manifest
from kdcache.format.output_projection import OUTPUT_PROJECTION
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.fused import Projection
from kdcache.loss.states.dual_space import Affine, DualSpaceLoss, DualSpaceSettings, LogitSolver, dual_space_loss
from kdcache.loss.states.exact_kl import whole_divergence
from kdcache.train.terms.base import Needs, Setting, StudentStates, Term
from kdcache.train.terms.last_states import LAST_STATES, LastStates, find_last_states, teacher_projection


class DualSpace(Term):
    """DSKDv2: a divergence in each model's space, and the cross entropy of the mapped teacher with its own most probable id.

    See `kdcache.loss.states.dual_space`.

    Costs nine products with (V, H) matrices where the fused sparse loss has three, and one of both weights, V H_s H_t in
    float64, whenever B is made. A starts at the student's projection, and is learned; B follows it. For students that have been
    trained: through a random projection of another size A keeps few of the teacher's most probable ids.

    Args:
        divergence: as for `exact_kl`.
        divergence_options: the divergence's own parameters.
        temperature: of both comparisons; DSKD takes 2.
        squared_temperature: whether they are multiplied by T^2; DSKD does not.
        agreement: where the student's space is compared: `counted`, `averaged` or `ignored`; DSKD takes `averaged`.
        every: batches after which B is made again from the student's projection.
        feature: the teacher's last states, whole or as coordinates of `projection {kind: pca}`.
    """

    needed = "the last states and the sidecar `output_projection`"
    several_teachers = "right"  # where they share an output projection; else the sidecars differ

    student_map: nn.Parameter
    student_shift: nn.Parameter
    teacher_map: Tensor
    teacher_shift: Tensor
    num_batches: Tensor

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        divergence_options: dict[str, float] | None = None,
        temperature: float = 1.0,
        squared_temperature: bool = True,
        agreement: str = "counted",
        every: int = 1,
        feature: str = LAST_STATES,
    ) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every is {every!r}, but must be at least 1")
        self._feature, self._every = feature, every
        try:
            made = whole_divergence(divergence, **(divergence_options or {}))
            self._settings = DualSpaceSettings(made, temperature, squared_temperature, agreement)
        except LossError as error:
            raise ValueError(str(error)) from error
        self._teacher: LastStates | None = None
        self._solver: LogitSolver | None = None
        self._last: DualSpaceLoss | None = None
        self._weight = torch.zeros(())
        self._is_started = False

    @classmethod
    def examples(cls, manifest: Manifest) -> list[dict[str, Any]]:
        """The features of the cache that may be its last states."""
        return [{"feature": info.name} for info in manifest.identity.features if info.layer == -1]

    def needs(self) -> Needs:
        return Needs(features=(self._feature,), sidecars=(OUTPUT_PROJECTION,))

    def check(self, manifest: Manifest) -> None:
        find_last_states(manifest, self._feature, "dual_space")

    def set_up(self, setting: Setting) -> None:
        info = find_last_states(setting.manifest, self._feature, "dual_space")
        projection = teacher_projection(setting, info, "dual_space")
        # Zero until the first batch shows the student's projection; what a checkpoint brings is not zero, and stays.
        size = setting.hidden_size
        self._projection = projection
        self.student_map = nn.Parameter(torch.zeros((size, info.size), device=setting.device))
        self.student_shift = nn.Parameter(torch.zeros(size, device=setting.device))
        if self._every > 1:  # in checkpoints, so that a run that resumes goes on with the same B
            for name, shape in (("teacher_map", (info.size, size)), ("teacher_shift", (info.size,)), ("num_batches", ())):
                self.register_buffer(name, torch.zeros(shape, device=setting.device))

    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        if self._teacher is None:
            self._teacher = LastStates(self._projection, self._feature, student.hidden_PH.dtype)
        states = self._teacher.of(batch)
        self._start(student.projection, states.projection)
        maps = Affine(self.student_map, self.student_shift), self._to_teacher(student.projection, states.projection)
        loss = dual_space_loss((student.hidden_PH, student.projection), states, maps, weights_P, self._settings)
        self._last, self._weight = loss, weights_P.detach().sum()
        return loss.total()

    @torch.no_grad()
    def _start(self, student: Projection, teacher: Projection) -> None:
        """A where the student's projection of it is the teacher's, unless a checkpoint brought one."""
        if not self._is_started and not bool(self.student_map.any()):
            start = LogitSolver(student).solve(teacher)
            self.student_map.copy_(start.weight)
            if start.bias is not None:
                self.student_shift.copy_(start.bias)
        self._is_started = True

    @torch.no_grad()
    def _to_teacher(self, student: Projection, teacher: Projection) -> Affine:
        """B of the student's projection as it is now, or was a few batches ago."""
        if self._solver is None:
            self._solver = LogitSolver(teacher)
        if self._every == 1:
            return self._solver.solve(student)
        if int(self.num_batches) % self._every == 0:
            made = self._solver.solve(student)
            self.teacher_map.copy_(made.weight)
            if made.bias is not None:
                self.teacher_shift.copy_(made.bias)
        self.num_batches += 1
        return Affine(self.teacher_map, self.teacher_shift)

    def measures(self) -> dict[str, float]:
        """The three parts as means over positions, and how often A keeps the teacher's most probable id."""
        if self._last is None:
            return {}
        parts = {name: getattr(self._last, name) for name in ("top", "to_student", "to_teacher")}
        means = {name: float(part.detach()) / max(float(self._weight), 1e-30) for name, part in parts.items()}
        return means | {"agreement": float(self._last.agreement)}
