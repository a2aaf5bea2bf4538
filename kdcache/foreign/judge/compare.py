"""Stored rows beside live ones, pure NumPy: divergence, shift, temperature, offset; for foreign rows and for ours.

Shape letters: R rows, E entries of all rows (ragged), C entries that stored and live have in common.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FLOOR = 1e-9
"""Probability below which a cell counts as this: a tail that was cut off has 0, and its divergence would be infinite."""

MINIMISING_STEPS = 32
TINY = 1e-300

MIN_SPREAD = 1e-3
"""Nats squared: rows flatter than this say nothing of a temperature."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Supports of R rows: entry e belongs to row rows_E[e]; logprobs over the whole vocabulary, the k most probable of each."""

    num_rows: int
    rows_E: NDArray[np.int64]
    ids_E: NDArray[np.int64]
    logprobs_E: NDArray[np.float64]

    def take(self, chosen: NDArray[np.int64]) -> Rows:
        """The chosen rows, in their order, -1 for a row without entries; each is chosen once at most."""
        new_R = np.full(self.num_rows, -1, np.int64)
        new_R[chosen[chosen >= 0]] = np.flatnonzero(chosen >= 0)
        kept_E = new_R[self.rows_E] >= 0
        return Rows(len(chosen), new_R[self.rows_E[kept_E]], self.ids_E[kept_E], self.logprobs_E[kept_E])

    def mass(self) -> NDArray[np.float64]:
        """(R,) probability of the support."""
        return sums(self.rows_E, np.exp(self.logprobs_E), self.num_rows)


def ragged_rows(counts_R: NDArray[np.integer], ids_E: NDArray[np.integer], logprobs_E: NDArray[np.floating]) -> Rows:
    """Rows of entries that stand one after another."""
    rows_E = np.repeat(np.arange(len(counts_R)), counts_R)
    return Rows(len(counts_R), rows_E, ids_E.astype(np.int64), logprobs_E.astype(np.float64))


def sums(rows_E: NDArray[np.int64], weights_E: NDArray[np.float64], num_rows: int) -> NDArray[np.float64]:
    """(R,) the sum of the weights of each row's entries."""
    return np.bincount(rows_E, weights_E, num_rows).astype(np.float64)


def match(stored: Rows, live: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (into stored's entries, into live's) of the entries that name the same id in the same row."""
    width = int(max(stored.ids_E.max(initial=0), live.ids_E.max(initial=0))) + 1
    ours, theirs = stored.rows_E * width + stored.ids_E, live.rows_E * width + live.ids_E
    order = np.argsort(theirs, kind="stable")
    at_E = np.searchsorted(theirs, ours, sorter=order)
    found_E = np.append(order, 0)[np.minimum(at_E, len(order))]
    hit_E = (at_E < len(order)) & (len(order) > 0)
    hit_E[hit_E] = theirs[found_E[hit_E]] == ours[hit_E]
    return np.flatnonzero(hit_E), found_E[hit_E]


def divergence(live: Rows, stored: Rows) -> NDArray[np.float64]:
    """(R,) KL(live || stored) in nats, as far as two cut rows tell: the least that distributions can have that agree with them.

    Cells: each common id; the ids A that only live names, those B that only stored names, and the rest. What stored gives to A
    is not known, but no id of it can have more than stored's least entry; and so for live and B. The divergence is jointly
    convex in the two unknown masses, and is minimised over them. One distribution cut at two places gives 0.
    """
    in_stored, in_live = match(stored, live)
    num_rows = live.num_rows
    rows_C = stored.rows_E[in_stored]
    p_C, q_C = np.exp(live.logprobs_E[in_live]), np.exp(stored.logprobs_E[in_stored])
    terms_C = p_C * (np.maximum(live.logprobs_E[in_live], -700) - np.maximum(stored.logprobs_E[in_stored], math.log(FLOOR)))
    a_R, most_x_R = _lone(live, in_live, stored)
    b_R, most_y_R = _lone(stored, in_stored, live)
    v_R = np.clip(1 - sums(rows_C, p_C, num_rows) - a_R, 0, 1)
    u_R = np.clip(1 - sums(rows_C, q_C, num_rows) - b_R, 0, 1)
    x_R, y_R = _least_divergent(a_R, b_R, u_R, v_R, (np.minimum(most_x_R, u_R), np.minimum(most_y_R, v_R)))
    divergence_R = sums(rows_C, terms_C, num_rows)
    for p_R, q_R in ((a_R, x_R), (y_R, b_R), (v_R - y_R, u_R - x_R)):
        divergence_R += _cell(p_R, q_R)
    return np.maximum(divergence_R, 0.0)


def _lone(mine: Rows, matched: NDArray[np.int64], other: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mass of my unmatched entries, and the most that the other can give to so many ids that it does not name."""
    lone_E = np.ones(len(mine.rows_E), bool)
    lone_E[matched] = False
    rows_E = mine.rows_E[lone_E]
    least_R = np.zeros(other.num_rows)
    np.minimum.at(least_R, other.rows_E, other.logprobs_E)
    mass_R = sums(rows_E, np.exp(mine.logprobs_E[lone_E]), mine.num_rows)
    return mass_R, sums(rows_E, np.exp(least_R)[rows_E], mine.num_rows)


def _least_divergent(
    a_R: NDArray[np.float64], b_R: NDArray[np.float64], u_R: NDArray[np.float64], v_R: NDArray[np.float64],
    most: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
    """x = q(A) and y = p(B) that minimise a log(a/x) + y log(y/b) + (v-y) log((v-y)/(u-x)), within 0 and the most of each.

    By turns: given y the best x is u a / (a + v - y), given x the best y is v b / (b + u - x); a convex function over a box.
    """
    x_R, y_R = np.minimum(a_R, most[0]), np.minimum(b_R, most[1])
    for _ in range(MINIMISING_STEPS):
        x_R = np.minimum(most[0], u_R * a_R / np.maximum(a_R + v_R - y_R, TINY))
        y_R = np.minimum(most[1], v_R * b_R / np.maximum(b_R + u_R - x_R, TINY))
    return x_R, y_R


def _cell(p_R: NDArray[np.float64], q_R: NDArray[np.float64]) -> NDArray[np.float64]:
    # Rounding leaves cells of either sign near 0: what is under the floor on both sides is nothing.
    p_R, q_R = np.clip(p_R, 0, 1), np.clip(q_R, 0, 1)
    is_cell_R = (p_R > FLOOR) | (q_R > FLOOR)
    return np.where(is_cell_R, p_R * (np.log(np.maximum(p_R, FLOOR)) - np.log(np.maximum(q_R, FLOOR))), 0.0)


@dataclass(frozen=True)
class LineFit:
    """stored = slope x live + an offset per row, over common entries.

    Attributes:
        slope: 1 / the temperature that was applied to the stored values; NaN where all rows are flat.
        offset_mean, offset_std: of stored - live, the mean in each row; a renormalised row has -log(kept mass) there.
        residual: root mean square of what the line leaves, in nats.
        max_difference: greatest |stored - live|.
        num_entries: common ones.
    """

    slope: float
    offset_mean: float
    offset_std: float
    residual: float
    max_difference: float
    num_entries: int


def fit_line(stored: Rows, live: Rows) -> LineFit:
    """Ask in what way the stored values differ from the live ones."""
    in_stored, in_live = match(stored, live)
    s_C, l_C, rows_C = stored.logprobs_E[in_stored], live.logprobs_E[in_live], stored.rows_E[in_stored]
    usable_C = np.isfinite(s_C) & np.isfinite(l_C)
    s_C, l_C, rows_C = s_C[usable_C], l_C[usable_C], rows_C[usable_C]
    if not len(s_C):
        return LineFit(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    number_R = np.maximum(np.bincount(rows_C, minlength=stored.num_rows), 1)
    mean_s_R = sums(rows_C, s_C, stored.num_rows) / number_R
    mean_l_R = sums(rows_C, l_C, stored.num_rows) / number_R
    ds_C, dl_C = s_C - mean_s_R[rows_C], l_C - mean_l_R[rows_C]
    spread = float((dl_C**2).sum())
    slope = float((ds_C * dl_C).sum()) / spread if spread > MIN_SPREAD else math.nan
    residual = math.sqrt(float(((ds_C - (0.0 if math.isnan(slope) else slope) * dl_C) ** 2).mean()))
    offsets = (mean_s_R - mean_l_R)[np.unique(rows_C)]
    return LineFit(slope, float(offsets.mean()), float(offsets.std()), residual, float(np.abs(s_C - l_C).max()), len(s_C))
