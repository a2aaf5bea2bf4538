"""Stored supports compared with live ones in NumPy: divergence, shift, temperature and offset, of foreign caches and ours."""

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
"""Nats squared: positions flatter than this say nothing of a temperature."""


@dataclass(frozen=True, slots=True, eq=False)
class Supports:
    """Supports of P positions: entry e belongs to position position_E[e].

    Logprobs are over the whole vocabulary; a support holds the k most probable tokens of its position.
    """

    num_positions: int
    position_E: NDArray[np.int64]
    ids_E: NDArray[np.int64]
    logprobs_E: NDArray[np.float64]

    def take(self, chosen: NDArray[np.int64]) -> Supports:
        """The chosen positions, in their order, -1 for a position without entries; each is chosen once at most."""
        new_P = np.full(self.num_positions, -1, np.int64)
        new_P[chosen[chosen >= 0]] = np.flatnonzero(chosen >= 0)
        kept_E = new_P[self.position_E] >= 0
        return Supports(len(chosen), new_P[self.position_E[kept_E]], self.ids_E[kept_E], self.logprobs_E[kept_E])

    def mass(self) -> NDArray[np.float64]:
        """Return (P,) the probability of each support."""
        return sums(self.position_E, np.exp(self.logprobs_E), self.num_positions)


def supports_of(counts_P: NDArray[np.integer], ids_E: NDArray[np.integer], logprobs_E: NDArray[np.floating]) -> Supports:
    """Positions of entries that stand one after another."""
    position_E = np.repeat(np.arange(len(counts_P)), counts_P)
    return Supports(len(counts_P), position_E, ids_E.astype(np.int64), logprobs_E.astype(np.float64))


def sums(position_E: NDArray[np.int64], weights_E: NDArray[np.float64], num_positions: int) -> NDArray[np.float64]:
    """Return (P,) the sum of the weights of each position's entries."""
    return np.bincount(position_E, weights_E, num_positions).astype(np.float64)


def match(stored: Supports, live: Supports) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (into stored's entries, into live's) of the entries that name the same id in the same position."""
    width = int(max(stored.ids_E.max(initial=0), live.ids_E.max(initial=0))) + 1
    ours, theirs = stored.position_E * width + stored.ids_E, live.position_E * width + live.ids_E
    order = np.argsort(theirs, kind="stable")
    at_E = np.searchsorted(theirs, ours, sorter=order)
    found_E = np.append(order, 0)[np.minimum(at_E, len(order))]
    hit_E = (at_E < len(order)) & (len(order) > 0)
    hit_E[hit_E] = theirs[found_E[hit_E]] == ours[hit_E]
    return np.flatnonzero(hit_E), found_E[hit_E]


def divergence(live: Supports, stored: Supports) -> NDArray[np.float64]:
    """Return (P,) the least KL(live || stored) in nats of distributions that agree with both supports.

    Cells: each common id; the ids A that only live names, those B that only stored names, and the rest. What stored gives to A
    is not known, but no id of it can have more than stored's least entry; and so for live and B. The divergence is jointly
    convex in the two unknown masses, and is minimised over them. One distribution cut at two ranks gives 0.
    """
    in_stored, in_live = match(stored, live)
    num_positions = live.num_positions
    position_common = stored.position_E[in_stored]
    p_common, q_common = np.exp(live.logprobs_E[in_live]), np.exp(stored.logprobs_E[in_stored])
    terms_common = p_common * (
        np.maximum(live.logprobs_E[in_live], -700) - np.maximum(stored.logprobs_E[in_stored], math.log(FLOOR))
    )
    a_P, most_x_P = _lone(live, in_live, stored)
    b_P, most_y_P = _lone(stored, in_stored, live)
    v_P = np.clip(1 - sums(position_common, p_common, num_positions) - a_P, 0, 1)
    u_P = np.clip(1 - sums(position_common, q_common, num_positions) - b_P, 0, 1)
    x_P, y_P = _least_divergent(a_P, b_P, u_P, v_P, (np.minimum(most_x_P, u_P), np.minimum(most_y_P, v_P)))
    divergence_P = sums(position_common, terms_common, num_positions)
    for p_P, q_P in ((a_P, x_P), (y_P, b_P), (v_P - y_P, u_P - x_P)):
        divergence_P += _cell(p_P, q_P)
    return np.maximum(divergence_P, 0.0)


def _lone(mine: Supports, matched: NDArray[np.int64], other: Supports) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mass of my unmatched entries, and the most that the other can give to this many ids that it does not name."""
    lone_E = np.ones(len(mine.position_E), bool)
    lone_E[matched] = False
    position_E = mine.position_E[lone_E]
    least_P = np.zeros(other.num_positions)
    np.minimum.at(least_P, other.position_E, other.logprobs_E)
    mass_P = sums(position_E, np.exp(mine.logprobs_E[lone_E]), mine.num_positions)
    return mass_P, sums(position_E, np.exp(least_P)[position_E], mine.num_positions)


def _least_divergent(
    a_P: NDArray[np.float64], b_P: NDArray[np.float64], u_P: NDArray[np.float64], v_P: NDArray[np.float64],
    most: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
    """x = q(A) and y = p(B) that minimise a log(a/x) + y log(y/b) + (v-y) log((v-y)/(u-x)), within 0 and the most of each.

    By turns: given y the best x is u a / (a + v - y), given x the best y is v b / (b + u - x); a convex function over a box.
    """
    x_P, y_P = np.minimum(a_P, most[0]), np.minimum(b_P, most[1])
    for _ in range(MINIMISING_STEPS):
        x_P = np.minimum(most[0], u_P * a_P / np.maximum(a_P + v_P - y_P, TINY))
        y_P = np.minimum(most[1], v_P * b_P / np.maximum(b_P + u_P - x_P, TINY))
    return x_P, y_P


def _cell(p_P: NDArray[np.float64], q_P: NDArray[np.float64]) -> NDArray[np.float64]:
    # Rounding leaves cells of either sign near 0: what is under the floor on both sides is nothing.
    p_P, q_P = np.clip(p_P, 0, 1), np.clip(q_P, 0, 1)
    is_cell_P = (p_P > FLOOR) | (q_P > FLOOR)
    return np.where(is_cell_P, p_P * (np.log(np.maximum(p_P, FLOOR)) - np.log(np.maximum(q_P, FLOOR))), 0.0)


@dataclass(frozen=True)
class LineFit:
    """stored = slope x live + an offset per position, over common entries.

    Attributes:
        slope: 1 / the temperature that was applied to the stored values; NaN where all positions are flat.
        offset_mean, offset_std: of stored - live, the mean in each position; a renormalised position has -log(kept mass) there.
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


def fit_line(stored: Supports, live: Supports) -> LineFit:
    """Ask in what way the stored values differ from the live ones."""
    in_stored, in_live = match(stored, live)
    s_common, l_common, position_common = stored.logprobs_E[in_stored], live.logprobs_E[in_live], stored.position_E[in_stored]
    usable_common = np.isfinite(s_common) & np.isfinite(l_common)
    s_common, l_common, position_common = s_common[usable_common], l_common[usable_common], position_common[usable_common]
    if not len(s_common):
        return LineFit(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    num_common_P = np.maximum(np.bincount(position_common, minlength=stored.num_positions), 1)
    mean_s_P = sums(position_common, s_common, stored.num_positions) / num_common_P
    mean_l_P = sums(position_common, l_common, stored.num_positions) / num_common_P
    ds_common, dl_common = s_common - mean_s_P[position_common], l_common - mean_l_P[position_common]
    spread = float((dl_common**2).sum())
    slope = float((ds_common * dl_common).sum()) / spread if spread > MIN_SPREAD else math.nan
    residual = math.sqrt(float(((ds_common - (0.0 if math.isnan(slope) else slope) * dl_common) ** 2).mean()))
    offsets = (mean_s_P - mean_l_P)[np.unique(position_common)]
    return LineFit(
        slope, float(offsets.mean()), float(offsets.std()), residual, float(np.abs(s_common - l_common).max()), len(s_common)
    )
