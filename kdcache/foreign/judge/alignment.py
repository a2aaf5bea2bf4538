"""Which shift of the positions makes the text most probable: the verdict, from the totals of `probes.Tally`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdcache.foreign.blocks import SHIFTS
from kdcache.foreign.probes import CLAIMED, INVERSE_TEMPERATURES, ProbeCounts

MIN_POSITIONS = 32
MIN_MARGIN_NATS = 0.05
MIN_DEVIATIONS = 4.0
UNTEMPERED = int(np.abs(INVERSE_TEMPERATURES - 1).argmin())
MIN_LIKELIHOOD_RATIO = 4.5
"""Nats: three standard deviations."""

MIN_CALIBRATION_POSITIONS = 200
"""Below this the peak over inverse temperatures is noise: its standard error is about 1 / sqrt(positions x variance of a
logprob)."""


@dataclass(frozen=True)
class Alignment:
    """What the text says of where positions belong.

    Attributes:
        verdict: `aligned`, `shifted`, or `unclear`: too few positions, or no shift that stands out.
        shift: that of the least NLL; a position that claims position t is in truth that of t + shift.
        nll: nats per position for each of SHIFTS, conditional on the support: for comparing with each other only.
        hit_share: for each of SHIFTS, positions whose support holds the target.
        margin: nats by which the best beats the next, and `deviations` the same in standard errors.
        num_positions: that have a target under every shift.
    """

    verdict: Literal["aligned", "shifted", "unclear"]
    shift: int
    nll: tuple[float, ...]
    hit_share: tuple[float, ...]
    margin: float
    deviations: float
    num_positions: int


def judge(counts: ProbeCounts) -> Alignment:
    """Give the verdict. Margins are paired over positions, and wide: a position is not independent of its neighbours."""
    num_positions = counts.num_paired
    if not num_positions:
        return Alignment("unclear", 0, (math.nan,) * len(SHIFTS), (math.nan,) * len(SHIFTS), math.nan, math.nan, 0)
    best = int(counts.score_sum.argmax())
    rivals = [index for index in range(len(SHIFTS)) if index != best]
    if best == CLAIMED:
        margins = {index: -counts.score_diff_sum[index] / num_positions for index in rivals}
    else:
        margins = {index: (counts.score_sum[best] - counts.score_sum[index]) / num_positions for index in rivals}
    # Differences are kept against the claimed alignment; against the third one the claimed one's spread stands in.
    errors = {index: _standard_error(counts, index if best == CLAIMED else best) for index in rivals}
    nearest = min(rivals, key=lambda index: margins[index])
    margin, error = float(margins[nearest]), float(errors[nearest])
    deviations = margin / error if error > 0 else math.inf
    is_clear = num_positions >= MIN_POSITIONS and margin > MIN_MARGIN_NATS and deviations > MIN_DEVIATIONS
    verdict = "unclear" if not is_clear else "aligned" if best == CLAIMED else "shifted"
    return Alignment(
        verdict,
        SHIFTS[best],
        tuple((-counts.score_sum / num_positions).tolist()),
        tuple((counts.hits / num_positions).tolist()),
        margin,
        deviations,
        num_positions,
    )


def applied_temperature(counts: ProbeCounts, shift: int) -> float | None:
    """The temperature that seems to have been applied to the values already: the inverse temperature under which the text is
    most probable, given that the teacher is calibrated; None where too few targets are inside the support to tell."""
    index = SHIFTS.index(shift)
    if counts.hits[index] < MIN_CALIBRATION_POSITIONS:
        return None
    likelihoods = counts.calibration_sum[index]
    peak = int(likelihoods.argmax())
    if not likelihoods[peak] - likelihoods[UNTEMPERED] > MIN_LIKELIHOOD_RATIO:  # positions of one entry say the same at any
        return 1.0
    return float(INVERSE_TEMPERATURES[peak])


def _standard_error(counts: ProbeCounts, index: int) -> float:
    num_positions = counts.num_paired
    mean = counts.score_diff_sum[index] / num_positions
    variance = max(counts.score_diff_squares[index] / num_positions - mean**2, 0.0)
    return math.sqrt(variance / num_positions)
