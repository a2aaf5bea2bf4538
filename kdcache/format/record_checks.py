"""The contract of a record: what every writer of a cache checks once, before a codec sees it, and what `kdcache verify` checks.

A codec may assume it of whatever it encodes. Nothing may be assumed of what is decoded: bytes on a disk are not a record.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import FormatError
from kdcache.format.feature_checks import check_features
from kdcache.format.identity import Identity, SelectionInfo
from kdcache.format.record import FINISHES, KEY_BYTES, PREFERENCES, ROLES, Distributions, SequenceRecord, TokenSequence
from kdcache.format.selection import fixed_entries, fixed_exact, stores_num_exact

MAX_ENTRIES = 2**16 - 1
"""Entries at one position, where the selection does not fix how many there are."""

MAX_SEQUENCE_ENTRIES = 2**30
"""Entries of one sequence: lists in a record batch have 31-bit offsets."""

MASS_TOLERANCE = 2e-3
"""By how much a teacher's probabilities at a position may miss 1: sums in float32, and a remote teacher's rounded logprobs."""


def check_record(record: SequenceRecord, identity: Identity, *, sums_to_one: bool = False) -> NDArray[np.float32]:
    """Raise FormatError, naming the position, unless a cache of this identity can hold the record.

    Args:
        record: a sequence and its distributions.
        identity: of the cache: vocabulary, selection, features, and what else each record has.
        sums_to_one: check the mass too, see `check_mass`: of a teacher's own answers, which no codec has rounded yet.

    Returns:
        (P,) the teacher's logprob of each target, NaN where there is none.
    """
    sequence, distributions, vocab_size = record.sequence, record.distributions, identity.teacher.vocab_size
    _check_sequence(sequence, identity)
    if distributions.num_positions != int(sequence.supervised_N.sum()):
        raise FormatError(
            f"distributions for {distributions.num_positions} of {int(sequence.supervised_N.sum())} supervised positions"
        )
    _check_entry_counts(distributions, fixed_entries(identity.selection))
    check_distributions(distributions, vocab_size=vocab_size)
    _check_kept(distributions, identity.selection)
    check_features(distributions.features, identity.features, sequence.supervised_N)
    if sums_to_one:
        check_mass(distributions)
    return distributions.target_logprobs(sequence.target_ids_P)


def ids_fit(token_ids_E: NDArray[np.int32], vocab_size: int) -> bool:
    """Whether every id is in [0, vocab_size)."""
    if len(token_ids_E) and token_ids_E.dtype == np.int32:
        return int(token_ids_E.view(np.uint32).max()) < vocab_size  # one pass: a negative id is a large one
    return len(token_ids_E) == 0 or bool(token_ids_E.min() >= 0 and token_ids_E.max() < vocab_size)


def check_distributions(distributions: Distributions, *, vocab_size: int) -> None:
    """Raise FormatError unless every promise of `Distributions` holds; the message names the position.

    Costs a few passes over the entries: for writers, tests and `kdcache verify`, not for the loader.
    """
    d = distributions
    _check_offsets(d)
    positions_E = np.repeat(np.arange(d.num_positions), d.num_entries_P)
    if not ids_fit(d.token_ids_E, vocab_size):
        bad_E = (d.token_ids_E < 0) | (d.token_ids_E >= vocab_size)
        _refuse(positions_E, bad_E, f"a token id is outside the vocabulary of {vocab_size}")
    _refuse(positions_E, ~(d.logprobs_E <= 0), "a logprob is above 0 or NaN")
    _check_scalars(d)
    exact_E = d.is_exact_E
    same_E = (positions_E[1:] == positions_E[:-1]) & (exact_E[1:] == exact_E[:-1])
    _refuse(positions_E[1:], same_E & (d.logprobs_E[1:] > d.logprobs_E[:-1]), "logprobs are not in falling order")
    pairs_E = np.sort(positions_E * vocab_size + d.token_ids_E)  # below 2^61: at most 2^30 positions, ids below 2^31
    _refuse(pairs_E[1:] // vocab_size, pairs_E[1:] == pairs_E[:-1], "a token id appears twice")
    _refuse(np.arange(d.num_positions), ~((d.tail_mass_P >= 0) & (d.tail_mass_P <= 1)), "tail_mass is outside [0, 1] or NaN")
    if not (d.outside_target_logprobs <= 0).all():
        raise FormatError("a target's logprob is above 0 or NaN")


def check_mass(distributions: Distributions) -> None:
    """Raise FormatError unless exact entries and tail_mass sum to 1 at each position, as a teacher's do before any codec.

    A teacher whose logprobs are not normalised over the whole vocabulary, or are of another temperature, is found by it.
    """
    d = distributions
    positions_E = np.repeat(np.arange(d.num_positions), d.num_entries_P)[d.is_exact_E]
    exact_P = np.bincount(positions_E, np.exp(d.logprobs_E[d.is_exact_E].astype(np.float64)), d.num_positions)
    missing_P = ~(np.abs(exact_P + d.tail_mass_P - 1) <= MASS_TOLERANCE)
    if missing_P.any():
        p = int(np.argmax(missing_P))
        raise FormatError(
            f"supervised position {p}: exact entries of {exact_P[p]:.4f} and a tail_mass of {d.tail_mass_P[p]:.4f} do not sum "
            "to 1: the logprobs are not normalised over the whole vocabulary, or of another temperature"
        )


def _check_sequence(s: TokenSequence, identity: Identity) -> None:
    vocab_size = identity.teacher.vocab_size
    if not s.num_tokens or len(s.supervised_N) != s.num_tokens or len(s.roles_N) != s.num_tokens:
        raise FormatError(f"{s.num_tokens} tokens with {len(s.supervised_N)} flags and {len(s.roles_N)} roles")
    if not ids_fit(s.input_ids_N, vocab_size):
        raise FormatError(f"a token id of the text is outside the teacher's vocabulary of {vocab_size}")
    if not ids_fit(s.turn_starts, s.num_tokens) or int(s.roles_N.max()) >= len(ROLES):
        raise FormatError("a turn starts outside the sequence, or a role is unknown")
    if s.finish not in FINISHES:
        raise FormatError(f"it ended by {s.finish!r}, known are {', '.join(FINISHES[1:])}")
    if s.finish and identity.generation is None:
        raise FormatError("it says how it ended, but the cache's identity has no generation")
    if s.domain and not identity.domains:
        raise FormatError("it says of which domain it is, but the cache's identity has no domains")
    if (s.group or s.preference) and not identity.groups:
        raise FormatError("it says to which group it belongs, but the cache's identity has no groups")
    if len(s.group) not in (0, KEY_BYTES) or s.preference not in PREFERENCES or (s.preference and not s.group):
        raise FormatError(
            f"its group has {len(s.group)} bytes and its preference is {s.preference!r}; see kdcache/format/README.md"
        )


def _check_entry_counts(d: Distributions, fixed: int | None) -> None:
    # Before anything that takes a pass over the entries.
    _check_offsets(d)
    counts_P = d.num_entries_P
    most = int(counts_P.max(initial=0))
    if d.num_entries > MAX_SEQUENCE_ENTRIES:
        raise FormatError(f"{d.num_entries} entries, at most {MAX_SEQUENCE_ENTRIES} fit")
    if fixed is not None and most > fixed:
        raise FormatError(f"a position has {most} entries, but the selection keeps {fixed}")
    if most > MAX_ENTRIES and not (fixed is not None and (counts_P == fixed).all()):
        raise FormatError(f"a position has {most} entries, at most {MAX_ENTRIES} fit where not every position has as many")


def _check_offsets(d: Distributions) -> None:
    if len(d.offsets_P1) < 1 or d.offsets_P1[0] != 0 or (np.diff(d.offsets_P1) < 0).any():
        raise FormatError(f"offsets must rise from 0, got {d.offsets_P1[:4]}...")
    if not d.offsets_P1[-1] == len(d.token_ids_E) == len(d.logprobs_E) or len(d.tail_mass_P) != d.num_positions:
        lengths = f"{len(d.token_ids_E)} ids, {len(d.logprobs_E)} logprobs, {len(d.tail_mass_P)} tails"
        raise FormatError(f"offsets of {d.offsets_P1[-1]} entries at {d.num_positions} positions with {lengths}")


def _check_scalars(d: Distributions) -> None:
    positions_P = np.arange(d.num_positions)
    if d.num_exact_P is not None:
        if len(d.num_exact_P) != d.num_positions:
            raise FormatError(f"num_exact has {len(d.num_exact_P)} values for {d.num_positions} positions")
        _refuse(positions_P, (d.num_exact_P < 0) | (d.num_exact_P > d.num_entries_P), "more entries are exact than there are")
    if d.log_z_PL is not None:
        if d.log_z_PL.ndim != 2 or len(d.log_z_PL) != d.num_positions:
            raise FormatError(f"log_z has the shape {d.log_z_PL.shape} at {d.num_positions} positions")
        _refuse(np.repeat(positions_P, d.log_z_PL.shape[1]), ~np.isfinite(d.log_z_PL).reshape(-1), "log_z is not finite")
    if d.entropy_P is not None:
        if len(d.entropy_P) != d.num_positions:
            raise FormatError(f"entropy has {len(d.entropy_P)} values for {d.num_positions} positions")
        _refuse(positions_P, ~(d.entropy_P >= 0) | np.isinf(d.entropy_P), "the entropy is below 0 or not finite")


def _check_kept(d: Distributions, selection: SelectionInfo) -> None:
    """What stands next to the entries is what the selection keeps."""
    fixed = fixed_exact(selection)
    if (d.num_exact_P is not None) != (fixed is not None or stores_num_exact(selection)):
        raise FormatError(f"selection {selection.kind!r}: estimates are marked by num_exact, and only where there may be some")
    if fixed is not None and not np.array_equal(np.minimum(fixed, d.num_entries_P), np.asarray(d.num_exact_P)):
        raise FormatError(f"selection {selection.kind!r} makes {fixed} entries of a position exact; the record says otherwise")
    num_temperatures = 0 if d.log_z_PL is None else d.log_z_PL.shape[1]
    if num_temperatures != len(selection.temperatures):
        raise FormatError(f"log_z at {num_temperatures} temperatures, but the selection keeps {len(selection.temperatures)}")
    if (d.entropy_P is not None) != selection.entropy:
        found = "no" if d.entropy_P is None else "an"
        raise FormatError(f"selection.entropy is {selection.entropy}, but the record has {found} entropy")


def _refuse(positions: NDArray[np.int64], bad: NDArray[np.bool_], sentence: str) -> None:
    if bad.any():
        raise FormatError(f"supervised position {int(positions[np.argmax(bad)])}: {sentence}")
