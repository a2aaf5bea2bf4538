"""How near a teacher's answers are to the dense definition: numbers for people, and for bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from contracts.teacher import TeacherCase, score

from kdcache.format.record import TokenSequence


@dataclass(frozen=True)
class Agreement:
    """Largest and mean |logprob error| in nats over all entries; share of the entries that are in the dense top-k too."""

    max_error_nats: float
    mean_error_nats: float
    top_k_share: float

    def __str__(self) -> str:
        errors = f"max |error| {self.max_error_nats:.2e} nats, mean {self.mean_error_nats:.2e}"
        return f"{errors}, top-k agreement {self.top_k_share:.4f}"


def measure_agreement(case: TeacherCase, sequences: Sequence[TokenSequence], k: int) -> Agreement:
    """Compare every entry of every answer."""
    errors, shares = [], []
    for sequence, answer in zip(sequences, score(case, sequences, k), strict=True):
        dense_NV = case.dense(sequence)
        ids_NK, logprobs_NK = answer.padded()
        errors.append(np.abs(np.take_along_axis(dense_NV, ids_NK.astype(np.int64), axis=-1) - logprobs_NK).ravel())
        top_NK = np.argpartition(-dense_NV, k - 1, axis=-1)[:, :k]
        shares.append((ids_NK[:, :, None] == top_NK[:, None, :]).any(axis=-1).ravel())
    error_E, shared_E = np.concatenate(errors), np.concatenate(shares)
    return Agreement(float(error_E.max()), float(error_E.mean()), float(shared_E.mean()))
