"""A teacher asked twice about the same texts, alone and in a batch: its answer for a text must not move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.foreign.judge.compare import divergence, supports_of
from kdcache.format.manifest import SelectionInfo, TeacherIdentity
from kdcache.format.record import Distributions, TokenSequence
from kdcache.teacher.base import Teacher

FULL_PRECISION = ("float32", "float64")
FULL_PRECISION_NATS, HALF_PRECISION_NATS = 1e-5, 2e-2
"""Mean KL of a text's answer alone and in a batch, up to which rounding explains it: kernels are chosen by shape."""


@dataclass(frozen=True, eq=False)
class AskedTwice:
    """The answers to the same sequences, in their order: one at a time, and all in one call, which the backend batches."""

    alone: Sequence[Distributions]
    together: Sequence[Distributions]

    def movement(self, positions: Sequence[NDArray[np.integer]] | None = None) -> list[NDArray[np.float64]]:
        """(P,) nats of KL(alone || together) for each sequence; at these of its supervised positions, None for all."""
        pairs = zip(self.alone, self.together, strict=True)
        moved = [divergence(*(supports_of(d.num_entries_P, d.token_ids_E, d.logprobs_E) for d in pair)) for pair in pairs]
        return moved if positions is None else [kl_P[at] for kl_P, at in zip(moved, positions, strict=True)]


def ask_twice(teacher: Teacher, sequences: Sequence[TokenSequence], selection: SelectionInfo) -> AskedTwice:
    """Ask alone first, the last sequence first: no batch mate, and another order than any capture's."""
    alone = [next(iter(teacher.score([sequence], selection))) for sequence in reversed(sequences)][::-1]
    return AskedTwice(alone, list(teacher.score(sequences, selection)))


def rounding_nats(identity: TeacherIdentity) -> float:
    """Mean KL that another batch may cost in the teacher's precision."""
    return FULL_PRECISION_NATS if identity.dtype in FULL_PRECISION else HALF_PRECISION_NATS


def what_moved(moved: Sequence[NDArray[np.float64]], identity: TeacherIdentity) -> str | None:
    """A sentence where some sequence's answer moves by more than rounding explains."""
    worst = max((float(kl_P.mean()) for kl_P in moved if len(kl_P)), default=0.0)
    explained = rounding_nats(identity)
    if not worst > explained:
        return None
    return (
        f"the teacher's answer for a text depends on the others in its batch: KL(alone || in a batch) is {worst:.3g} nats per "
        f"position in the text that moves most, and rounding in {identity.dtype} explains {explained:g}; what it says in "
        "batches is not what it says of the text"
    )
