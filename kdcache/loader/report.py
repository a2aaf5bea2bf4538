"""What an epoch gave: counted as batches are handed out, checked when it ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.loader.batches.batch import Batch
from kdcache.loader.rows.layout import EpochLayout


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What one rank was given of an epoch, since its start or since it was resumed in the middle.

    Attributes:
        epoch: its number.
        first_batch: where it began; 0 but after a resume.
        is_complete: whether its last batch was given.
        num_batches: that this rank was given; the others are of its share of them.
        num_sequences, num_tokens: real ones.
        num_positions: with a teacher's distribution, the mask's choice.
        num_masked: positions that the mask left out.
        num_slots: rows x row length, empty rows included.
    """

    epoch: int
    first_batch: int = 0
    is_complete: bool = False
    num_batches: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    num_positions: int = 0
    num_masked: int = 0
    num_slots: int = 0

    @property
    def padding_share(self) -> float:
        """Share of the slots that hold no token, in [0, 1]."""
        return 1 - self.num_tokens / self.num_slots if self.num_slots else 0.0

    def ends_at(self, epoch: int, batch: int) -> bool:
        """Whether the next batch to be counted is this one."""
        return (self.epoch, self.first_batch + self.num_batches, self.is_complete) == (epoch, batch, False)

    def plus(self, batch: Batch, num_tokens: int) -> EpochReport:
        """With one batch more."""
        return EpochReport(
            self.epoch,
            self.first_batch,
            self.is_complete,
            num_batches=self.num_batches + 1,
            num_sequences=self.num_sequences + batch.num_sequences,
            num_tokens=self.num_tokens + num_tokens,
            num_positions=self.num_positions + batch.num_positions,
            num_masked=self.num_masked + batch.num_masked,
            num_slots=self.num_slots + batch.input_ids_BT.size,
        )

    def __str__(self) -> str:
        masked = f", {self.num_masked:,} more masked out" if self.num_masked else ""
        return (
            f"epoch {self.epoch}: {self.num_sequences:,} sequences, {self.num_tokens:,} tokens, {self.num_positions:,} "
            f"positions{masked}, in {self.num_batches:,} batches with {self.padding_share:.1%} padding"
        )


class EpochCheck:
    """That a loop over a whole epoch gave what was planned: by its batches' plans all of it, by its batches themselves this
    rank's share."""

    def __init__(self) -> None:
        self._count = self._sum = 0

    def add(self, sequences: NDArray[np.int64]) -> None:
        """Count the sequences that all ranks together were to be given in a batch."""
        self._count, self._sum = self._count + len(sequences), self._sum + int(sequences.sum())

    def raise_unless_all(self, layout: EpochLayout, given: EpochReport | None) -> None:
        """Raise RuntimeError unless that was each sequence as often as planned, as far as count and sum of numbers can tell.

        Args:
            layout: of the epoch.
            given: what was counted in the batches that were read; None where other ranks read a part of them.
        """
        expected, expected_sum = layout.num_sequences, layout.expected_sum()
        if self._count != expected or expected_sum not in (None, self._sum):
            raise RuntimeError(f"an epoch of {expected} sequences gave {self._count}, or others: a bug of kdcache")
        num_tokens = layout.counts().num_tokens
        if given is not None and (given.num_sequences, given.num_tokens) != (expected, num_tokens):
            raise RuntimeError(
                f"the batches of an epoch of {expected} sequences and {num_tokens} tokens hold {given.num_sequences} sequences "
                f"and {given.num_tokens} tokens: a bug of kdcache"
            )
