"""A teacher asked again about some sequences, and what it says compared with what is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.foreign.base import ForeignSequence, ValueKind
from kdcache.foreign.blocks import SHIFTS, as_logprobs, may_hold_extra
from kdcache.foreign.judge.compare import LineFit, Supports, divergence, fit_line, match, sums, supports_of
from kdcache.foreign.judge.neighbours import ask_twice, what_moved
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions, TokenSequence, sequence_key
from kdcache.teacher.base import Teacher

MAX_LIVE_ENTRIES = 1024
"""Entries of a live position: twice as many as are stored show whether a support is the teacher's, and engines have caps."""

OUTLIER_NATS, OUTLIER_FACTOR = 0.1, 8.0
"""A position differs by more than rounding where an entry is off by this, and by this many times the median position's
difference: bfloat16 and other engines move whole caches, damaged bytes move single positions."""

NAMED_OUTLIERS = 3

SHIFT_FACTOR = 0.5
"""Another shift must leave at most this much of the KL: a foreign text gives 2.49, 2.49 and 2.46."""


@dataclass(frozen=True)
class Comparison:
    """Stored positions compared with the teacher's, over a sample.

    Attributes:
        num_sequences, num_positions: compared; num_positions under the best shift.
        kl: for each of SHIFTS, mean nats of KL(live || stored) over the positions that have a live position there.
        shift: that of the least, where it is far less than elsewhere; else 0.
        line: how the stored values differ under it; `exact_line` the same over the ranks that are stored and not fitted.
        common_share: of the stored entries under it, those that the live positions name too: near 1 for any distortion
            of values.
        kept_mass, renormalisation_cost: means of the live mass of the stored supports, and of -log of it: the KL that a student
            pays who takes the support for the whole.
        exact_kl: KL of the ranks that are stored and not fitted; that of all where nothing is fitted.
        fitted_error: mean |stored - live| of fitted entries in nats; NaN where there are none.
        typical_difference: median over positions of the greatest difference in a position, in nats: rounding, and engines.
        num_outlier_positions: positions that differ by far more than that; `outliers` names some, (source, position, nats).
        sequence_kl: (source, mean KL under the best shift) of each sequence.
        moved: a sentence where the teacher's answer for a text depends on the others in its batch.
    """

    num_sequences: int
    num_positions: int
    kl: tuple[float, ...]
    shift: int
    line: LineFit
    exact_line: LineFit
    common_share: float
    kept_mass: float
    renormalisation_cost: float
    exact_kl: float
    fitted_error: float
    typical_difference: float
    num_outlier_positions: int
    outliers: tuple[tuple[str, int, float], ...]
    sequence_kl: tuple[tuple[str, float], ...]
    moved: str | None = None


def compare_with_teacher(
    sequences: Sequence[ForeignSequence], values: ValueKind, teacher: Teacher, *, approximate_from: int | None
) -> Comparison:
    """Score the sequences with the teacher, each alone, and compare.

    Raises:
        InputError: no sequence is short enough for the teacher, or has ids that it knows. TeacherError: it fails.
    """
    usable = [s for s in sequences if is_readable(s, teacher)]
    if not usable:
        raise InputError(
            f"none of the {len(sequences)} sampled sequences can be read by the teacher "
            f"{teacher.identity.model!r}: they have no tokens, ids outside its {teacher.identity.vocab_size}, "
            f"or more tokens than {teacher.identity.context_length}"
        )
    widest = max(int(s.counts_P.max(initial=1)) for s in usable)
    asked = ask_twice(teacher, [token_sequence(s) for s in usable], live_selection(widest, teacher.identity.vocab_size))
    pairs = [(stored_supports(s, values), live_supports(a), s) for s, a in zip(usable, asked.alone, strict=True)]
    kl = tuple(
        _mean([divergence(*paired(stored, live, s.positions_P + shift)) for stored, live, s in pairs]) for shift in SHIFTS
    )
    shift = _clear_shift(kl)
    joined = [paired(stored, live, s.positions_P + shift) for stored, live, s in pairs]
    live, stored = concatenated([pair[0] for pair in joined]), concatenated([pair[1] for pair in joined])
    line = fit_line(stored, live)
    exact = leading(stored, approximate_from) if approximate_from else stored
    kept_P = kept_live_mass(stored, live)
    differences = [differences_of(*pair) for pair in joined]
    typical, outlying = _outliers(differences)
    return Comparison(
        num_sequences=len(usable),
        num_positions=stored.num_positions,
        kl=kl,
        shift=shift,
        line=line,
        exact_line=fit_line(exact, live),
        common_share=line.num_entries / max(len(stored.position_E), 1),
        kept_mass=float(kept_P.mean()),
        renormalisation_cost=float(-np.log(np.maximum(kept_P, 1e-12)).mean()),
        exact_kl=_mean([divergence(live, exact)]),
        fitted_error=_fitted_error(stored, live, approximate_from),
        typical_difference=typical,
        num_outlier_positions=len(outlying),
        outliers=tuple(
            (usable[s].source, _position(pairs[s][0], usable[s].positions_P + shift, position), float(differences[s][position]))
            for s, position in outlying[:NAMED_OUTLIERS]
        ),
        sequence_kl=tuple(_sequence_kl(usable, joined, approximate_from)),
        moved=what_moved(asked.movement(), teacher.identity),
    )


def _clear_shift(kl: tuple[float, ...]) -> int:
    """The shift of the least KL, where that is far less than elsewhere; else 0."""
    known = {shift: value for shift, value in zip(SHIFTS, kl, strict=True) if not math.isnan(value)}
    best = min(known, key=lambda shift: known[shift], default=0)
    others = [value for shift, value in known.items() if shift != best]
    return best if others and known[best] < SHIFT_FACTOR * min(others) else 0


def _sequence_kl(
    sequences: Sequence[ForeignSequence], pairs: Sequence[tuple[Supports, Supports]], approximate_from: int | None
) -> Iterator[tuple[str, float]]:
    for sequence, (live, stored) in zip(sequences, pairs, strict=True):
        exact = leading(stored, approximate_from) if approximate_from else stored
        if exact.num_positions:
            yield sequence.source, _mean([divergence(live, exact)])


def differences_of(live: Supports, stored: Supports) -> NDArray[np.float64]:
    """Return (P,) the greatest |stored - live| in nats of a position.

    Over common entries, and over stored entries above the least live one that the live support does not name.
    """
    in_stored, in_live = match(stored, live)
    differences_P = np.zeros(stored.num_positions)
    np.maximum.at(differences_P, stored.position_E[in_stored], np.abs(stored.logprobs_E[in_stored] - live.logprobs_E[in_live]))
    least_P = np.full(live.num_positions, np.inf)
    np.minimum.at(least_P, live.position_E, live.logprobs_E)
    lone_E = np.ones(len(stored.position_E), bool)
    lone_E[in_stored] = False
    np.maximum.at(differences_P, stored.position_E[lone_E], stored.logprobs_E[lone_E] - least_P[stored.position_E[lone_E]])
    return differences_P


def _outliers(differences: Sequence[NDArray[np.float64]]) -> tuple[float, list[tuple[int, int]]]:
    """The typical difference, and (sequence, position) of those that are far beyond it, the greatest first."""
    together = np.concatenate(differences)
    if not len(together):
        return math.nan, []
    typical = float(np.median(together))
    limit = max(OUTLIER_NATS, OUTLIER_FACTOR * typical)
    found = [
        (-found_P[position], s, int(position))
        for s, found_P in enumerate(differences)
        for position in np.flatnonzero(found_P > limit)
    ]
    return typical, [(s, position) for _, s, position in sorted(found)]


def _position(stored: Supports, positions_P: NDArray[np.int64], index: int) -> int:
    """The position of a position of those that `paired` has kept."""
    filled_P = np.bincount(stored.position_E, minlength=stored.num_positions) > 0
    return int(positions_P[filled_P & (positions_P >= 0)][index])


def _fitted_error(stored: Supports, live: Supports, approximate_from: int | None) -> float:
    if approximate_from is None:
        return math.nan
    in_stored, in_live = match(stored, live)
    is_fitted_common = (ranks(stored) >= approximate_from)[in_stored]
    errors_common = np.abs(stored.logprobs_E[in_stored] - live.logprobs_E[in_live])[is_fitted_common]
    return float(errors_common.mean()) if len(errors_common) else math.nan


def live_selection(widest: int, vocab_size: int) -> SelectionInfo:
    """The top-k to ask for where at most `widest` entries are stored."""
    return SelectionInfo(
        kind="top_k", params={"k": min(vocab_size, max(2 * widest, widest + 16), max(MAX_LIVE_ENTRIES, widest))}
    )


def is_readable(sequence: ForeignSequence, teacher: Teacher) -> bool:
    """Whether the teacher can be asked about it."""
    ids_N, identity = sequence.input_ids_N, teacher.identity
    if ids_N is None or not 1 <= len(ids_N) <= identity.context_length:
        return False
    return int(ids_N.min()) >= 0 and int(ids_N.max()) < identity.vocab_size


def token_sequence(sequence: ForeignSequence) -> TokenSequence:
    """The item for a teacher, every position supervised."""
    assert sequence.input_ids_N is not None
    ids_N, supervised_N = sequence.input_ids_N.astype(np.int32), np.ones(len(sequence.input_ids_N), np.bool_)
    return TokenSequence(
        input_ids_N=ids_N,
        supervised_N=supervised_N,
        roles_N=np.zeros(len(ids_N), np.uint8),
        turn_starts=np.zeros(1, np.int32),
        source=sequence.source,
        key=sequence_key(ids_N, supervised_N, ""),
    )


def stored_supports(sequence: ForeignSequence, values: ValueKind) -> Supports:
    """Return the stored supports, as logprobs if their kind gives them; entries that are not finite are left out."""
    log_z_E = None if sequence.log_z_P is None else np.repeat(sequence.log_z_P, sequence.counts_P)
    logprobs_E = as_logprobs(sequence.values_E[:, None], values, log_z_E)[:, 0]
    positions = supports_of(sequence.counts_P, sequence.token_ids_E, logprobs_E)
    kept_E = np.isfinite(logprobs_E) & (sequence.token_ids_E >= 0)
    extra_P = may_hold_extra(sequence, values)
    if extra_P.any():  # `divergence` bounds what is not stored by a position's least entry, which must not be the text's choice
        least_P = np.full(positions.num_positions, np.inf)
        np.minimum.at(least_P, positions.position_E[kept_E], logprobs_E[kept_E])
        kept_E &= ~(extra_P[positions.position_E] & (logprobs_E <= least_P[positions.position_E]))
    return Supports(
        positions.num_positions,
        positions.position_E[kept_E],
        positions.ids_E[kept_E],
        np.minimum(positions.logprobs_E[kept_E], 50.0),
    )


def live_supports(answer: Distributions) -> Supports:
    """The teacher's answer; position p is its p-th position."""
    return supports_of(answer.num_entries_P, answer.token_ids_E, answer.logprobs_E)


def paired(stored: Supports, live: Supports, positions_P: NDArray[np.int64]) -> tuple[Supports, Supports]:
    """Pair (live, stored) supports: each stored one that is not empty with the live one at the index that it claims."""
    filled_P = np.bincount(stored.position_E, minlength=stored.num_positions) > 0
    positions = np.flatnonzero(filled_P & (positions_P >= 0) & (positions_P < live.num_positions))
    return live.take(positions_P[positions]), stored.take(positions)


def ranks(positions: Supports) -> NDArray[np.int64]:
    """Return (E,) the rank of each entry in its position."""
    return np.arange(len(positions.position_E)) - np.searchsorted(positions.position_E, positions.position_E)


def leading(positions: Supports, index: int) -> Supports:
    """The first entries of each position."""
    kept_E = ranks(positions) < index
    return Supports(
        positions.num_positions, positions.position_E[kept_E], positions.ids_E[kept_E], positions.logprobs_E[kept_E]
    )


def concatenated(parts: Sequence[Supports]) -> Supports:
    """Positions of several sequences, one after another."""
    starts = np.cumsum([0, *(part.num_positions for part in parts)])
    return Supports(
        int(starts[-1]),
        np.concatenate([part.position_E + start for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.ids_E for part in parts]),
        np.concatenate([part.logprobs_E for part in parts]),
    )


def kept_live_mass(stored: Supports, live: Supports) -> NDArray[np.float64]:
    """Return (P,) the live mass of the stored ids, as far as the live support names them."""
    _, in_live = match(stored, live)
    return np.minimum(sums(live.position_E[in_live], np.exp(live.logprobs_E[in_live]), live.num_positions), 1.0)


def _mean(parts: Sequence[NDArray[np.float64]]) -> float:
    values = np.concatenate(parts)
    return float(values.mean()) if len(values) else math.nan


def reservoir(
    sequences: Iterator[ForeignSequence], size: int, seed: int
) -> Iterator[tuple[ForeignSequence, list[ForeignSequence]]]:
    """Pass sequences on, with a list that at the end holds `size` of them, each as likely as any other."""
    rng = np.random.default_rng((seed, 0x5A3))
    kept: list[ForeignSequence] = []
    for index, sequence in enumerate(sequences):
        if len(kept) < size:
            kept.append(sequence)
        elif (slot := int(rng.integers(index + 1))) < size:
            kept[slot] = sequence
        yield sequence, kept
