"""Padding taken off a foreign sequence by the mask that comes with its tokens, and padding that no mask shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.foreign.base import Finding, ForeignSequence
from kdcache.foreign.blocks import SENTINEL

LEAST_RUN, LEAST_SHARE, LEAST_SEQUENCES = 3, 0.4, 4
"""Text may end in a few blank lines; not two sequences in five, in runs of one token and of unlike lengths."""


def without_padding(sequence: ForeignSequence, mask_N: Any, where: str) -> ForeignSequence:
    """The sequence between its padding on the left and on the right, positions and mask cut alike.

    Args:
        sequence: with tokens and the positions that its positions claim among ALL tokens, padding included.
        mask_N: (N,) 0 for padding; None without a mask.
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
    kept_P = (sequence.positions_P >= start) & (sequence.positions_P < end)
    kept_E = np.repeat(kept_P, sequence.counts_P)
    return replace(
        sequence,
        input_ids_N=ids_N[start:end],
        positions_P=sequence.positions_P[kept_P] - start,
        counts_P=sequence.counts_P[kept_P],
        token_ids_E=sequence.token_ids_E[kept_E],
        values_E=sequence.values_E[kept_E],
        log_z_P=None if sequence.log_z_P is None else sequence.log_z_P[kept_P],
        learnt_N=None if sequence.learnt_N is None else sequence.learnt_N[start:end],
    )


@dataclass
class PaddingRuns:
    """Runs of one token at the ends of sequences, over all of them.

    Attributes:
        num_sequences: with tokens.
        lengths: (side, token) -> length of the run -> sequences.
    """

    num_sequences: int = 0
    lengths: dict[tuple[str, int], Counter[int]] = field(default_factory=dict)

    def add_sequence(self, sequence: ForeignSequence) -> None:
        """Look at both ends of one sequence; at its end only where a student would learn the run."""
        ids_N = sequence.input_ids_N
        if ids_N is None or not len(ids_N):
            return
        self.num_sequences += 1
        before, behind = _run(ids_N), _run(ids_N[::-1])
        if before == len(ids_N):
            return
        if before >= LEAST_RUN:
            self.lengths.setdefault(("start with", int(ids_N[0])), Counter())[before] += 1
        if behind >= LEAST_RUN and _is_learnt(sequence, len(ids_N) - behind):
            self.lengths.setdefault(("end in", int(ids_N[-1])), Counter())[behind] += 1

    def findings(self) -> Iterator[Finding]:
        """What looks like padding."""
        for (side, token), lengths in self.lengths.items():
            count = lengths.total()
            if len(lengths) < 2 or count < max(LEAST_SHARE * self.num_sequences, LEAST_SEQUENCES):
                continue
            sentence = (
                f"{count:,} of {self.num_sequences:,} sequences {side} {min(lengths)} to {max(lengths)} times the token "
                f"{token}: that looks like padding, which would be read and learnt as text, and no column says where it is; "
                "name the mask with --column attention_mask=NAME, or cut the padding off"
            )
            yield Finding("padding", "undecided", sentence)


def _run(ids_N: NDArray[np.int64]) -> int:
    """Tokens at the start that are alike."""
    others = np.flatnonzero(ids_N != ids_N[0])
    return int(others[0]) if len(others) else len(ids_N)


def _is_learnt(sequence: ForeignSequence, start: int) -> bool:
    """Whether a position with an entry is about a token of the run, and no mask leaves it out."""
    position_E = np.repeat(np.arange(len(sequence.counts_P)), sequence.counts_P)
    given = np.unique(position_E[sequence.values_E > SENTINEL])
    targets = sequence.positions_P[given] + 1
    assert sequence.input_ids_N is not None
    targets = targets[(targets > start) & (targets < len(sequence.input_ids_N))]
    return bool(len(targets)) and (sequence.learnt_N is None or bool(sequence.learnt_N[targets].any()))
