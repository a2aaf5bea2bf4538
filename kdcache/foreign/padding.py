"""Padding taken off a foreign sequence, by the mask that stands beside its tokens.

Shape letters: N tokens, R rows, E entries (ragged).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from kdcache.errors import InputError
from kdcache.foreign.base import ForeignSequence


def without_padding(sequence: ForeignSequence, mask_N: Any, where: str) -> ForeignSequence:
    """The sequence between its padding on the left and on the right, rows and mask cut alike.

    Args:
        sequence: with tokens and the positions that its rows claim among ALL tokens, padding included.
        mask_N: (N,) 0 for padding; None where there is no mask.
        where: for messages.

    Raises:
        InputError: the mask is not as long as the text, or it has holes in the middle.
    """
    ids_N = sequence.input_ids_N
    if mask_N is None or ids_N is None:
        return sequence
    if len(mask_N) != len(ids_N):
        raise InputError(f"{where}: {len(mask_N)} values of attention_mask for {len(ids_N)} tokens")
    real = np.flatnonzero(mask_N)
    if len(real) == len(ids_N):
        return sequence
    start, end = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
    if end - start != len(real):
        raise InputError(
            f"{where}: attention_mask has {end - start - len(real)} zeros between its ones; padding can stand at the ends alone"
        )
    kept_R = (sequence.positions_R >= start) & (sequence.positions_R < end)
    kept_E = np.repeat(kept_R, sequence.counts_R)
    return replace(
        sequence,
        input_ids_N=ids_N[start:end],
        positions_R=sequence.positions_R[kept_R] - start,
        counts_R=sequence.counts_R[kept_R],
        token_ids_E=sequence.token_ids_E[kept_E],
        values_E=sequence.values_E[kept_E],
        log_z_R=None if sequence.log_z_R is None else sequence.log_z_R[kept_R],
        learnt_N=None if sequence.learnt_N is None else sequence.learnt_N[start:end],
    )
