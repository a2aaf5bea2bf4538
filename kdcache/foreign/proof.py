"""Whether positions belong to their text, without the teacher: how often targets are in the support, and the supports' mass.

A position that gives its support the probability m says that the target is outside it with probability 1 - m. Over the
positions of a text that its teacher is calibrated on, misses and that add up. A position at the wrong token misses far
more often.

README.md defines the numbers and says what was measured. An axis of length 3 is over SHIFTS.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdcache.foreign.base import ForeignSequence
from kdcache.foreign.blocks import SHIFTS, Block

_SIZES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
TILTS = np.array([*(-size for size in _SIZES), *_SIZES, 5.0, 6.0, 7.0, 8.0])
"""Of the exponential in Chernoff's bound: the odds of a miss are multiplied by exp of these; small ones for many positions."""

LEAST_MISS = 4e-3
"""A position of bfloat16 has no better known mass; and every text has a typing error that no teacher expects."""

FLOOR_NATS = 1.0
"""A target outside the support is scored as the support's least entry minus this: no more is known of it."""

BEYOND, WITHIN = 6.0, 3.0
"""Deviations from which on chance does not explain a miss, and up to which it does."""

FOREIGN_SHARE, SOUND_SHARE, PROVEN_SHARE = 0.7, 0.85, 0.9
"""How much of the way from chance hits to the claimed ones must be found. A chat model that is surer of plain text
than it should be stays above the second; half of the positions elsewhere stay below the first. Between
the last two nothing is proven."""

MIN_COMMON_SHARE = 0.3
"""Of all positions together; below it they are all foreign, and none is to be named."""

GAIN_NATS = 4.0
"""By how much a sequence's text must be likelier under another shift, which fits, to be called shifted where hits alone
are between WITHIN and BEYOND. In sound sequences of fifty positions other shifts are 20 to 700 nats less likely."""

MIN_POSITIONS = 32
MIN_CLAIM = 0.05
"""Positions that hold (nearly) the whole vocabulary hit any text: they must claim this much more than chance."""

NUM_SUSPECTS, NUM_ASKED = 1000, 4
"""Sequences that are kept by name, and those that are kept whole for a teacher to be asked about."""

Verdict = Literal["proven", "consistent", "doubtful", "unclear", "foreign", "untested"]


@dataclass(frozen=True)
class Suspect:
    """A sequence with fewer hits than its positions claim.

    Attributes:
        source: where it is.
        deviations: negative; before the number of sequences is taken into account.
        claimed, found, chance: shares of its positions, as in `Evidence`.
        other_shift: the likeliest shift under which the same positions fit; None where there is none.
        gain: nats by which the text is likelier under that shift, given the support; 0 where there is none.
    """

    source: str
    deviations: float
    claimed: float
    found: float
    chance: float
    other_shift: int | None
    gain: float

    @property
    def share(self) -> float:
        """The found share of the way from chance to what the positions claim."""
        return share(self.claimed, self.found, self.chance)


@dataclass(frozen=True)
class Evidence:
    """What hits and masses say of one shift of the positions.

    Attributes:
        shift: which.
        num_positions, num_sequences: that could be looked at.
        claimed: mean mass of the positions: the share of targets that should be in the support.
        found: the share that is.
        chance: the same under the other shift that hits less often.
        deviations: of all positions, negative for too few hits; exp(-deviations^2 / 2) bounds how likely that is.
        worst: that of the worst sequence, with the number of sequences taken into account; 0 where chance explains it.
        rival: of the other shift that fits best.
        suspects: sequences beyond chance and below FOREIGN_SHARE, the worst first; NUM_SUSPECTS at most.
        verdict: `proven`: this shift fits, and the others do not; `consistent`: it fits, and so does another; `doubtful`,
            `unclear`, `foreign`: it fits less and less; `untested`: too few positions, or positions that hit any text.
    """

    shift: int
    num_positions: int
    num_sequences: int
    claimed: float
    found: float
    chance: float
    deviations: float
    worst: float
    rival: float
    suspects: tuple[Suspect, ...]
    verdict: Verdict

    @property
    def share(self) -> float:
        """The found share of the way from chance to what the positions claim."""
        return share(self.claimed, self.found, self.chance)


@dataclass
class _Sums:
    """Sums over positions per shift: how many, their misses, the misses they claim, and the bound's logarithm per tilt.

    score_3 is the text's logprob over positions that have a target under every shift.
    """

    num_3: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    misses_3: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    claimed_3: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(SHIFTS)))
    bounds_by_shift: NDArray[np.float64] = field(default_factory=lambda: np.zeros((len(SHIFTS), len(TILTS))))
    score_3: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(SHIFTS)))

    def add(self, other: _Sums) -> None:
        self.num_3 += other.num_3
        self.misses_3 += other.misses_3
        self.claimed_3 += other.claimed_3
        self.bounds_by_shift += other.bounds_by_shift
        self.score_3 += other.score_3

    def deviations(self, index: int) -> float:
        """Signed root of twice Chernoff's exponent: for many positions what (hits - masses) / sqrt(sum m (1 - m)) is."""
        excess = self.misses_3[index] - self.claimed_3[index]
        exponents = TILTS * self.misses_3[index] - self.bounds_by_shift[index]
        best = float(exponents[TILTS * excess >= 0].max(initial=0.0))
        return -math.copysign(math.sqrt(2 * best), excess) if best > 0 else 0.0

    def shares(self, index: int) -> tuple[float, float, float]:
        """The hits that are claimed, found, and found by chance, per position."""
        positions = self.num_3
        found_3 = 1 - np.divide(self.misses_3, positions, out=np.ones(len(SHIFTS)), where=positions > 0)
        others = [float(found_3[i]) for i in range(len(SHIFTS)) if i != index and positions[i]]
        claimed = 1 - float(self.claimed_3[index] / positions[index]) if positions[index] else math.nan
        return claimed, float(found_3[index]), min(others, default=0.0)


@dataclass
class Proof:
    """Totals over sequences: `add_block` for each block of one, then `close`."""

    total: _Sums = field(default_factory=_Sums)
    num_sequences: int = 0
    _current: _Sums = field(default_factory=_Sums)
    _worst: list[list[tuple[float, int, Suspect]]] = field(default_factory=lambda: [[] for _ in SHIFTS])
    _whole: list[tuple[float, int, ForeignSequence]] = field(default_factory=list)

    def add_block(self, block: Block, sequence: ForeignSequence, extra_P: NDArray[np.bool_]) -> None:
        """Add positions of one sequence; `extra_P` marks those whose least entry the text may have chosen."""
        given_PK = block.filled_PK & (block.logprobs_PK > -np.inf) & (block.logprobs_PK < np.inf)
        given_PK = _without_least(given_PK, block.logprobs_PK, extra_P[block.index_P])
        mass_P = np.where(given_PK, np.exp(np.minimum(block.logprobs_PK, 50.0)), 0.0).sum(axis=1)
        miss_P = np.clip(1 - mass_P, LEAST_MISS, 1.0)
        usable_P = given_PK.any(axis=1) & ~np.isnan(block.logprobs_PK).any(axis=1) & (mass_P < 2)
        usable_3P = usable_P & (block.targets_3P >= 0) & _learnt(sequence, block)
        bounds_by_position = np.log1p(miss_P[:, None] * np.expm1(TILTS))
        is_target_3PK = np.stack([given_PK & (block.ids_PK == targets_P[:, None]) for targets_P in block.targets_3P])
        hits_3P: NDArray[np.bool_] = np.any(is_target_3PK, axis=2)
        scores_3P = _scores(is_target_3PK, hits_3P, given_PK, block.logprobs_PK)
        self._current.add(_Sums(
            usable_3P.sum(axis=1).astype(np.float64), (usable_3P & ~hits_3P).sum(axis=1).astype(np.float64),
            usable_3P @ miss_P, usable_3P.astype(np.float64) @ bounds_by_position,
            np.where(usable_3P.all(axis=0), scores_3P, 0.0).sum(axis=1),
        ))  # fmt: skip

    def close(self, sequence: ForeignSequence) -> None:
        """The sequence is at its end."""
        sums, self._current = self._current, _Sums()
        if not sums.num_3.any():
            return
        self.total.add(sums)
        self.num_sequences += 1
        for index in range(len(SHIFTS)):
            deviations = sums.deviations(index)
            if deviations >= -WITHIN:
                continue
            suspect = Suspect(sequence.source, deviations, *sums.shares(index), *_other_shift(sums, index))
            _keep(self._worst[index], NUM_SUSPECTS, (-deviations, self.num_sequences, suspect))
            if SHIFTS[index] == 0:
                _keep(self._whole, NUM_ASKED, (-deviations, self.num_sequences, sequence))

    def at(self, shift: int) -> Evidence:
        """What is known of the positions under a shift."""
        index = SHIFTS.index(shift)
        claimed, found, chance = self.total.shares(index)
        deviations = self.total.deviations(index)
        known = sorted((suspect for _, _, suspect in self._worst[index]), key=lambda suspect: suspect.deviations)
        worst = self._among_all(known[0].deviations) if known else 0.0
        # What all sequences have in common, as an applied temperature, makes none of them foreign.
        common = share(claimed, found, chance)
        limit = FOREIGN_SHARE * min(common, 1.0) if common > MIN_COMMON_SHARE else -math.inf
        foreign = [s for s in known if self._is_beyond(s) and s.share < limit]
        rivals = [self.total.deviations(i) for i in range(len(SHIFTS)) if i != index]
        num_positions = int(self.total.num_3[index])
        found_here = Evidence(
            shift,
            num_positions,
            self.num_sequences,
            claimed,
            found,
            chance,
            deviations,
            worst,
            max(rivals),
            tuple(foreign),
            "untested",
        )
        return replace(found_here, verdict=_verdict(found_here, float(np.delete(self.total.num_3, index).min())))

    def suspects(self) -> list[ForeignSequence]:
        """Whole sequences that a teacher should be asked about, the worst first; those that chance explains are left out."""
        kept = sorted(self._whole, key=lambda item: -item[0])
        return [sequence for found, _, sequence in kept if self._among_all(-found) <= -WITHIN]

    def _is_beyond(self, suspect: Suspect) -> bool:
        """Whether a sequence is beyond chance by its hits alone, or by a shift under which its text is likelier."""
        deviations = self._among_all(suspect.deviations)
        is_elsewhere = suspect.gain >= GAIN_NATS + math.log(max(self.num_sequences, 1))
        return deviations <= -BEYOND or (deviations <= -WITHIN and is_elsewhere)

    def _among_all(self, deviations: float) -> float:
        """Deviations of one sequence, as the worst of this many: a bound that is N times as great."""
        rest = deviations**2 - 2 * math.log(max(self.num_sequences, 1))
        return -math.sqrt(rest) if rest > 0 else 0.0


def _verdict(evidence: Evidence, num_rival_positions: float) -> Verdict:
    e = evidence
    if e.num_positions < MIN_POSITIONS or not e.claimed - min(e.chance, e.found) > MIN_CLAIM:
        return "untested"
    if e.suspects or (e.deviations <= -BEYOND and e.share < FOREIGN_SHARE):
        return "foreign"
    if e.deviations <= -BEYOND and e.share < SOUND_SHARE:
        return "unclear"
    if e.deviations <= -WITHIN and e.share < PROVEN_SHARE:
        return "doubtful"
    return "proven" if e.rival <= -BEYOND and num_rival_positions and e.found > e.chance else "consistent"


def share(claimed: float, found: float, chance: float) -> float:
    """Compute the found share of the way from chance to what the positions claim; 1 if they are the same."""
    room = claimed - chance
    return (found - chance) / room if room > MIN_CLAIM else 1.0


def _other_shift(sums: _Sums, index: int) -> tuple[int | None, float]:
    """The likeliest other shift that fits, and how much likelier than this one the text is there."""
    fitting = [i for i in range(len(SHIFTS)) if i != index and sums.num_3[i] and sums.deviations(i) > -WITHIN]
    if not fitting:
        return None, 0.0
    best = max(fitting, key=lambda i: sums.score_3[i])
    return SHIFTS[best], float(sums.score_3[best] - sums.score_3[index])


def _scores(
    is_target_3PK: NDArray[np.bool_], hits_3P: NDArray[np.bool_], given_PK: NDArray[np.bool_], logprobs_PK: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return (3, P) the logprob of each shift's target; outside the support that of the least entry, less a nat."""
    least_P = np.where(given_PK, logprobs_PK, np.inf).min(axis=1)
    found_3P = np.where(is_target_3PK, logprobs_PK, -np.inf).max(axis=2)
    with np.errstate(invalid="ignore"):  # positions without an entry, which are not counted
        return np.where(hits_3P, found_3P, least_P - FLOOR_NATS)


def _without_least(
    given_PK: NDArray[np.bool_], logprobs_PK: NDArray[np.float64], extra_P: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    if not extra_P.any():
        return given_PK
    least_P = np.where(given_PK, logprobs_PK, np.inf).argmin(axis=1)
    kept_PK = given_PK.copy()
    kept_PK[np.flatnonzero(extra_P), least_P[extra_P]] = False
    return kept_PK


def _learnt(sequence: ForeignSequence, block: Block) -> NDArray[np.bool_]:
    """Tell (3, P) whether the file's own mask keeps the token that a position would be about."""
    if sequence.learnt_N is None:
        return np.ones(block.targets_3P.shape, np.bool_)
    at_3P = sequence.positions_P[block.index_P] + 1 + np.array(SHIFTS)[:, None]
    return sequence.learnt_N[np.clip(at_3P, 0, len(sequence.learnt_N) - 1)]


def _keep(kept: list, size: int, item: tuple) -> None:
    if len(kept) < size:
        heapq.heappush(kept, item)
    else:
        heapq.heappushpop(kept, item)
