"""Which shift of the rows makes the text most probable: the verdict, from the totals of `probes.Tally`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdcache.foreign.blocks import SHIFTS
from kdcache.foreign.probes import CLAIMED, INVERSE_TEMPERATURES, Tally

MIN_ROWS = 32
MIN_MARGIN_NATS = 0.05
MIN_DEVIATIONS = 4.0
UNTEMPERED = int(np.abs(INVERSE_TEMPERATURES - 1).argmin())
MIN_LIKELIHOOD_RATIO = 4.5
"""Nats: three standard deviations."""

MIN_CALIBRATION_ROWS = 200
"""Below this the peak over inverse temperatures is noise: its standard error is about 1 / sqrt(rows x variance of a
logprob)."""


@dataclass(frozen=True)
class Alignment:
    """What the text says of the rows' places.

    Attributes:
        verdict: `aligned`, `shifted`, or `unclear`: too few rows, or no shift that stands out.
        shift: that of the least NLL; a row that claims position t is in truth that of t + shift.
        nll: nats per row for each of SHIFTS, conditional on the support: for comparing with each other only.
        hit_share: for each of SHIFTS, rows whose support holds the target.
        margin: nats by which the best beats the next, and `deviations` the same in standard errors.
        num_rows: that have a target under every shift.
    """

    verdict: Literal["aligned", "shifted", "unclear"]
    shift: int
    nll: tuple[float, ...]
    hit_share: tuple[float, ...]
    margin: float
    deviations: float
    num_rows: int


def judge(tally: Tally) -> Alignment:
    """The verdict. Margins are paired over rows; a row's neighbours are not independent of it, hence the wide ones."""
    rows = tally.num_paired
    if not rows:
        return Alignment("unclear", 0, (math.nan,) * len(SHIFTS), (math.nan,) * len(SHIFTS), math.nan, math.nan, 0)
    best = int(tally.score_sum.argmax())
    rivals = [index for index in range(len(SHIFTS)) if index != best]
    if best == CLAIMED:
        margins = {index: -tally.score_diff_sum[index] / rows for index in rivals}
    else:
        margins = {index: (tally.score_sum[best] - tally.score_sum[index]) / rows for index in rivals}
    # Differences are kept against the claimed alignment; against the third one the claimed one's spread stands in.
    errors = {index: _standard_error(tally, index if best == CLAIMED else best) for index in rivals}
    nearest = min(rivals, key=lambda index: margins[index])
    margin, error = float(margins[nearest]), float(errors[nearest])
    deviations = margin / error if error > 0 else math.inf
    is_clear = rows >= MIN_ROWS and margin > MIN_MARGIN_NATS and deviations > MIN_DEVIATIONS
    verdict = "unclear" if not is_clear else "aligned" if best == CLAIMED else "shifted"
    return Alignment(
        verdict,
        SHIFTS[best],
        tuple((-tally.score_sum / rows).tolist()),
        tuple((tally.hits / rows).tolist()),
        margin,
        deviations,
        rows,
    )


def applied_temperature(tally: Tally, shift: int) -> float | None:
    """The temperature that seems to have been applied to the values already: the inverse temperature under which the text is
    most probable, given that the teacher is calibrated; None where too few targets are inside the support to tell."""
    index = SHIFTS.index(shift)
    if tally.hits[index] < MIN_CALIBRATION_ROWS:
        return None
    likelihoods = tally.calibration_sum[index]
    peak = int(likelihoods.argmax())
    if not likelihoods[peak] - likelihoods[UNTEMPERED] > MIN_LIKELIHOOD_RATIO:  # rows of one entry say the same at any
        return 1.0
    return float(INVERSE_TEMPERATURES[peak])


def _standard_error(tally: Tally, index: int) -> float:
    rows = tally.num_paired
    mean = tally.score_diff_sum[index] / rows
    variance = max(tally.score_diff_squares[index] / rows - mean**2, 0.0)
    return math.sqrt(variance / rows)
