"""DPKD: the student comes to prefer the chosen answer to a prompt over the rejected one as the teacher does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.format.manifest import Manifest
from kdcache.loader.batches.batch import NO_TARGET
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.states.dpkd import Answers, dpkd_loss
from kdcache.loss.states.pooling import sequences_of_slots
from kdcache.train.terms.base import Needs, StudentStates, Term


class DPKD(Term):
    """-log sigmoid(beta * (the student's margin - the teacher's)) of each pair of answers, with margins of mean logprobs.

    Counts pairs. A sequence without a partner, and an answer of which no position counts, add nothing; `unpaired` in
    `metrics.jsonl` says how many sequences of a batch these are. Costs one more product with a (V, H) matrix than the cross
    entropy.

    Args:
        beta: above 0.
    """

    needed = "pairs of answers: `input.group_field`"

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"beta is {beta!r}, but must be above 0")
        self._beta = beta
        self._last: dict[str, Any] = {}

    def needs(self) -> Needs:
        return Needs(pairs=True, target_logprobs=True)

    def check(self, manifest: Manifest) -> None:
        if not manifest.identity.groups:
            raise ConfigError(
                "loss term 'dpkd' needs pairs of answers, but the cache does not say which answers belong to one prompt; "
                "capture it again with input.group_field and input.preference_field"
            )

    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        teacher_P = batch.teacher.target_logprobs_P
        if teacher_P is None:
            raise ConfigError("loss term 'dpkd' reads the teacher's logprob of each target; set loader.with_target_logprobs")
        answers, weights_P = self._answers(batch), _with_target(batch, weights_P)
        num_pairs = answers.is_counted(weights_P).sum()
        self._last = {"pairs": num_pairs, "unpaired": batch.num_sequences - 2 * num_pairs}
        targets_P = batch.target_ids_P
        return dpkd_loss(student.hidden_PH, student.projection, targets_P, teacher_P, answers, weights_P, self._beta)

    def count(self, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        return self._answers(batch).is_counted(_with_target(batch, weights_P)).sum()

    def measures(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._last.items()}

    def _answers(self, batch: TorchBatch) -> Answers:
        if batch.pairs is None:
            raise ConfigError("loss term 'dpkd' reads pairs of answers; set loader.pairs")
        sequences = sequences_of_slots(batch.segment_ids_BT)
        return Answers(sequences[batch.flat_positions_P], batch.pairs, batch.num_sequences)


def _with_target(batch: TorchBatch, weights_P: Tensor) -> Tensor:
    return torch.where(batch.target_ids_P == NO_TARGET, 0.0, weights_P)
