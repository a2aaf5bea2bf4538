"""What rows of logprobs say of themselves, without the teacher: pure NumPy, a sequence at a time, totals in bounded memory.

Shape letters: N tokens, R rows, K entries per row (padded), E entries (ragged), S shifts, B inverse temperatures.

A row is a distribution; shift s supposes that the row that claims position t is in truth that of position t + s, so that its
target is token t + s + 1. Rows of one sequence overlap in what they say, so the margins asked for are wide.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kdcache.foreign.base import ForeignSequence, ValueKind
from kdcache.foreign.blocks import SHIFTS, Block, blocks, extra_rows, has_duplicates, logsumexp
from kdcache.foreign.padding import PaddingRuns
from kdcache.foreign.proof import FLOOR_NATS, Proof

CLAIMED = SHIFTS.index(0)
INVERSE_TEMPERATURES = 2.0 ** np.linspace(-2.0, 2.0, 17)
ROUNDING = 4e-3
"""Mass of a bfloat16 row: entries near the top have logprobs of size up to 4, rounded by 2^-8 of that."""
COMPLETE_SHARE = 0.2
"""A power law p(r) ~ r^-a leaves about K p(K) / (a - 1) behind rank K; a row that leaves less than a fifth of K p(K) was
renormalised, or ends at a cliff."""

TAIL_RISE_NATS = 0.1
"""A curve fitted to falling numbers may bend up a little at its end; sorted values never rise."""

LARGEST_VOCABULARY = 2**20
"""Where nobody says how many ids there are."""

MAX_CALIBRATION_ROWS = 20_000
"""The peak over inverse temperatures stands long before, and 17 exponentials per entry are half the time."""

MAX_UNIT_PROBS = 4096
"""Enough to see whether all are multiples of one number."""

NEGATED_MASS = 0.05
"""Logits are above 0 too; but exp(-logit) of the greatest ones adds up to next to nothing."""

SEAM_STEPS, SEAM_FACTOR = 4, 3.0
"""The step from the last exact entry to the first fitted one, beside the greatest of this many steps before it."""


@dataclass
class Tally:
    """Totals over rows; see `add_sequence`.

    Attributes:
        num_sequences, num_tokens, num_rows, num_entries: read.
        num_missing_rows: rows without entries, or whose entries are all -inf.
        num_rowless_sequences: sequences without a row that has an entry.
        num_rows_outside, num_longer_sequences: rows at no token of their text, and the sequences that have some.
        num_uncovered, num_shorter_sequences: positions with a target to be learnt and no row, and the sequences that have some.
        has_log_z: whether rows came with their normaliser.
        sizes: entries in a row -> number of rows.
        min_value, max_value: of the finite values, as stored.
        num_nan, num_positive_infinite, num_negative_infinite: entries.
        num_positive_rows: rows with a value above 0.
        num_prob_rows: rows whose values all lie in [0, 1] and sum to no more than 1.
        num_zero_topped_rows: rows whose greatest value is exactly 0.
        num_tested_mass_rows, mass_sum, mass_max: over rows whose values are finite; a row's mass is the sum of exp(logprob).
        num_heavy_rows: with a mass above 1 by more than rounding.
        num_unit_rows: with a mass of 1 within rounding.
        num_complete_testable_rows, num_complete_rows: rows that should leave something behind, and those that leave nothing.
        num_unsorted_rows, num_duplicate_rows, num_negative_ids, max_id: as they say.
        num_padded_ids, padded_mass: entries with an id that the tokenizer does not have, and their probability.
        num_rising_tail_rows, max_tail_rise: rows whose fitted part rises, and the steepest rise in nats.
        tail_rise_sum: over rows, of probability times nats by which fitted values lie above an earlier one.
        num_heavy_exact_rows: of the heavy rows, those that are too heavy without their fitted part.
        num_negated_rows: rows whose values are none below 0, rise, and are logprobs with the other sign.
        unit_row_probs: probabilities of some rows that sum to 1.
        num_seam_rows: rows that fall off a step where the fitted part begins.
        num_first_smallest: rows that start with their least entry.
        least_is_target: per shift, size of row -> rows whose target is their least entry.
        first_is_displaced_target: per shift, rows whose first entry is their least and their target.
        num_paired: rows with a target under every shift.
        hits: per shift, of the paired rows those whose support holds the target.
        score_sum, score_diff_sum, score_diff_squares: per shift, of the targets' conditional logprobs, and of their differences
            to the claimed alignment.
        calibration_sum: [shift, inverse temperature] conditional log-likelihood of targets inside the support, of the first
            MAX_CALIBRATION_ROWS of them.
        num_lone_unlikely_rows: rows of one entry that is less likely than the vocabulary's mean: no top 1.
        proof: hits beside masses.
        runs: of one token, at the ends of texts.
    """

    vocab_size: int | None = None
    tokenizer_size: int | None = None
    approximate_from: int | None = None
    num_sequences: int = 0
    num_tokens: int = 0
    num_rows: int = 0
    num_entries: int = 0
    num_missing_rows: int = 0
    num_rowless_sequences: int = 0
    num_rows_outside: int = 0
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
    num_positive_rows: int = 0
    num_prob_rows: int = 0
    num_zero_topped_rows: int = 0
    num_tested_mass_rows: int = 0
    mass_sum: float = 0.0
    mass_max: float = 0.0
    num_heavy_rows: int = 0
    num_unit_rows: int = 0
    num_complete_testable_rows: int = 0
    num_complete_rows: int = 0
    num_unsorted_rows: int = 0
    num_duplicate_rows: int = 0
    num_negative_ids: int = 0
    max_id: int = -1
    num_padded_ids: int = 0
    padded_mass: float = 0.0
    num_rising_tail_rows: int = 0
    max_tail_rise: float = 0.0
    tail_rise_sum: float = 0.0
    num_heavy_exact_rows: int = 0
    num_negated_rows: int = 0
    unit_row_probs: list[float] = field(default_factory=list)
    num_seam_rows: int = 0
    num_first_smallest: int = 0
    least_is_target: list[Counter[int]] = field(default_factory=lambda: [Counter() for _ in SHIFTS])
    first_is_displaced_target: list[int] = field(default_factory=lambda: [0] * len(SHIFTS))
    num_paired: int = 0
    hits: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(SHIFTS), np.int64))
    score_sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    score_diff_sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    score_diff_squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    num_lone_unlikely_rows: int = 0
    proof: Proof = field(default_factory=Proof)
    runs: PaddingRuns = field(default_factory=PaddingRuns)
    calibration_sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros((len(SHIFTS), len(INVERSE_TEMPERATURES))))

    def add_sequence(self, sequence: ForeignSequence, values: ValueKind) -> None:
        """Count one sequence, whose values are of this kind."""
        self.num_sequences += 1
        self.num_tokens += 0 if sequence.input_ids_N is None else len(sequence.input_ids_N)
        self.num_rows += len(sequence.counts_R)
        self.num_entries += len(sequence.values_E)
        self.has_log_z |= sequence.log_z_R is not None
        missing_before = self.num_missing_rows
        self.num_missing_rows += int((sequence.counts_R == 0).sum())
        extra_R = extra_rows(sequence, values)
        for block in blocks(sequence, values):
            self._add_values(block)
            self._add_ids(block)
            self._add_mass(block)
            if self.approximate_from is not None:
                self._add_tail(block, self.approximate_from)
            if sequence.input_ids_N is not None:
                self._add_alignment(block)
                self.proof.add_block(block, sequence, extra_R)
        self.proof.close(sequence)
        self.runs.add_sequence(sequence)
        if self.num_missing_rows - missing_before == len(sequence.counts_R):
            self.num_rowless_sequences += 1
        elif sequence.input_ids_N is not None:
            self._add_row_count(sequence)

    def _add_row_count(self, sequence: ForeignSequence) -> None:
        assert sequence.input_ids_N is not None
        num_tokens = len(sequence.input_ids_N)
        inside_R = (sequence.positions_R >= 0) & (sequence.positions_R < num_tokens)
        outside = int((~inside_R & (sequence.counts_R > 0)).sum())
        to_learn_N = np.ones(num_tokens, np.bool_) if sequence.learnt_N is None else sequence.learnt_N.copy()
        to_learn_N[sequence.positions_R[inside_R] + 1 - num_tokens] = False  # position t is about token t + 1; the last of none
        uncovered = int(to_learn_N[1:].sum())
        self.num_rows_outside += outside
        self.num_longer_sequences += outside > 0
        self.num_uncovered += uncovered
        self.num_shorter_sequences += uncovered > 0

    def _add_values(self, block: Block) -> None:
        values_E = block.values_RK[block.filled_RK]
        finite = values_E[np.isfinite(values_E)]
        self.min_value = min(self.min_value, float(finite.min(initial=math.inf)))
        self.max_value = max(self.max_value, float(finite.max(initial=-math.inf)))
        self.num_nan += int(np.isnan(values_E).sum())
        self.num_positive_infinite += int(np.isposinf(values_E).sum())
        self.num_negative_infinite += int(np.isneginf(values_E).sum())
        self.num_missing_rows += int(np.isneginf(block.logprobs_RK).all(axis=1).sum())
        top_R = np.where(block.filled_RK, block.values_RK, -np.inf).max(axis=1)
        self.num_positive_rows += int((top_R > 0).sum())
        self.num_zero_topped_rows += int((top_R == 0).sum())
        inside_RK = ~block.filled_RK | ((block.values_RK >= 0) & (block.values_RK <= 1))
        with np.errstate(invalid="ignore"):
            negated_R = np.exp(-np.where(block.filled_RK, np.maximum(block.values_RK, 0.0), np.inf)).sum(axis=1)
            is_positive_R = (~block.filled_RK | (block.values_RK >= 0)).all(axis=1)
            rises_R = block.values_RK[:, 0] <= np.where(block.filled_RK, block.values_RK, np.inf).min(axis=1)
            self.num_negated_rows += int(
                (is_positive_R & rises_R & (negated_R >= NEGATED_MASS) & (negated_R <= 1 + ROUNDING)).sum()
            )
            sum_R = np.where(block.filled_RK, block.values_RK, 0).sum(axis=1)
            self.num_prob_rows += int((inside_RK.all(axis=1) & (sum_R <= 1 + ROUNDING) & (sum_R > 0)).sum())
        self.sizes.update(dict(zip(*(a.tolist() for a in np.unique(block.counts_R, return_counts=True)), strict=True)))

    def _add_ids(self, block: Block) -> None:
        # An entry that the engine did not give is -inf, and its id uninitialised memory; it is left out when converted.
        ids_E = block.ids_RK[block.filled_RK & ~np.isneginf(block.logprobs_RK)]
        self.max_id = max(self.max_id, int(ids_E.max(initial=-1)))
        self.num_negative_ids += int((ids_E < 0).sum())
        falls_RK = block.logprobs_RK[:, 1:] > block.logprobs_RK[:, :-1]
        self.num_unsorted_rows += int((falls_RK & block.filled_RK[:, 1:]).any(axis=1).sum())
        self.num_duplicate_rows += int(has_duplicates(block.ids_RK, block.filled_RK & ~np.isneginf(block.logprobs_RK)).sum())
        if self.tokenizer_size is not None:
            padded_RK = block.filled_RK & (block.ids_RK >= self.tokenizer_size)
            self.num_padded_ids += int(padded_RK.sum())
            self.padded_mass += float(np.exp(np.minimum(np.nan_to_num(block.logprobs_RK[padded_RK], nan=-np.inf), 0)).sum())

    def _add_mass(self, block: Block) -> None:
        # A row of -inf alone, as padding is, holds no entry.
        finite_R = (~block.filled_RK | (block.logprobs_RK < np.inf)).all(axis=1) & (block.logprobs_RK > -np.inf).any(axis=1)
        logprobs_RK, counts_R = block.logprobs_RK[finite_R], block.counts_R[finite_R]
        with np.errstate(over="ignore"):
            mass_R = np.minimum(np.exp(logprobs_RK).sum(axis=1), 1e30)
        least_R = np.exp(np.minimum(np.where(block.filled_RK[finite_R], logprobs_RK, np.inf).min(axis=1), 0))
        self.num_tested_mass_rows += len(mass_R)
        self.mass_sum += float(mass_R.sum())
        self.mass_max = max(self.mass_max, float(mass_R.max(initial=0)))
        self.num_heavy_rows += int((mass_R > 1 + ROUNDING).sum())
        unit_RK = logprobs_RK[np.abs(mass_R - 1) <= ROUNDING]
        if len(self.unit_row_probs) < MAX_UNIT_PROBS:
            self.unit_row_probs += np.exp(unit_RK[unit_RK > -np.inf]).tolist()[:MAX_UNIT_PROBS]
        vocab_size = max(self.vocab_size or 0, self.tokenizer_size or 0) or LARGEST_VOCABULARY
        self.num_lone_unlikely_rows += int(((counts_R == 1) & (mass_R * vocab_size < 1 - ROUNDING)).sum())
        is_unit_R = np.abs(mass_R - 1) <= ROUNDING
        self.num_unit_rows += int(is_unit_R.sum())
        owed_R = COMPLETE_SHARE * counts_R * least_R
        testable_R = (owed_R > ROUNDING) & (counts_R < (self.vocab_size or math.inf))
        self.num_complete_testable_rows += int(testable_R.sum())
        self.num_complete_rows += int((testable_R & is_unit_R).sum())

    def _add_tail(self, block: Block, first: int) -> None:
        tail_RK = block.logprobs_RK[:, max(first - 1, 0) :]
        both_RK = block.filled_RK[:, max(first - 1, 0) :][:, 1:]
        with np.errstate(invalid="ignore"):
            rises_RK = np.where(both_RK & np.isfinite(tail_RK[:, 1:]), tail_RK[:, 1:] - tail_RK[:, :-1], 0.0)
        rise_R = np.nan_to_num(rises_RK, nan=0.0, posinf=0.0).max(axis=1, initial=0.0)
        self.num_rising_tail_rows += int((rise_R > TAIL_RISE_NATS).sum())
        self.max_tail_rise = max(self.max_tail_rise, float(rise_R.max(initial=0.0)))
        finite_RK = np.where(both_RK & np.isfinite(tail_RK[:, 1:]), tail_RK[:, 1:], -np.inf)
        least_RK = np.minimum.accumulate(np.where(np.isfinite(tail_RK), tail_RK, np.inf), axis=1)[:, :-1]
        over_RK = np.maximum(np.where(np.isfinite(finite_RK), finite_RK - least_RK, 0.0), 0.0)
        self.tail_rise_sum += float((np.exp(np.minimum(finite_RK, 0.0)) * over_RK).sum())
        with np.errstate(over="ignore", invalid="ignore"):
            exact_R = np.exp(block.logprobs_RK[:, :first]).sum(axis=1)
        self.num_heavy_exact_rows += int((exact_R > 1 + ROUNDING).sum())
        if first > SEAM_STEPS and tail_RK.shape[1] > 1:
            before_RK = block.logprobs_RK[:, first - 1 - SEAM_STEPS : first]
            with np.errstate(invalid="ignore"):
                usual_R = (before_RK[:, :-1] - before_RK[:, 1:]).max(axis=1)
                step_R = tail_RK[:, 0] - tail_RK[:, 1]
            self.num_seam_rows += int((both_RK[:, 0] & (step_R > SEAM_FACTOR * usual_R + TAIL_RISE_NATS)).sum())

    def _add_alignment(self, block: Block) -> None:
        sound_R = (block.targets_SR >= 0).all(axis=0) & ~np.isnan(block.logprobs_RK).any(axis=1)
        sound_R &= np.isfinite(block.logprobs_RK[:, 0]) & (block.logprobs_RK < np.inf).all(axis=1)
        rows = np.flatnonzero(sound_R)
        if not len(rows):
            return
        conditional_RK = block.logprobs_RK[rows] - logsumexp(block.logprobs_RK[rows])[:, None]
        filled_RK, ids_RK, counts_R = block.filled_RK[rows], block.ids_RK[rows], block.counts_R[rows]
        least_R = np.where(filled_RK & np.isfinite(conditional_RK), conditional_RK, np.inf).min(axis=1)
        scores_SR = np.empty((len(SHIFTS), len(rows)))
        for shift, targets_R in enumerate(block.targets_SR[:, rows]):
            is_target_RK = filled_RK & (ids_RK == targets_R[:, None])
            hit_R = is_target_RK.any(axis=1)
            at_R = is_target_RK.argmax(axis=1)
            found_R = conditional_RK[np.arange(len(rows)), at_R]
            scores_SR[shift] = np.where(hit_R & np.isfinite(found_R), found_R, least_R - FLOOR_NATS)
            is_least_R = hit_R & (found_R <= least_R) & (counts_R > 1)
            self.hits[shift] += int(hit_R.sum())
            self.least_is_target[shift].update(counts_R[is_least_R].tolist())
            self.first_is_displaced_target[shift] += int((is_least_R & (at_R == 0)).sum())
            if self.hits[shift] < MAX_CALIBRATION_ROWS:
                self.calibration_sum[shift] += _calibration(conditional_RK[hit_R], at_R[hit_R])
        self.num_first_smallest += int(((conditional_RK[:, 0] <= least_R) & (counts_R > 1)).sum())
        diff_SR = scores_SR - scores_SR[CLAIMED]
        self.num_paired += len(rows)
        self.score_sum += scores_SR.sum(axis=1)
        self.score_diff_sum += diff_SR.sum(axis=1)
        self.score_diff_squares += (diff_SR**2).sum(axis=1)


def _calibration(conditional_RK: NDArray[np.float64], at_R: NDArray[np.int64]) -> NDArray[np.float64]:
    """(B,) sum over rows of the target's log-likelihood when the row is sharpened by each inverse temperature."""
    at_target_R = conditional_RK[np.arange(len(at_R)), at_R]
    rows = np.flatnonzero(np.isfinite(at_target_R))[:4096]
    if not len(rows):
        return np.zeros(len(INVERSE_TEMPERATURES))
    sums = [beta * at_target_R[rows] - logsumexp(beta * conditional_RK[rows]) for beta in INVERSE_TEMPERATURES]
    return np.array([values.sum() for values in sums])
