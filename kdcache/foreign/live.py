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
from kdcache.foreign.blocks import SHIFTS, as_logprobs
from kdcache.foreign.compare import LineFit, Rows, divergence, fit_line, match, ragged_rows, sums
from kdcache.foreign.neighbours import ask_twice, what_moved
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions, TokenSequence, sequence_key
from kdcache.teacher.base import Teacher

MAX_LIVE_ENTRIES = 1024
"""Of a live row: twice what is stored is enough to see whether a support is the teacher's, and engines cap what they give."""


@dataclass(frozen=True)
class Comparison:
    """Stored rows beside the teacher's, over a sample.

    Attributes:
        num_sequences, num_rows: compared; num_rows under the best shift.
        kl: for each of SHIFTS, mean nats of KL(live || stored) over the rows that have a live row there.
        shift: that of the least.
        line: how the stored values differ under it; `exact_line` the same over the ranks that are stored and not fitted.
        kept_mass, renormalisation_cost: means of the live mass of the stored supports, and of -log of it: the KL that a student
            pays who takes the support for the whole.
        moved: a sentence where the teacher's answer for a text depends on the texts beside it.
    """

    num_sequences: int
    num_rows: int
    kl: tuple[float, ...]
    shift: int
    line: LineFit
    exact_line: LineFit
    kept_mass: float
    renormalisation_cost: float
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
    shift = SHIFTS[int(np.nanargmin(kl))] if not all(map(math.isnan, kl)) else 0
    joined = [paired(stored, live, s.positions_R + shift) for stored, live, s in pairs]
    live, stored = concatenated([pair[0] for pair in joined]), concatenated([pair[1] for pair in joined])
    line = fit_line(stored, live)
    kept_R = kept_live_mass(stored, live)
    return Comparison(
        num_sequences=len(usable),
        num_rows=stored.num_rows,
        kl=kl,
        shift=shift,
        line=line,
        exact_line=line if approximate_from is None else fit_line(leading(stored, approximate_from), live),
        kept_mass=float(kept_R.mean()),
        renormalisation_cost=float(-np.log(np.maximum(kept_R, 1e-12)).mean()),
        moved=what_moved(asked.movement(), teacher.identity),
    )


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
    return Rows(rows.num_rows, rows.rows_E[kept_E], rows.ids_E[kept_E], np.minimum(rows.logprobs_E[kept_E], 50.0))


def live_rows(answer: Distributions) -> Rows:
    """The teacher's answer; row p is its p-th position."""
    return ragged_rows(answer.num_entries_P, answer.token_ids_E, answer.logprobs_E)


def paired(stored: Rows, live: Rows, positions_R: NDArray[np.int64]) -> tuple[Rows, Rows]:
    """(live, stored) rows side by side: stored row r with the live row of its position, where it has one and is not empty."""
    filled_R = np.bincount(stored.rows_E, minlength=stored.num_rows) > 0
    rows = np.flatnonzero(filled_R & (positions_R >= 0) & (positions_R < live.num_rows))
    return live.take(positions_R[rows]), stored.take(rows)


def leading(rows: Rows, number: int) -> Rows:
    """The first entries of each row."""
    rank_E = np.arange(len(rows.rows_E)) - np.searchsorted(rows.rows_E, rows.rows_E)
    kept_E = rank_E < number
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
