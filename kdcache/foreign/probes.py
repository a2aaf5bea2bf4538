"""What stored positions show without their teacher: NumPy, one sequence at a time, totals in bounded memory.



Shift s supposes that the distribution that claims index t is in truth that of t + s, so that its target is token t + s
+ 1. Positions of one sequence overlap in what they say, so the margins asked for are wide.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kdcache.foreign.base import ForeignSequence, ValueKind
from kdcache.foreign.blocks import SHIFTS, Block, blocks, has_duplicates, logsumexp, may_hold_extra
from kdcache.foreign.padding import PaddingRuns
from kdcache.foreign.proof import FLOOR_NATS, Proof

CLAIMED = SHIFTS.index(0)
INVERSE_TEMPERATURES = 2.0 ** np.linspace(-2.0, 2.0, 17)
ROUNDING = 4e-3
"""Mass of a bfloat16 position: entries near the top have logprobs of size up to 4, rounded by 2^-8 of that."""
COMPLETE_SHARE = 0.2
"""A power law p(r) ~ r^-a leaves about K p(K) / (a - 1) after rank K; a position that leaves less than a fifth of K p(K) was
renormalised, or ends at a cliff."""

TAIL_RISE_NATS = 0.1
"""A curve fitted to falling numbers may bend up a little at its end; sorted values never rise."""

LARGEST_VOCABULARY = 2**20
"""Where nobody says how many ids there are."""

MAX_CALIBRATION_POSITIONS = 20_000
"""The peak over inverse temperatures stands long before, and 17 exponentials per entry are half the time."""

MAX_UNIT_PROBS = 4096
"""Enough to see whether all are multiples of one number."""

NEGATED_MASS = 0.05
"""Logits are above 0 too; but exp(-logit) of the greatest ones adds up to next to nothing."""

SEAM_STEPS, SEAM_FACTOR = 4, 3.0
"""The step from the last exact entry to the first fitted one, compared with the greatest of this many steps before it."""


@dataclass
class ProbeCounts:
    """Totals over positions; see `add_sequence`.

    Attributes:
        num_sequences, num_tokens, num_positions, num_entries: read.
        num_missing_positions: positions without entries, or whose entries are all -inf.
        num_sequences_without_positions: sequences without a position that has an entry.
        num_positions_outside, num_longer_sequences: positions at no token of their text, and the sequences that have some.
        num_uncovered, num_shorter_sequences: positions with a target to be learnt and no position, and the sequences
            that have some.
        has_log_z: whether positions came with their normaliser.
        sizes: entries in a position -> number of positions.
        min_value, max_value: of the finite values, as stored.
        num_nan, num_positive_infinite, num_negative_infinite: entries.
        num_positive_positions: positions with a value above 0.
        num_prob_positions: positions whose values all lie in [0, 1] and sum to no more than 1.
        num_zero_topped_positions: positions whose greatest value is exactly 0.
        num_tested_mass_positions, mass_sum, mass_max: over positions whose values are finite; a position's mass is the
            sum of exp(logprob).
        num_heavy_positions: with a mass above 1 by more than rounding.
        num_unit_positions: with a mass of 1 within rounding.
        num_complete_testable_positions, num_complete_positions: positions that should leave some mass out, and
            those that leave nothing.
        num_unsorted_positions, num_duplicate_positions, num_negative_ids, max_id: as they say.
        num_padded_ids, padded_mass: entries with an id that the tokenizer does not have, and their probability.
        num_rising_tail_positions, max_tail_rise: positions whose fitted part rises, and the steepest rise in nats.
        tail_rise_sum: over positions, of probability times nats by which fitted values lie above an earlier one.
        num_heavy_exact_positions: of the heavy positions, those that are too heavy without their fitted part.
        num_negated_positions: positions whose values are none below 0, rise, and are logprobs with the other sign.
        unit_position_probs: probabilities of some positions that sum to 1.
        num_seam_positions: positions that fall off a step where the fitted part begins.
        num_first_smallest: positions that start with their least entry.
        least_is_target: per shift, size of position -> positions whose target is their least entry.
        first_is_displaced_target: per shift, positions whose first entry is their least and their target.
        num_paired: positions with a target under every shift.
        hits: per shift, of the paired positions those whose support holds the target.
        score_sum, score_diff_sum, score_diff_squares: per shift, of the targets' conditional logprobs, and of their differences
            to the claimed alignment.
        calibration_sum: [shift, inverse temperature] conditional log-likelihood of targets inside the support, of the first
            MAX_CALIBRATION_POSITIONS of them.
        num_lone_unlikely_positions: positions of one entry that is less likely than the vocabulary's mean: no top 1.
        proof: hits and masses.
        runs: of one token, at the ends of texts.
    """

    vocab_size: int | None = None
    tokenizer_size: int | None = None
    approximate_from: int | None = None
    num_sequences: int = 0
    num_tokens: int = 0
    num_positions: int = 0
    num_entries: int = 0
    num_missing_positions: int = 0
    num_sequences_without_positions: int = 0
    num_positions_outside: int = 0
    num_longer_sequences: int = 0
    num_uncovered: int = 0
    num_shorter_sequences: int = 0
    has_log_z: bool = False
    sizes: Counter[int] = field(default_factory=Counter)
    min_value: float = math.inf
    max_value: float = -math.inf
    num_nan: int = 0
    num_positive_infinite: int = 0
    num_negative_infinite: int = 0
    num_positive_positions: int = 0
    num_prob_positions: int = 0
    num_zero_topped_positions: int = 0
    num_tested_mass_positions: int = 0
    mass_sum: float = 0.0
    mass_max: float = 0.0
    num_heavy_positions: int = 0
    num_unit_positions: int = 0
    num_complete_testable_positions: int = 0
    num_complete_positions: int = 0
    num_unsorted_positions: int = 0
    num_duplicate_positions: int = 0
    num_negative_ids: int = 0
    max_id: int = -1
    num_padded_ids: int = 0
    padded_mass: float = 0.0
    num_rising_tail_positions: int = 0
    max_tail_rise: float = 0.0
    tail_rise_sum: float = 0.0
    num_heavy_exact_positions: int = 0
    num_negated_positions: int = 0
    unit_position_probs: list[float] = field(default_factory=list)
    num_seam_positions: int = 0
    num_first_smallest: int = 0
    least_is_target: list[Counter[int]] = field(default_factory=lambda: [Counter() for _ in SHIFTS])
    first_is_displaced_target: list[int] = field(default_factory=lambda: [0] * len(SHIFTS))
    num_paired: int = 0
    hits: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(SHIFTS), np.int64))
    score_sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    score_diff_sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    score_diff_squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    num_lone_unlikely_positions: int = 0
    proof: Proof = field(default_factory=Proof)
    runs: PaddingRuns = field(default_factory=PaddingRuns)
    calibration_sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros((len(SHIFTS), len(INVERSE_TEMPERATURES))))

    def add_sequence(self, sequence: ForeignSequence, values: ValueKind) -> None:
        """Count one sequence, whose values are of this kind."""
        self.num_sequences += 1
        self.num_tokens += 0 if sequence.input_ids_N is None else len(sequence.input_ids_N)
        self.num_positions += len(sequence.counts_P)
        self.num_entries += len(sequence.values_E)
        self.has_log_z |= sequence.log_z_P is not None
        missing_before = self.num_missing_positions
        self.num_missing_positions += int((sequence.counts_P == 0).sum())
        extra_P = may_hold_extra(sequence, values)
        for block in blocks(sequence, values):
            self._add_values(block)
            self._add_ids(block)
            self._add_mass(block)
            if self.approximate_from is not None:
                self._add_tail(block, self.approximate_from)
            if sequence.input_ids_N is not None:
                self._add_alignment(block)
                self.proof.add_block(block, sequence, extra_P)
        self.proof.close(sequence)
        self.runs.add_sequence(sequence)
        if self.num_missing_positions - missing_before == len(sequence.counts_P):
            self.num_sequences_without_positions += 1
        elif sequence.input_ids_N is not None:
            self._add_position_count(sequence)

    def _add_position_count(self, sequence: ForeignSequence) -> None:
        assert sequence.input_ids_N is not None
        num_tokens = len(sequence.input_ids_N)
        inside_P = (sequence.positions_P >= 0) & (sequence.positions_P < num_tokens)
        outside = int((~inside_P & (sequence.counts_P > 0)).sum())
        to_learn_N = np.ones(num_tokens, np.bool_) if sequence.learnt_N is None else sequence.learnt_N.copy()
        to_learn_N[sequence.positions_P[inside_P] + 1 - num_tokens] = False  # position t is about token t + 1; the last of none
        uncovered = int(to_learn_N[1:].sum())
        self.num_positions_outside += outside
        self.num_longer_sequences += outside > 0
        self.num_uncovered += uncovered
        self.num_shorter_sequences += uncovered > 0

    def _add_values(self, block: Block) -> None:
        values_E = block.values_PK[block.filled_PK]
        finite = values_E[np.isfinite(values_E)]
        self.min_value = min(self.min_value, float(finite.min(initial=math.inf)))
        self.max_value = max(self.max_value, float(finite.max(initial=-math.inf)))
        self.num_nan += int(np.isnan(values_E).sum())
        self.num_positive_infinite += int(np.isposinf(values_E).sum())
        self.num_negative_infinite += int(np.isneginf(values_E).sum())
        self.num_missing_positions += int(np.isneginf(block.logprobs_PK).all(axis=1).sum())
        top_P = np.where(block.filled_PK, block.values_PK, -np.inf).max(axis=1)
        self.num_positive_positions += int((top_P > 0).sum())
        self.num_zero_topped_positions += int((top_P == 0).sum())
        inside_PK = ~block.filled_PK | ((block.values_PK >= 0) & (block.values_PK <= 1))
        with np.errstate(invalid="ignore"):
            negated_P = np.exp(-np.where(block.filled_PK, np.maximum(block.values_PK, 0.0), np.inf)).sum(axis=1)
            is_positive_P = (~block.filled_PK | (block.values_PK >= 0)).all(axis=1)
            rises_P = block.values_PK[:, 0] <= np.where(block.filled_PK, block.values_PK, np.inf).min(axis=1)
            self.num_negated_positions += int(
                (is_positive_P & rises_P & (negated_P >= NEGATED_MASS) & (negated_P <= 1 + ROUNDING)).sum()
            )
            sum_P = np.where(block.filled_PK, block.values_PK, 0).sum(axis=1)
            self.num_prob_positions += int((inside_PK.all(axis=1) & (sum_P <= 1 + ROUNDING) & (sum_P > 0)).sum())
        self.sizes.update(dict(zip(*(a.tolist() for a in np.unique(block.counts_P, return_counts=True)), strict=True)))

    def _add_ids(self, block: Block) -> None:
        # An entry that the engine did not give is -inf, and its id uninitialised memory; it is left out when converted.
        ids_E = block.ids_PK[block.filled_PK & ~np.isneginf(block.logprobs_PK)]
        self.max_id = max(self.max_id, int(ids_E.max(initial=-1)))
        self.num_negative_ids += int((ids_E < 0).sum())
        falls_PK = block.logprobs_PK[:, 1:] > block.logprobs_PK[:, :-1]
        self.num_unsorted_positions += int((falls_PK & block.filled_PK[:, 1:]).any(axis=1).sum())
        self.num_duplicate_positions += int(
            has_duplicates(block.ids_PK, block.filled_PK & ~np.isneginf(block.logprobs_PK)).sum()
        )
        if self.tokenizer_size is not None:
            padded_PK = block.filled_PK & (block.ids_PK >= self.tokenizer_size)
            self.num_padded_ids += int(padded_PK.sum())
            self.padded_mass += float(np.exp(np.minimum(np.nan_to_num(block.logprobs_PK[padded_PK], nan=-np.inf), 0)).sum())

    def _add_mass(self, block: Block) -> None:
        # A position of -inf alone, as padding is, holds no entry.
        finite_P = (~block.filled_PK | (block.logprobs_PK < np.inf)).all(axis=1) & (block.logprobs_PK > -np.inf).any(axis=1)
        logprobs_PK, counts_P = block.logprobs_PK[finite_P], block.counts_P[finite_P]
        with np.errstate(over="ignore"):
            mass_P = np.minimum(np.exp(logprobs_PK).sum(axis=1), 1e30)
        least_P = np.exp(np.minimum(np.where(block.filled_PK[finite_P], logprobs_PK, np.inf).min(axis=1), 0))
        self.num_tested_mass_positions += len(mass_P)
        self.mass_sum += float(mass_P.sum())
        self.mass_max = max(self.mass_max, float(mass_P.max(initial=0)))
        self.num_heavy_positions += int((mass_P > 1 + ROUNDING).sum())
        unit_PK = logprobs_PK[np.abs(mass_P - 1) <= ROUNDING]
        if len(self.unit_position_probs) < MAX_UNIT_PROBS:
            self.unit_position_probs += np.exp(unit_PK[unit_PK > -np.inf]).tolist()[:MAX_UNIT_PROBS]
        vocab_size = max(self.vocab_size or 0, self.tokenizer_size or 0) or LARGEST_VOCABULARY
        self.num_lone_unlikely_positions += int(((counts_P == 1) & (mass_P * vocab_size < 1 - ROUNDING)).sum())
        is_unit_P = np.abs(mass_P - 1) <= ROUNDING
        self.num_unit_positions += int(is_unit_P.sum())
        owed_P = COMPLETE_SHARE * counts_P * least_P
        testable_P = (owed_P > ROUNDING) & (counts_P < (self.vocab_size or math.inf))
        self.num_complete_testable_positions += int(testable_P.sum())
        self.num_complete_positions += int((testable_P & is_unit_P).sum())

    def _add_tail(self, block: Block, first: int) -> None:
        tail_PK = block.logprobs_PK[:, max(first - 1, 0) :]
        both_PK = block.filled_PK[:, max(first - 1, 0) :][:, 1:]
        with np.errstate(invalid="ignore"):
            rises_PK = np.where(both_PK & np.isfinite(tail_PK[:, 1:]), tail_PK[:, 1:] - tail_PK[:, :-1], 0.0)
        rise_P = np.nan_to_num(rises_PK, nan=0.0, posinf=0.0).max(axis=1, initial=0.0)
        self.num_rising_tail_positions += int((rise_P > TAIL_RISE_NATS).sum())
        self.max_tail_rise = max(self.max_tail_rise, float(rise_P.max(initial=0.0)))
        finite_PK = np.where(both_PK & np.isfinite(tail_PK[:, 1:]), tail_PK[:, 1:], -np.inf)
        least_PK = np.minimum.accumulate(np.where(np.isfinite(tail_PK), tail_PK, np.inf), axis=1)[:, :-1]
        over_PK = np.maximum(np.where(np.isfinite(finite_PK), finite_PK - least_PK, 0.0), 0.0)
        self.tail_rise_sum += float((np.exp(np.minimum(finite_PK, 0.0)) * over_PK).sum())
        with np.errstate(over="ignore", invalid="ignore"):
            exact_P = np.exp(block.logprobs_PK[:, :first]).sum(axis=1)
        self.num_heavy_exact_positions += int((exact_P > 1 + ROUNDING).sum())
        if first > SEAM_STEPS and tail_PK.shape[1] > 1:
            before_PK = block.logprobs_PK[:, first - 1 - SEAM_STEPS : first]
            with np.errstate(invalid="ignore"):
                usual_P = (before_PK[:, :-1] - before_PK[:, 1:]).max(axis=1)
                step_P = tail_PK[:, 0] - tail_PK[:, 1]
            self.num_seam_positions += int((both_PK[:, 0] & (step_P > SEAM_FACTOR * usual_P + TAIL_RISE_NATS)).sum())

    def _add_alignment(self, block: Block) -> None:
        sound_P = (block.targets_3P >= 0).all(axis=0) & ~np.isnan(block.logprobs_PK).any(axis=1)
        sound_P &= np.isfinite(block.logprobs_PK[:, 0]) & (block.logprobs_PK < np.inf).all(axis=1)
        positions = np.flatnonzero(sound_P)
        if not len(positions):
            return
        conditional_PK = block.logprobs_PK[positions] - logsumexp(block.logprobs_PK[positions])[:, None]
        filled_PK, ids_PK, counts_P = block.filled_PK[positions], block.ids_PK[positions], block.counts_P[positions]
        least_P = np.where(filled_PK & np.isfinite(conditional_PK), conditional_PK, np.inf).min(axis=1)
        scores_3P = np.empty((len(SHIFTS), len(positions)))
        for shift, targets_P in enumerate(block.targets_3P[:, positions]):
            is_target_PK = filled_PK & (ids_PK == targets_P[:, None])
            hit_P = is_target_PK.any(axis=1)
            at_P = is_target_PK.argmax(axis=1)
            found_P = conditional_PK[np.arange(len(positions)), at_P]
            scores_3P[shift] = np.where(hit_P & np.isfinite(found_P), found_P, least_P - FLOOR_NATS)
            is_least_P = hit_P & (found_P <= least_P) & (counts_P > 1)
            self.hits[shift] += int(hit_P.sum())
            self.least_is_target[shift].update(counts_P[is_least_P].tolist())
            self.first_is_displaced_target[shift] += int((is_least_P & (at_P == 0)).sum())
            if self.hits[shift] < MAX_CALIBRATION_POSITIONS:
                self.calibration_sum[shift] += _calibration(conditional_PK[hit_P], at_P[hit_P])
        self.num_first_smallest += int(((conditional_PK[:, 0] <= least_P) & (counts_P > 1)).sum())
        diff_3P = scores_3P - scores_3P[CLAIMED]
        self.num_paired += len(positions)
        self.score_sum += scores_3P.sum(axis=1)
        self.score_diff_sum += diff_3P.sum(axis=1)
        self.score_diff_squares += (diff_3P**2).sum(axis=1)


def _calibration(conditional_PK: NDArray[np.float64], at_P: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum the target's log-likelihood over positions, sharpened by each inverse temperature."""
    at_target_P = conditional_PK[np.arange(len(at_P)), at_P]
    positions = np.flatnonzero(np.isfinite(at_target_P))[:4096]
    if not len(positions):
        return np.zeros(len(INVERSE_TEMPERATURES))
    sums = [beta * at_target_P[positions] - logsumexp(beta * conditional_PK[positions]) for beta in INVERSE_TEMPERATURES]
    return np.array([values.sum() for values in sums])
