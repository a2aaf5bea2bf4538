"""A term of a loss in one file: what the student gives to everything but the teacher's most probable token."""

from __future__ import annotations

from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.format.manifest import Manifest
from kdcache.loader.torch_batches import TorchBatch
from kdcache.train.terms import StudentStates, Term


class TopTokenError(Term):
    """1 - q(the teacher's first entry), to a power."""

    def __init__(self, *, power: float = 1.0) -> None:
        super().__init__()
        if power <= 0:
            raise ValueError(f"power is {power!r}, but must be above 0")
        self.power = power

    def check(self, manifest: Manifest) -> None:
        if manifest.identity.selection.kind == "sampled":
            raise ConfigError("loss term 'top_token_error' needs the teacher's most probable token; capture with 'top_k'")

    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        first_P = batch.teacher.token_ids_PK[:, 0].long()
        kept_P = weights_P > 0
        q_PV = student.logits()[kept_P].softmax(dim=1)
        error_P = 1 - q_PV.gather(1, first_P[kept_P, None])[:, 0]
        return (weights_P[kept_P] * error_P**self.power).sum()
