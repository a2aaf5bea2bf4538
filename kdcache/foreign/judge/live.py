"""A teacher asked again about some sequences, and what it says beside what is stored.

Shape letters: N tokens, R stored rows, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.foreign.base import ForeignSequence, ValueKind
from kdcache.foreign.blocks import SHIFTS, as_logprobs, extra_rows
from kdcache.foreign.judge.compare import LineFit, Rows, divergence, fit_line, match, ragged_rows, sums
from kdcache.foreign.judge.neighbours import ask_twice, what_moved
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions, TokenSequence, sequence_key
from kdcache.teacher.base import Teacher

MAX_LIVE_ENTRIES = 1024
"""Of a live row: twice what is stored is enough to see whether a support is the teacher's, and engines cap what they give."""

OUTLIER_NATS, OUTLIER_FACTOR = 0.1, 8.0
"""A row differs by more than rounding where an entry is off by this, and by this many times what rows are off by in the
median: bfloat16 and other engines move whole caches, damaged bytes move rows."""

NAMED_OUTLIERS = 3

SHIFT_FACTOR = 0.5
"""Another shift must leave at most this much of the KL: a foreign text gives 2.49, 2.49 and 2.46."""


@dataclass(frozen=True)
class Comparison:
    """Stored rows beside the teacher's, over a sample.

    Attributes:
        num_sequences, num_rows: compared; num_rows under the best shift.
        kl: for each of SHIFTS, mean nats of KL(live || stored) over the rows that have a live row there.
        shift: that of the least, where it is far less than elsewhere; else 0.
        line: how the stored values differ under it; `exact_line` the same over the ranks that are stored and not fitted.
        common_share: of the stored entries under it, those that the live rows name too: near 1 for any distortion of values.
        kept_mass, renormalisation_cost: means of the live mass of the stored supports, and of -log of it: the KL that a student
            pays who takes the support for the whole.
        exact_kl: KL of the ranks that are stored and not fitted; that of all where nothing is fitted.
        fitted_error: mean |stored - live| of fitted entries in nats; NaN where there are none.
        typical_difference: median over rows of the greatest difference in a row, in nats: rounding, and engines.
        num_outlier_rows: rows that differ by far more than that; `outliers` names some, (source, position, nats).
        sequence_kl: (source, mean KL under the best shift) of each sequence.
        moved: a sentence where the teacher's answer for a text depends on the texts beside it.
    """

    num_sequences: int
    num_rows: int
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
    num_outlier_rows: int
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
            f"none of the {len(sequences)} sampled sequences can be read by the teacher {teacher.identity.model!r}: they have "
            "no "
            f"tokens, ids outside its {teacher.identity.vocab_size}, or more tokens than {teacher.identity.context_length}"
        )
    widest = max(int(s.counts_R.max(initial=1)) for s in usable)
    asked = ask_twice(teacher, [token_sequence(s) for s in usable], live_selection(widest, teacher.identity.vocab_size))
    pairs = [(stored_rows(s, values), live_rows(a), s) for s, a in zip(usable, asked.alone, strict=True)]
    kl = tuple(
        _mean([divergence(*paired(stored, live, s.positions_R + shift)) for stored, live, s in pairs]) for shift in SHIFTS
    )
    shift = _clear_shift(kl)
    joined = [paired(stored, live, s.positions_R + shift) for stored, live, s in pairs]
    live, stored = concatenated([pair[0] for pair in joined]), concatenated([pair[1] for pair in joined])
    line = fit_line(stored, live)
    exact = leading(stored, approximate_from) if approximate_from else stored
    kept_R = kept_live_mass(stored, live)
    differences = [row_differences(*pair) for pair in joined]
    typical, outlying = _outliers(differences)
    return Comparison(
        num_sequences=len(usable),
        num_rows=stored.num_rows,
        kl=kl,
        shift=shift,
        line=line,
        exact_line=fit_line(exact, live),
        common_share=line.num_entries / max(len(stored.rows_E), 1),
        kept_mass=float(kept_R.mean()),
        renormalisation_cost=float(-np.log(np.maximum(kept_R, 1e-12)).mean()),
        exact_kl=_mean([divergence(live, exact)]),
        fitted_error=_fitted_error(stored, live, approximate_from),
        typical_difference=typical,
        num_outlier_rows=len(outlying),
        outliers=tuple(
            (usable[s].source, _position(pairs[s][0], usable[s].positions_R + shift, row), float(differences[s][row]))
            for s, row in outlying[:NAMED_OUTLIERS]
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
    sequences: Sequence[ForeignSequence], pairs: Sequence[tuple[Rows, Rows]], approximate_from: int | None
) -> Iterator[tuple[str, float]]:
    for sequence, (live, stored) in zip(sequences, pairs, strict=True):
        exact = leading(stored, approximate_from) if approximate_from else stored
        if exact.num_rows:
            yield sequence.source, _mean([divergence(live, exact)])


def row_differences(live: Rows, stored: Rows) -> NDArray[np.float64]:
    """(R,) the greatest |stored - live| in nats over a row's common entries, and over stored ones above the least live one
    that the live row does not name."""
    in_stored, in_live = match(stored, live)
    differences_R = np.zeros(stored.num_rows)
    np.maximum.at(differences_R, stored.rows_E[in_stored], np.abs(stored.logprobs_E[in_stored] - live.logprobs_E[in_live]))
    least_R = np.full(live.num_rows, np.inf)
    np.minimum.at(least_R, live.rows_E, live.logprobs_E)
    lone_E = np.ones(len(stored.rows_E), bool)
    lone_E[in_stored] = False
    np.maximum.at(differences_R, stored.rows_E[lone_E], stored.logprobs_E[lone_E] - least_R[stored.rows_E[lone_E]])
    return differences_R


def _outliers(differences: Sequence[NDArray[np.float64]]) -> tuple[float, list[tuple[int, int]]]:
    """The typical difference, and (sequence, row) of those that are far beyond it, the greatest first."""
    together = np.concatenate(differences)
    if not len(together):
        return math.nan, []
    typical = float(np.median(together))
    limit = max(OUTLIER_NATS, OUTLIER_FACTOR * typical)
    found = [(-rows_R[row], s, int(row)) for s, rows_R in enumerate(differences) for row in np.flatnonzero(rows_R > limit)]
    return typical, [(s, row) for _, s, row in sorted(found)]


def _position(stored: Rows, positions_R: NDArray[np.int64], number: int) -> int:
    """The position of a row of those that `paired` has kept."""
    filled_R = np.bincount(stored.rows_E, minlength=stored.num_rows) > 0
    return int(positions_R[filled_R & (positions_R >= 0)][number])


def _fitted_error(stored: Rows, live: Rows, approximate_from: int | None) -> float:
    if approximate_from is None:
        return math.nan
    in_stored, in_live = match(stored, live)
    is_fitted_C = (ranks(stored) >= approximate_from)[in_stored]
    errors_C = np.abs(stored.logprobs_E[in_stored] - live.logprobs_E[in_live])[is_fitted_C]
    return float(errors_C.mean()) if len(errors_C) else math.nan


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


def stored_rows(sequence: ForeignSequence, values: ValueKind) -> Rows:
    """The stored rows, as logprobs where their kind gives them; entries that are no number are left out."""
    log_z_E = None if sequence.log_z_R is None else np.repeat(sequence.log_z_R, sequence.counts_R)
    logprobs_E = as_logprobs(sequence.values_E[:, None], values, log_z_E)[:, 0]
    rows = ragged_rows(sequence.counts_R, sequence.token_ids_E, logprobs_E)
    kept_E = np.isfinite(logprobs_E) & (sequence.token_ids_E >= 0)
    extra_R = extra_rows(sequence, values)
    if extra_R.any():  # `divergence` bounds what is not stored by a row's least entry, which must not be the text's choice
        least_R = np.full(rows.num_rows, np.inf)
        np.minimum.at(least_R, rows.rows_E[kept_E], logprobs_E[kept_E])
        kept_E &= ~(extra_R[rows.rows_E] & (logprobs_E <= least_R[rows.rows_E]))
    return Rows(rows.num_rows, rows.rows_E[kept_E], rows.ids_E[kept_E], np.minimum(rows.logprobs_E[kept_E], 50.0))


def live_rows(answer: Distributions) -> Rows:
    """The teacher's answer; row p is its p-th position."""
    return ragged_rows(answer.num_entries_P, answer.token_ids_E, answer.logprobs_E)


def paired(stored: Rows, live: Rows, positions_R: NDArray[np.int64]) -> tuple[Rows, Rows]:
    """(live, stored) rows side by side: stored row r with the live row of its position, where it has one and is not empty."""
    filled_R = np.bincount(stored.rows_E, minlength=stored.num_rows) > 0
    rows = np.flatnonzero(filled_R & (positions_R >= 0) & (positions_R < live.num_rows))
    return live.take(positions_R[rows]), stored.take(rows)


def ranks(rows: Rows) -> NDArray[np.int64]:
    """(E,) the place of each entry in its row."""
    return np.arange(len(rows.rows_E)) - np.searchsorted(rows.rows_E, rows.rows_E)


def leading(rows: Rows, number: int) -> Rows:
    """The first entries of each row."""
    kept_E = ranks(rows) < number
    return Rows(rows.num_rows, rows.rows_E[kept_E], rows.ids_E[kept_E], rows.logprobs_E[kept_E])


def concatenated(parts: Sequence[Rows]) -> Rows:
    """Rows of several sequences, one after another."""
    starts = np.cumsum([0, *(part.num_rows for part in parts)])
    return Rows(
        int(starts[-1]),
        np.concatenate([part.rows_E + start for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.ids_E for part in parts]),
        np.concatenate([part.logprobs_E for part in parts]),
    )


def kept_live_mass(stored: Rows, live: Rows) -> NDArray[np.float64]:
    """(R,) what the teacher gives to the ids that are stored, as far as the live row names them."""
    _, in_live = match(stored, live)
    return np.minimum(sums(live.rows_E[in_live], np.exp(live.logprobs_E[in_live]), live.num_rows), 1.0)


def _mean(parts: Sequence[NDArray[np.float64]]) -> float:
    values = np.concatenate(parts)
    return float(values.mean()) if len(values) else math.nan


def reservoir(
    sequences: Iterator[ForeignSequence], size: int, seed: int
) -> Iterator[tuple[ForeignSequence, list[ForeignSequence]]]:
    """Pass sequences on, with a list that at the end holds `size` of them, each as likely as any other."""
    rng = np.random.default_rng((seed, 0x5A3))
    kept: list[ForeignSequence] = []
    for number, sequence in enumerate(sequences):
        if len(kept) < size:
            kept.append(sequence)
        elif (place := int(rng.integers(number + 1))) < size:
            kept[place] = sequence
        yield sequence, kept
