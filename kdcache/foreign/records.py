"""Foreign sequences as records of ours: shifted, repaired where asked, sorted; with an account of what was left out.

Shape letters: N tokens, R rows, E entries of all rows (ragged), P positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.foreign.base import ForeignCache, ForeignSequence, ValueKind
from kdcache.foreign.blocks import as_logprobs
from kdcache.format.record import NO_TARGET, Distributions, SequenceRecord, TokenSequence, sequence_key

Repair = Literal["k+1", "duplicates", "tails"]
REPAIRS: tuple[Repair, ...] = ("k+1", "duplicates", "tails")
UNKNOWN_TARGET = -np.inf
"""What stands for the logprob of a target outside the support, which foreign caches do not hold: such a target counts among the
impossible ones, which no NLL includes. Any finite number would be made up."""


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """How foreign rows become records.

    Attributes:
        values: what the values are.
        vocab_size: every id must be below it.
        shift: added to each row's position.
        repairs: of REPAIRS.
        widest: entries of the widest rows, for `k+1`.
        has_extra: whether the widest rows hold the target beside their top k; else a row that starts with its least entry does.
    """

    values: ValueKind
    vocab_size: int
    shift: int = 0
    repairs: frozenset[Repair] = frozenset()
    widest: int = 0
    has_extra: bool = False


@dataclass
class Account:
    """What became of the rows: reason -> how many were left out; and what was done to others."""

    num_records: int = 0
    num_positions: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    num_unknown_targets: int = 0


@dataclass(slots=True, eq=False)
class _Entries:
    """Entries of the rows that are kept, E at a time, cut down step by step."""

    rows_E: NDArray[np.int64]
    ids_E: NDArray[np.int64]
    logprobs_E: NDArray[np.float64]
    ranks_E: NDArray[np.int64]

    def keep(self, kept_E: NDArray[np.bool_] | NDArray[np.int64]) -> None:
        self.rows_E, self.ids_E = self.rows_E[kept_E], self.ids_E[kept_E]
        self.logprobs_E, self.ranks_E = self.logprobs_E[kept_E], self.ranks_E[kept_E]


def without_fitted(cache: ForeignCache) -> ForeignCache:
    """The same cache with its exact entries alone: what the repair `tails` makes of it, to be examined as such."""
    first = cache.approximate_from
    if first is None:
        return cache
    findings = tuple(finding for finding in cache.findings if finding.name != "broken_tails")
    read = partial(_exact_sequences, cache.read, first)
    return replace(cache, read=read, approximate_from=None, findings=findings)


def _exact_sequences(read: Callable[[], Iterator[ForeignSequence]], first: int) -> Iterator[ForeignSequence]:
    for sequence in read():
        ranks_E = np.arange(len(sequence.values_E)) - np.repeat(sequence.offsets_R1[:-1], sequence.counts_R)
        kept_E = ranks_E < first
        yield replace(
            sequence,
            counts_R=np.minimum(sequence.counts_R, first),
            token_ids_E=sequence.token_ids_E[kept_E],
            values_E=sequence.values_E[kept_E],
        )


def to_record(sequence: ForeignSequence, options: RecordOptions, account: Account) -> SequenceRecord | None:
    """The record, or None where no row is left.

    Raises:
        InputError: an id outside the vocabulary, a duplicate with another value, a value that is no logprob.
    """
    ids_N = sequence.input_ids_N
    if ids_N is None or not len(ids_N):
        account.left_out["rows without tokens"] += len(sequence.counts_R)
        return None
    _check_ids(sequence, options.values, options.vocab_size)
    positions_R = sequence.positions_R + options.shift
    kept_R = _kept(sequence, positions_R, options.values, account)
    if not kept_R.any():
        account.left_out["sequences without a row"] += 1
        return None
    following_N = np.append(ids_N[1:], NO_TARGET)
    targets_R = np.where(kept_R, following_N[np.clip(positions_R, 0, len(ids_N) - 1)], NO_TARGET)
    entries, known_R = _entries(sequence, kept_R, targets_R, options, account)
    has_entries_R = np.bincount(entries.rows_E, minlength=len(kept_R)) > 0
    account.left_out["rows that a repair leaves no entry in"] += int((kept_R & ~has_entries_R).sum())
    rows = np.flatnonzero(kept_R & has_entries_R)
    if not len(rows):
        account.left_out["sequences without a row"] += 1
        return None
    supervised_N = np.zeros(len(ids_N), np.bool_)
    supervised_N[positions_R[rows]] = True
    distributions = _distributions(entries, rows, targets_R, known_R, account)
    account.num_records += 1
    account.num_positions += len(rows)
    tokens_N = ids_N.astype(np.int32)
    return SequenceRecord(
        TokenSequence(
            input_ids_N=tokens_N,
            supervised_N=supervised_N,
            roles_N=np.zeros(len(ids_N), np.uint8),
            turn_starts=np.zeros(1, np.int32),
            source=sequence.source,
            key=sequence_key(tokens_N, supervised_N, ""),
        ),
        distributions,
    )


def _check_ids(sequence: ForeignSequence, values: ValueKind, vocab_size: int) -> None:
    # Where an engine gave no entry the value is -inf, and the id uninitialised memory.
    given = sequence.token_ids_E[~np.isneginf(as_logprobs(sequence.values_E[:, None], values, None)[:, 0])]
    for what, ids in (("a token of the text", sequence.input_ids_N), ("a stored entry", given)):
        if ids is not None and len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            bad = int(ids.max()) if ids.min() >= 0 else int(ids.min())
            raise InputError(
                f"{sequence.source}: {what} has the id {bad}, outside the vocabulary of {vocab_size}; set --vocab-size"
            )


def _kept(sequence: ForeignSequence, positions_R: NDArray[np.int64], values: ValueKind, account: Account) -> NDArray[np.bool_]:
    assert sequence.input_ids_N is not None
    num_tokens = len(sequence.input_ids_N)
    # A row whose entries are all -inf says nothing: it is missing, and must not be learnt as a tail of mass 1.
    rows_E = np.repeat(np.arange(len(sequence.counts_R)), sequence.counts_R)
    given_E = ~np.isneginf(as_logprobs(sequence.values_E[:, None], values, None)[:, 0])
    filled_R = np.bincount(rows_E[given_E], minlength=len(sequence.counts_R)) > 0
    inside_R = (positions_R >= 0) & (positions_R < num_tokens)
    kept_R = filled_R & inside_R
    account.left_out["empty rows"] += int((~filled_R).sum())
    account.left_out["rows outside their text"] += int((filled_R & ~inside_R).sum())
    if sequence.learnt_N is not None:
        next_learnt_N = np.append(sequence.learnt_N[1:], False)
        masked_R = kept_R & ~next_learnt_N[np.clip(positions_R, 0, num_tokens - 1)]
        account.left_out["rows that the file's mask leaves out"] += int(masked_R.sum())
        kept_R &= ~masked_R
    return kept_R


def _entries(
    sequence: ForeignSequence, kept_R: NDArray[np.bool_], targets_R: NDArray[np.int64], options: RecordOptions, account: Account
) -> tuple[_Entries, NDArray[np.float64]]:
    """The entries of the kept rows after every repair, in order; and (R,) the target's logprob where a repair took it out."""
    counts_R = sequence.counts_R
    log_z_E = None if sequence.log_z_R is None else np.repeat(sequence.log_z_R, counts_R)
    rows_E = np.repeat(np.arange(len(counts_R)), counts_R)
    entries = _Entries(
        rows_E,
        sequence.token_ids_E,
        as_logprobs(sequence.values_E[:, None], options.values, log_z_E)[:, 0],
        np.arange(len(rows_E)) - sequence.offsets_R1[rows_E],
    )
    entries.keep(kept_R[rows_E])
    if np.isnan(entries.logprobs_E).any() or np.isposinf(entries.logprobs_E).any():
        raise InputError(f"{sequence.source}: a value is NaN or infinite; the row cannot be stored")
    known_R = np.full(len(counts_R), np.nan)
    if "k+1" in options.repairs:
        _take_targets_out(entries, counts_R, targets_R, known_R, options)
        account.repaired["k+1"] += int((~np.isnan(known_R)).sum())
    entries.keep(entries.logprobs_E > -np.inf)
    if "duplicates" in options.repairs:
        before = len(entries.rows_E)
        entries.keep(_first_of_each(entries))
        account.repaired["duplicates"] += before - len(entries.rows_E)
    entries.keep(np.lexsort((entries.ids_E, -entries.logprobs_E, entries.rows_E)))
    _refuse_duplicates(entries, sequence.source)
    return entries, known_R


def _take_targets_out(
    entries: _Entries,
    counts_R: NDArray[np.int64],
    targets_R: NDArray[np.int64],
    known_R: NDArray[np.float64],
    options: RecordOptions,
) -> None:
    """Move the target from the support to beside it where the engine added it: there it is the row's least entry."""
    least_R = np.full(len(counts_R), np.inf)
    np.minimum.at(least_R, entries.rows_E, entries.logprobs_E)
    is_least_E = (entries.ids_E == targets_R[entries.rows_E]) & (entries.logprobs_E <= least_R[entries.rows_E])
    where_E = counts_R[entries.rows_E] == options.widest if options.has_extra else entries.ranks_E == 0
    out_E = is_least_E & where_E & (counts_R[entries.rows_E] > 1)
    known_R[entries.rows_E[out_E]] = entries.logprobs_E[out_E]
    entries.keep(~out_E)


def _first_of_each(entries: _Entries) -> NDArray[np.int64]:
    """Indices of the greatest entry of each (row, id)."""
    order = np.lexsort((entries.ranks_E, -entries.logprobs_E, entries.ids_E, entries.rows_E))
    rows, ids = entries.rows_E[order], entries.ids_E[order]
    is_first = np.append(True, (rows[1:] != rows[:-1]) | (ids[1:] != ids[:-1])) if len(order) else np.zeros(0, bool)
    return np.sort(order[is_first])


def _refuse_duplicates(entries: _Entries, source: str) -> None:
    keys = np.sort(entries.rows_E * (int(entries.ids_E.max(initial=0)) + 1) + entries.ids_E)
    if (keys[1:] == keys[:-1]).any():
        raise InputError(f"{source}: a row names an id twice; --repair duplicates keeps the greater value")


def _distributions(
    entries: _Entries, rows: NDArray[np.int64], targets_R: NDArray[np.int64], known_R: NDArray[np.float64], account: Account
) -> Distributions:
    place_R = np.full(len(targets_R), -1)
    place_R[rows] = np.arange(len(rows))
    at_E = place_R[entries.rows_E]
    mass_P = np.bincount(at_E, np.exp(entries.logprobs_E), len(rows))
    # A normaliser in half precision leaves masses a little above 1: they are brought back to it.
    over_P = np.log(np.maximum(mass_P, 1.0))
    account.repaired["masses brought to 1"] += int((over_P > 1e-6).sum())
    logprobs_E = np.minimum(entries.logprobs_E - over_P[at_E], 0.0).astype(np.float32)
    targets_P = targets_R[rows]
    inside_P = np.zeros(len(rows), np.bool_)
    inside_P[at_E[entries.ids_E == targets_P[at_E]]] = True
    outside_P = (targets_P != NO_TARGET) & ~inside_P
    outside = known_R[rows][outside_P]
    account.num_unknown_targets += int(np.isnan(outside).sum())
    counts_P = np.bincount(at_E, minlength=len(rows))
    return Distributions(
        token_ids_E=entries.ids_E.astype(np.int32),
        logprobs_E=logprobs_E,
        offsets_P1=np.concatenate([[0], np.cumsum(counts_P)]).astype(np.int64),
        tail_mass_P=np.clip(1.0 - mass_P, 0.0, 1.0).astype(np.float32),
        outside_target_logprobs_M=np.where(np.isnan(outside), UNKNOWN_TARGET, np.minimum(outside, 0.0)).astype(np.float32),
    )
