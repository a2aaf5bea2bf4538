"""The counts taken of each shard when it is written, so that `kdcache info` need not read the data."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from kdcache.format.record import NO_TARGET, Distributions, SequenceRecord


@dataclass
class ShardStatistics:
    """Running totals over the sequences of a shard; sums in float64. Fields as in `ShardInfo`."""

    vocab_size: int
    num_sequences: int = 0
    num_tokens: int = 0
    num_positions: int = 0
    num_entries: int = 0
    num_targets: int = 0
    num_impossible_targets: int = 0
    target_logprob_sum: float = 0.0
    tail_mass_sum: float = 0.0
    entropy_floor_sum: float = 0.0
    entropy_ceiling_sum: float = 0.0
    column_bytes: dict[str, int] = field(default_factory=dict)
    num_finished: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    num_exact_entries: int | msgspec.UnsetType = msgspec.UNSET

    def add(self, record: SequenceRecord, target_logprobs_P: NDArray[np.float32]) -> None:
        """Count one sound sequence, with the teacher's logprobs of its targets."""
        distributions = record.distributions
        has_target_P = record.sequence.target_ids_P != NO_TARGET
        floor_P, ceiling_P = entropy_bounds(distributions, self.vocab_size)
        self.num_sequences += 1
        self.num_tokens += record.sequence.num_tokens
        self.num_positions += distributions.num_positions
        self.num_entries += distributions.num_entries
        self.num_targets += int(has_target_P.sum())
        # Counted apart: they would make the sum -inf, which JSON cannot hold and which would hide all else.
        impossible_P = np.isneginf(target_logprobs_P)
        self.num_impossible_targets += int(impossible_P.sum())
        self.target_logprob_sum += float(target_logprobs_P[has_target_P & ~impossible_P].sum(dtype=np.float64))
        self.tail_mass_sum += float(distributions.tail_mass_P.sum(dtype=np.float64))
        self.entropy_floor_sum += float(floor_P.sum())
        self.entropy_ceiling_sum += float(ceiling_P.sum())
        if distributions.num_exact_P is not None:
            before = 0 if isinstance(self.num_exact_entries, msgspec.UnsetType) else self.num_exact_entries
            self.num_exact_entries = before + int(distributions.num_exact_P.sum())
        finish = record.sequence.finish
        if finish:
            counts = {} if isinstance(self.num_finished, msgspec.UnsetType) else self.num_finished
            self.num_finished = dict(sorted({**counts, finish: counts.get(finish, 0) + 1}.items()))

    def add_column_bytes(self, name: str, num_bytes: int) -> None:
        """Count a record batch's buffers of one column."""
        self.column_bytes[name] = self.column_bytes.get(name, 0) + num_bytes


def entropy_bounds(distributions: Distributions, vocab_size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least and greatest entropy, in nats, of distributions with these exact entries and tail masses.

    With tail mass r, H = -sum_S p log p - r log r + r H(tail), and H(tail) lies between 0 and log(V - K). Both bounds are the
    teacher's own entropy where that is stored.

    Returns:
        (P,) and (P,) float64.
    """
    if distributions.entropy_P is not None:
        entropy_P = distributions.entropy_P.astype(np.float64)
        return entropy_P, entropy_P
    logprobs_E = distributions.logprobs_E.astype(np.float64)
    probabilities_E = np.where(distributions.is_exact_E, np.exp(logprobs_E), 0.0)
    terms_E = -np.where(probabilities_E > 0, logprobs_E, 0.0) * probabilities_E
    sums = np.concatenate([[0.0], np.cumsum(terms_E)])
    support_P = sums[distributions.offsets_P1[1:]] - sums[distributions.offsets_P1[:-1]]
    tail_P = distributions.tail_mass_P.astype(np.float64)
    floor_P = support_P - tail_P * np.log(np.where(tail_P > 0, tail_P, 1.0))
    num_exact_P = distributions.num_entries_P if distributions.num_exact_P is None else distributions.num_exact_P
    num_outside_P = np.maximum(vocab_size - num_exact_P, 1)
    return floor_P, floor_P + tail_P * np.log(num_outside_P)
