"""Foreign sequences as records of ours: shifted, repaired where asked, sorted; with an account of what was left out.

Arrays with a letter are over all stored positions (P) or their entries (E); those without, over the positions that are kept.

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
class RecordConfig:
    """How foreign positions become records.

    Attributes:
        values: what the values are.
        vocab_size: every id must be below it.
        shift: added to each position's position.
        repairs: of REPAIRS.
        widest: entries of the widest positions, for `k+1`.
        has_extra: whether the widest positions hold the target besides their top k; else a position that starts with
            its least entry does.
    """

    values: ValueKind
    vocab_size: int
    shift: int = 0
    repairs: frozenset[Repair] = frozenset()
    widest: int = 0
    has_extra: bool = False


@dataclass
class Account:
    """What became of the positions: reason -> how many were left out; and what was done to others."""

    num_records: int = 0
    num_positions: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    num_unknown_targets: int = 0


@dataclass(slots=True, eq=False)
class _Entries:
    """Entries of the positions that are kept, E at a time, cut down step by step."""

    position_E: NDArray[np.int64]
    ids_E: NDArray[np.int64]
    logprobs_E: NDArray[np.float64]
    ranks_E: NDArray[np.int64]

    def keep(self, kept_E: NDArray[np.bool_] | NDArray[np.int64]) -> None:
        self.position_E, self.ids_E = self.position_E[kept_E], self.ids_E[kept_E]
        self.logprobs_E, self.ranks_E = self.logprobs_E[kept_E], self.ranks_E[kept_E]


def without_fitted(cache: ForeignCache) -> ForeignCache:
    """Keep only the exact entries of a cache, as the repair `tails` does, so that it is examined as such."""
    first = cache.approximate_from
    if first is None:
        return cache
    findings = tuple(finding for finding in cache.findings if finding.name != "broken_tails")
    read = partial(_exact_sequences, cache.read, first)
    return replace(cache, read=read, approximate_from=None, findings=findings)


def _exact_sequences(read: Callable[[], Iterator[ForeignSequence]], first: int) -> Iterator[ForeignSequence]:
    for sequence in read():
        ranks_E = np.arange(len(sequence.values_E)) - np.repeat(sequence.offsets_P1[:-1], sequence.counts_P)
        kept_E = ranks_E < first
        yield replace(
            sequence,
            counts_P=np.minimum(sequence.counts_P, first),
            token_ids_E=sequence.token_ids_E[kept_E],
            values_E=sequence.values_E[kept_E],
        )


def to_record(sequence: ForeignSequence, config: RecordConfig, account: Account) -> SequenceRecord | None:
    """The record, or None where no position is left.

    Raises:
        InputError: an id outside the vocabulary, a duplicate with another value, a value that is not a logprob.
    """
    ids_N = sequence.input_ids_N
    if ids_N is None or not len(ids_N):
        account.left_out["positions without tokens"] += len(sequence.counts_P)
        return None
    _check_ids(sequence, config.values, config.vocab_size)
    positions_P = sequence.positions_P + config.shift
    kept_P = _kept(sequence, positions_P, config.values, account)
    if not kept_P.any():
        account.left_out["sequences without a position"] += 1
        return None
    following_N = np.append(ids_N[1:], NO_TARGET)
    targets_P = np.where(kept_P, following_N[np.clip(positions_P, 0, len(ids_N) - 1)], NO_TARGET)
    entries, known_P = _entries(sequence, kept_P, targets_P, config, account)
    has_entries_P = np.bincount(entries.position_E, minlength=len(kept_P)) > 0
    account.left_out["positions that a repair leaves no entry in"] += int((kept_P & ~has_entries_P).sum())
    positions = np.flatnonzero(kept_P & has_entries_P)
    if not len(positions):
        account.left_out["sequences without a position"] += 1
        return None
    supervised_N = np.zeros(len(ids_N), np.bool_)
    supervised_N[positions_P[positions]] = True
    distributions = _distributions(entries, positions, targets_P, known_P, account)
    account.num_records += 1
    account.num_positions += len(positions)
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


def _kept(sequence: ForeignSequence, positions_P: NDArray[np.int64], values: ValueKind, account: Account) -> NDArray[np.bool_]:
    assert sequence.input_ids_N is not None
    num_tokens = len(sequence.input_ids_N)
    # A position whose entries are all -inf says nothing: it is missing, and must not be learnt as a tail of mass 1.
    position_E = np.repeat(np.arange(len(sequence.counts_P)), sequence.counts_P)
    given_E = ~np.isneginf(as_logprobs(sequence.values_E[:, None], values, None)[:, 0])
    filled_P = np.bincount(position_E[given_E], minlength=len(sequence.counts_P)) > 0
    inside_P = (positions_P >= 0) & (positions_P < num_tokens)
    kept_P = filled_P & inside_P
    account.left_out["empty positions"] += int((~filled_P).sum())
    account.left_out["positions outside their text"] += int((filled_P & ~inside_P).sum())
    if sequence.learnt_N is not None:
        next_learnt_N = np.append(sequence.learnt_N[1:], False)
        masked_P = kept_P & ~next_learnt_N[np.clip(positions_P, 0, num_tokens - 1)]
        account.left_out["positions that the file's mask leaves out"] += int(masked_P.sum())
        kept_P &= ~masked_P
    return kept_P


def _entries(
    sequence: ForeignSequence, kept_P: NDArray[np.bool_], targets_P: NDArray[np.int64], config: RecordConfig, account: Account
) -> tuple[_Entries, NDArray[np.float64]]:
    """Return the entries of kept positions after every repair, and (P,) logprobs of the targets that a repair took out."""
    counts_P = sequence.counts_P
    log_z_E = None if sequence.log_z_P is None else np.repeat(sequence.log_z_P, counts_P)
    position_E = np.repeat(np.arange(len(counts_P)), counts_P)
    entries = _Entries(
        position_E,
        sequence.token_ids_E,
        as_logprobs(sequence.values_E[:, None], config.values, log_z_E)[:, 0],
        np.arange(len(position_E)) - sequence.offsets_P1[position_E],
    )
    entries.keep(kept_P[position_E])
    if np.isnan(entries.logprobs_E).any() or np.isposinf(entries.logprobs_E).any():
        raise InputError(f"{sequence.source}: a value is NaN or infinite; the position cannot be stored")
    known_P = np.full(len(counts_P), np.nan)
    if "k+1" in config.repairs:
        _take_targets_out(entries, counts_P, targets_P, known_P, config)
        account.repaired["k+1"] += int((~np.isnan(known_P)).sum())
    entries.keep(entries.logprobs_E > -np.inf)
    if "duplicates" in config.repairs:
        before = len(entries.position_E)
        entries.keep(_first_of_each(entries))
        account.repaired["duplicates"] += before - len(entries.position_E)
    entries.keep(np.lexsort((entries.ids_E, -entries.logprobs_E, entries.position_E)))
    _refuse_duplicates(entries, sequence.source)
    return entries, known_P


def _take_targets_out(
    entries: _Entries,
    counts_P: NDArray[np.int64],
    targets_P: NDArray[np.int64],
    known_P: NDArray[np.float64],
    config: RecordConfig,
) -> None:
    """Move the target out of the support where the engine added it: there it is the position's least entry."""
    least_P = np.full(len(counts_P), np.inf)
    np.minimum.at(least_P, entries.position_E, entries.logprobs_E)
    is_least_E = (entries.ids_E == targets_P[entries.position_E]) & (entries.logprobs_E <= least_P[entries.position_E])
    where_E = counts_P[entries.position_E] == config.widest if config.has_extra else entries.ranks_E == 0
    out_E = is_least_E & where_E & (counts_P[entries.position_E] > 1)
    known_P[entries.position_E[out_E]] = entries.logprobs_E[out_E]
    entries.keep(~out_E)


def _first_of_each(entries: _Entries) -> NDArray[np.int64]:
    """Indices of the greatest entry of each (position, id)."""
    order = np.lexsort((entries.ranks_E, -entries.logprobs_E, entries.ids_E, entries.position_E))
    positions, ids = entries.position_E[order], entries.ids_E[order]
    is_first = np.append(True, (positions[1:] != positions[:-1]) | (ids[1:] != ids[:-1])) if len(order) else np.zeros(0, bool)
    return np.sort(order[is_first])


def _refuse_duplicates(entries: _Entries, source: str) -> None:
    keys = np.sort(entries.position_E * (int(entries.ids_E.max(initial=0)) + 1) + entries.ids_E)
    if (keys[1:] == keys[:-1]).any():
        raise InputError(f"{source}: a position names an id twice; --repair duplicates keeps the greater value")


def _distributions(
    entries: _Entries,
    positions: NDArray[np.int64],
    targets_P: NDArray[np.int64],
    known_P: NDArray[np.float64],
    account: Account,
) -> Distributions:
    rank_P = np.full(len(targets_P), -1)
    rank_P[positions] = np.arange(len(positions))
    at_E = rank_P[entries.position_E]
    mass = np.bincount(at_E, np.exp(entries.logprobs_E), len(positions))
    # A normaliser in half precision leaves masses a little above 1: they are brought back to it.
    over = np.log(np.maximum(mass, 1.0))
    account.repaired["masses brought to 1"] += int((over > 1e-6).sum())
    logprobs_E = np.minimum(entries.logprobs_E - over[at_E], 0.0).astype(np.float32)
    targets = targets_P[positions]
    inside = np.zeros(len(positions), np.bool_)
    inside[at_E[entries.ids_E == targets[at_E]]] = True
    outside = (targets != NO_TARGET) & ~inside
    unknown = known_P[positions][outside]
    account.num_unknown_targets += int(np.isnan(unknown).sum())
    counts = np.bincount(at_E, minlength=len(positions))
    return Distributions(
        token_ids_E=entries.ids_E.astype(np.int32),
        logprobs_E=logprobs_E,
        offsets_P1=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        tail_mass_P=np.clip(1.0 - mass, 0.0, 1.0).astype(np.float32),
        outside_target_logprobs=np.where(np.isnan(unknown), UNKNOWN_TARGET, np.minimum(unknown, 0.0)).astype(np.float32),
    )
