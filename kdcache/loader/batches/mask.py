"""Which of a sequence's cached positions are learned from, chosen when it is read. Pure functions.

A position t is judged by the token that it predicts, t + 1: its role is that token's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.config.loader import MaskConfig
from kdcache.format.record import ROLES, TokenSequence
from kdcache.loader.batches.batch import NO_ROLE


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What a mask makes of one sequence.

    Attributes:
        keep_P: (P,) bool; None where all are kept.
        kept_weights: float32, one for each position kept; None where all are 1.
    """

    keep_P: NDArray[np.bool_] | None = None
    kept_weights: NDArray[np.float32] | None = None


EVERYTHING = Choice()


def choose(sequence: TokenSequence, mask: MaskConfig) -> Choice:
    """The positions of a sequence that a mask keeps, and their weights."""
    if mask.is_all:
        return EVERYTHING
    positions_P = sequence.positions_P
    weights_P = _weights(sequence, positions_P, mask)
    if mask.drop_first and mask.drop_first_of == "sequence":
        weights_P[positions_P < mask.drop_first] = 0
    elif mask.drop_first:
        weights_P[_tokens_into_turn(sequence, positions_P + 1) < mask.drop_first] = 0
    keep_P = weights_P > 0
    return Choice(keep_P, weights_P[keep_P])


def target_roles(sequence: TokenSequence) -> NDArray[np.uint8]:
    """(P,) the role of the token that each supervised position predicts; NO_ROLE where it predicts none."""
    return np.append(sequence.roles_N[1:], np.uint8(NO_ROLE))[sequence.positions_P]


def choose_reference(sequence: TokenSequence, mask: MaskConfig) -> list[float]:
    """The weight of each supervised position, 0 where it is left out, one by one: the definition of `choose`."""
    weights: list[float] = []
    starts = sequence.turn_starts.tolist()
    for t in sequence.positions_P.tolist():
        has_role = t + 1 < sequence.num_tokens
        role = ROLES[sequence.roles_N[t + 1]] if has_role else None
        weight = mask.role_weights.get(role, 1.0) if role is not None else 1.0
        if (mask.roles is not None or mask.role_weights) and not has_role:
            weight = 0.0
        if mask.roles is not None and role not in mask.roles:
            weight = 0.0
        if mask.drop_first_of == "sequence" and t < mask.drop_first:
            weight = 0.0
        turn_start = max((s for s in starts if s <= t + 1), default=0)
        if mask.drop_first_of == "turn" and t + 1 - turn_start < mask.drop_first:
            weight = 0.0
        weights.append(weight)
    return weights


def _weights(sequence: TokenSequence, positions_P: NDArray[np.int64], mask: MaskConfig) -> NDArray[np.float32]:
    """(P,) by role alone; 0 where the role is not to be learned."""
    if mask.roles is None and not mask.role_weights:
        return np.ones(len(positions_P), np.float32)
    by_role = np.zeros(NO_ROLE + 1, np.float32)
    by_role[: len(ROLES)] = [_role_weight(role, mask) for role in ROLES]
    return by_role[target_roles(sequence)]


def _role_weight(role: str, mask: MaskConfig) -> float:
    if mask.roles is not None and role not in mask.roles:
        return 0.0
    return next((weight for name, weight in mask.role_weights.items() if name == role), 1.0)


def _tokens_into_turn(sequence: TokenSequence, tokens_P: NDArray[np.int64]) -> NDArray[np.int64]:
    """(P,) how far each token is into its turn; what is in front of the first turn's start counts from the sequence's."""
    starts = np.append(0, sequence.turn_starts.astype(np.int64))
    return tokens_P - starts[np.searchsorted(starts, tokens_P, "right") - 1]
