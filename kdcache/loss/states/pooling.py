"""A student's states pooled over the same positions as the teacher's vectors of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.loss.states.vectors import widened


def sequences_of_slots(segment_ids_BT: Tensor) -> Tensor:
    """(B*T,) int64: which of the batch's sequences a slot is in, counted from its start; -1 at padding.

    Args:
        segment_ids_BT: (B, T) integers, as in a batch: equal within a sequence, 0 at padding.
    """
    is_first_BT = segment_ids_BT > 0
    is_first_BT[:, 1:] &= segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    sequences = is_first_BT.flatten().cumsum(0) - 1
    return torch.where(segment_ids_BT.flatten() > 0, sequences, -1)


def pooled(states_PH: Tensor, sequences_P: Tensor, num_sequences: int, pooling: str) -> Tensor:
    """(S, H) one vector per sequence, float32 (float64 where the states are); zeros where it has no position.

    Args:
        states_PH: (P, H) at the positions that count.
        sequences_P: (P,) index of each one's sequence; within a sequence the positions ascend.
        num_sequences: S.
        pooling: `mean` over a sequence's positions, or the `last` of them.

    Raises:
        LossError: another pooling.
    """
    if pooling not in ("mean", "last"):
        raise LossError(f"pooling is {pooling!r}, but states are pooled by 'mean' or 'last'")
    states_PH = widened(states_PH)
    counts_S = torch.bincount(sequences_P, minlength=num_sequences)
    if pooling == "mean":
        sums_SH = states_PH.new_zeros(num_sequences, states_PH.shape[1]).index_add(0, sequences_P, states_PH)
        return sums_SH / counts_S.clamp_min(1)[:, None]
    if not len(states_PH):  # zeros that hang on the graph all the same
        return states_PH.new_zeros(num_sequences, states_PH.shape[1]) + states_PH.sum()
    last_S = torch.zeros_like(counts_S).scatter_reduce(
        0, sequences_P, torch.arange(len(sequences_P), device=sequences_P.device), "amax", include_self=True
    )
    return states_PH.index_select(0, last_S) * (counts_S > 0)[:, None]
