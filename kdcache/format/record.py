"""The record in memory: token sequences, and the teacher's sparse next-token distributions at their supervised positions.

Shape letters: N tokens of a sequence, P supervised positions, E entries of all positions (ragged), K entries per position
(padded), M positions whose target lies outside the support.

Position t is the place where the model has read tokens 0..t; its distribution is for token t+1, as the student's logits[t].
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import FormatError

KEY_BYTES = 16
NO_TARGET = -1
PADDING_ID = -1
MASS_TOLERANCE = 2e-3
"""By how much a teacher's probabilities at a position may miss 1: sums in float32, and a remote teacher's rounded logprobs."""

ROLES = ("none", "system", "user", "assistant", "tool")
"""Names of the codes in `TokenSequence.roles_N`; `none` is plain text and the template's own tokens."""

FINISHES = ("", "stop", "length")
"""How an answer that the teacher wrote came to its end: by its end token or one that was asked for, or because it had as many
tokens as it may have. "" is of text that was given."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """One training item before the teacher has seen it.

    Attributes:
        input_ids_N: (N,) int32, N >= 1.
        supervised_N: (N,) bool. supervised_N[t] is about the prediction of token t+1 at position t: a record exists there.
            The last position has no target inside the sequence, and may be supervised all the same.
        roles_N: (N,) uint8, index into ROLES, who wrote token t.
        turn_starts: (num_turns,) int32, ascending; the first token of each turn. [0] for plain text.
        source: where the item came from, for people: "corpus/a.txt#3" is window 3 of that file.
        key: 16 bytes, see `sequence_key`.
        finish: one of FINISHES.
        domain: what kind of text it is, as the input says: "wiki", "code"; "" where it does not.
    """

    input_ids_N: NDArray[np.int32]
    supervised_N: NDArray[np.bool_]
    roles_N: NDArray[np.uint8]
    turn_starts: NDArray[np.int32]
    source: str
    key: bytes
    finish: str = ""
    domain: str = ""

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.input_ids_N)

    @property
    def positions_P(self) -> NDArray[np.int64]:
        """(P,) the supervised positions, ascending."""
        return np.flatnonzero(self.supervised_N)

    @property
    def target_ids_P(self) -> NDArray[np.int32]:
        """(P,) the token that in fact came at t+1 for each supervised t; NO_TARGET at the last position."""
        following = np.append(self.input_ids_N[1:], np.int32(NO_TARGET)).astype(np.int32)
        return following[self.supervised_N]


@dataclass(frozen=True, slots=True, eq=False)
class Distributions:
    """The teacher at P positions: for each, a support with logprobs normalised over the WHOLE vocabulary at temperature 1.

    Entries are exact, but for the random selections' (`kdcache.format.selection`): there the first num_exact_P[p] of a position
    are, and the others are estimates: exp(logprob) is a random number whose expectation is the token's probability.

    Attributes:
        token_ids_E: (E,) int32, the supports one after another; distinct within a position, exact ones before estimates, both
            ordered by falling logprob and, among equals, by rising id.
        logprobs_E: (E,) float32, nats, <= 0; -inf is allowed (probability 0).
        offsets_P1: (P+1,) int64, offsets_P1[p]:offsets_P1[p+1] are the entries of position p; starts at 0, ends at E.
        tail_mass_P: (P,) float32 in [0, 1], the probability of all tokens that are no exact entry.
        outside_target_logprobs_M: (M,) float32, nats: the target's logprob at each position that has a target and whose
            target is no exact entry, in position order. With it the teacher's NLL of the text can be recomputed.
        num_exact_P: (P,) int64, how many of a position's entries are exact; None where all of all positions are.
        log_z_PT: (P, T) float32, nats, for each of the T further temperatures of the selection the log of the sum over the
            vocabulary of p^(1/temperature), so that p^(1/temperature) / exp(log_z) is the distribution there; None for no T.
        entropy_P: (P,) float32, nats, of the whole distribution; None where it is not kept.
        features: name -> (P, H) float32, the teacher's hidden states at the positions, or (1, H) where they are pooled; see
            `FeatureInfo`. Empty, as a rule.
    """

    token_ids_E: NDArray[np.int32]
    logprobs_E: NDArray[np.float32]
    offsets_P1: NDArray[np.int64]
    tail_mass_P: NDArray[np.float32]
    outside_target_logprobs_M: NDArray[np.float32]
    num_exact_P: NDArray[np.int64] | None = None
    log_z_PT: NDArray[np.float32] | None = None
    entropy_P: NDArray[np.float32] | None = None
    features: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def num_positions(self) -> int:
        """P."""
        return len(self.offsets_P1) - 1

    @property
    def num_entries(self) -> int:
        """E."""
        return len(self.token_ids_E)

    @property
    def num_entries_P(self) -> NDArray[np.int64]:
        """(P,) entries at each position."""
        return np.diff(self.offsets_P1)

    @property
    def is_exact_E(self) -> NDArray[np.bool_]:
        """(E,) whether an entry is exact, and not an estimate."""
        if self.num_exact_P is None:
            return np.ones(self.num_entries, np.bool_)
        counts_P = self.num_entries_P
        place_E = np.arange(self.num_entries) - np.repeat(self.offsets_P1[:-1], counts_P)
        return place_E < np.repeat(self.num_exact_P, counts_P)

    def target_logprobs(self, target_ids_P: NDArray[np.int32]) -> NDArray[np.float32]:
        """(P,) float32, the teacher's logprob of each target; NaN where the target is NO_TARGET.

        Raises:
            FormatError: the number of stored outside targets is not the number of targets that are no exact entry.
        """
        has_target, inside_P, logprobs_P = find_targets(self, target_ids_P)
        outside_P = has_target & ~inside_P
        if int(outside_P.sum()) != len(self.outside_target_logprobs_M):
            raise FormatError(
                f"{len(self.outside_target_logprobs_M)} logprobs are stored for targets that are no exact entry, "
                f"but {int(outside_P.sum())} targets are none"
            )
        logprobs_P[outside_P] = self.outside_target_logprobs_M
        return logprobs_P

    def padded(self, num_columns: int | None = None) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Rectangular view of the ragged entries.

        Args:
            num_columns: K; by default the largest support. Must not be smaller than that.

        Returns:
            (P, K) int32 token ids, PADDING_ID where there is no entry, and (P, K) float32 logprobs, -inf there.
        """
        counts_P = self.num_entries_P
        widest = int(counts_P.max(initial=0))
        if num_columns is None:
            num_columns = widest
        if num_columns < widest:
            raise ValueError(f"num_columns is {num_columns}, but a position has {widest} entries")
        token_ids_PK = np.full((self.num_positions, num_columns), PADDING_ID, np.int32)
        logprobs_PK = np.full((self.num_positions, num_columns), -np.inf, np.float32)
        filled_PK = np.arange(num_columns) < counts_P[:, None]
        token_ids_PK[filled_PK] = self.token_ids_E
        logprobs_PK[filled_PK] = self.logprobs_E
        return token_ids_PK, logprobs_PK


@dataclass(frozen=True, slots=True, eq=False)
class SequenceRecord:
    """A sequence and what the teacher said of it: one row of a cache."""

    sequence: TokenSequence
    distributions: Distributions


def sequence_key(input_ids_N: NDArray[np.int32], supervised_N: NDArray[np.bool_], template_fingerprint: str) -> bytes:
    """16 bytes that name the item: SHA-256 of tokens, mask and chat-template fingerprint, truncated."""
    hasher = hashlib.sha256(b"kdcache.sequence.v1\0")
    hasher.update(len(input_ids_N).to_bytes(8, "little"))
    hasher.update(np.ascontiguousarray(input_ids_N, "<i4").tobytes())
    hasher.update(np.ascontiguousarray(supervised_N, np.uint8).tobytes())
    hasher.update(template_fingerprint.encode())
    return hasher.digest()[:KEY_BYTES]


def find_targets(
    distributions: Distributions, target_ids_P: NDArray[np.int32]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float32]]:
    """Look each target up among its position's exact entries.

    Returns:
        (P,) whether the position has a target; (P,) whether the target is an exact entry; (P,) float32 its logprob there,
        NaN where it is not.
    """
    rows_E = np.repeat(np.arange(distributions.num_positions), distributions.num_entries_P)
    hits_E = distributions.token_ids_E == target_ids_P[rows_E]
    has_target_P = target_ids_P != NO_TARGET
    hits_E &= has_target_P[rows_E]
    if distributions.num_exact_P is not None:
        hits_E &= distributions.is_exact_E
    inside_P = np.zeros(distributions.num_positions, bool)
    inside_P[rows_E[hits_E]] = True
    logprobs_P = np.full(distributions.num_positions, np.nan, np.float32)
    logprobs_P[rows_E[hits_E]] = distributions.logprobs_E[hits_E]
    return has_target_P, inside_P, logprobs_P


def distributions_from_dense(
    token_ids_PK: NDArray[np.integer],
    logprobs_PK: NDArray[np.floating],
    target_ids_P: NDArray[np.int32],
    target_logprobs_P: NDArray[np.floating],
) -> Distributions:
    """Distributions with K entries at every position, put into the record's order; what the teachers end with.

    Args:
        token_ids_PK: (P, K) ids, distinct within a row, in any order.
        logprobs_PK: (P, K) nats, normalised over the whole vocabulary.
        target_ids_P: (P,) int32, NO_TARGET where there is none.
        target_logprobs_P: (P,) nats, the target's logprob; ignored where there is no target.
    """
    num_positions, k = token_ids_PK.shape
    ids_PK, sorted_PK = _in_order(np.asarray(token_ids_PK, np.int32), np.asarray(logprobs_PK, np.float32))
    # Summed in float64: with 64 float32 terms the tail of a peaked position would be mostly rounding.
    kept_P = np.exp(sorted_PK.astype(np.float64)).sum(axis=-1)
    outside_P = (target_ids_P != NO_TARGET) & ~(ids_PK == target_ids_P[:, None]).any(axis=-1)
    return Distributions(
        token_ids_E=ids_PK.reshape(-1),
        logprobs_E=np.minimum(sorted_PK, 0.0).reshape(-1),
        offsets_P1=np.arange(num_positions + 1, dtype=np.int64) * k,
        tail_mass_P=np.clip(1.0 - kept_P, 0.0, 1.0).astype(np.float32),
        outside_target_logprobs_M=np.asarray(target_logprobs_P, np.float32)[outside_P],
    )


def _in_order(ids_PK: NDArray[np.int32], logprobs_PK: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Rows by falling logprob and, among equals, rising id. Sorts only those that are not: it takes 20 us per row of 256."""
    before_PK, after_PK = logprobs_PK[:, :-1], logprobs_PK[:, 1:]
    wrong_PK = ~(before_PK >= after_PK) | ((before_PK == after_PK) & (ids_PK[:, :-1] > ids_PK[:, 1:]))
    rows = np.flatnonzero(wrong_PK.any(axis=-1))
    if len(rows):
        ids_PK, logprobs_PK = ids_PK.copy(), logprobs_PK.copy()
        order = np.lexsort((ids_PK[rows], -logprobs_PK[rows]), axis=-1)
        ids_PK[rows] = np.take_along_axis(ids_PK[rows], order, axis=-1)
        logprobs_PK[rows] = np.take_along_axis(logprobs_PK[rows], order, axis=-1)
    return ids_PK, logprobs_PK


def check_distributions(distributions: Distributions, *, vocab_size: int) -> None:
    """Raise FormatError unless every promise of `Distributions` holds; the message names the position.

    Costs a few passes over the entries: for teachers' answers at capture, tests and `kdcache verify`, not for the loader.
    """
    d = distributions
    if len(d.offsets_P1) < 1 or d.offsets_P1[0] != 0 or d.offsets_P1[-1] != d.num_entries or (np.diff(d.offsets_P1) < 0).any():
        raise FormatError(f"offsets must rise from 0 to the number of entries, {d.num_entries}; got {d.offsets_P1[:4]}...")
    if len(d.logprobs_E) != d.num_entries or len(d.tail_mass_P) != d.num_positions:
        raise FormatError("token_ids, logprobs and tail_mass have lengths that do not fit together")
    rows_E = np.repeat(np.arange(d.num_positions), d.num_entries_P)
    _refuse(
        rows_E, (d.token_ids_E < 0) | (d.token_ids_E >= vocab_size), f"a token id is outside the vocabulary of {vocab_size}"
    )
    _refuse(rows_E, ~(d.logprobs_E <= 0), "a logprob is above 0 or NaN")
    _check_scalars(d)
    exact_E = d.is_exact_E
    same_row_E = (rows_E[1:] == rows_E[:-1]) & (exact_E[1:] == exact_E[:-1])
    _refuse(rows_E[1:], same_row_E & (d.logprobs_E[1:] > d.logprobs_E[:-1]), "logprobs are not in falling order")
    order = np.lexsort((d.token_ids_E, rows_E))
    ids, rows = d.token_ids_E[order], rows_E[order]
    _refuse(rows[1:], (rows[1:] == rows[:-1]) & (ids[1:] == ids[:-1]), "a token id appears twice")
    _refuse(np.arange(d.num_positions), ~((d.tail_mass_P >= 0) & (d.tail_mass_P <= 1)), "tail_mass is outside [0, 1]")
    if not (d.outside_target_logprobs_M <= 0).all():
        raise FormatError("a target's logprob is above 0 or NaN")


def check_mass(distributions: Distributions) -> None:
    """Raise FormatError unless exact entries and tail_mass sum to 1 at each position, as a teacher's do before any codec.

    A teacher whose logprobs are not normalised over the whole vocabulary, or are of another temperature, is found by it.
    """
    d = distributions
    rows_E = np.repeat(np.arange(d.num_positions), d.num_entries_P)[d.is_exact_E]
    exact_P = np.bincount(rows_E, np.exp(d.logprobs_E[d.is_exact_E].astype(np.float64)), d.num_positions)
    missing_P = ~(np.abs(exact_P + d.tail_mass_P - 1) <= MASS_TOLERANCE)
    if missing_P.any():
        p = int(np.argmax(missing_P))
        raise FormatError(
            f"record {p}: exact entries of {exact_P[p]:.4f} and a tail_mass of {d.tail_mass_P[p]:.4f} do not sum to 1: the "
            "logprobs are not normalised over the whole vocabulary, or of another temperature"
        )


def _check_scalars(d: Distributions) -> None:
    rows_P = np.arange(d.num_positions)
    if d.num_exact_P is not None:
        if len(d.num_exact_P) != d.num_positions:
            raise FormatError(f"num_exact has {len(d.num_exact_P)} values for {d.num_positions} positions")
        _refuse(rows_P, (d.num_exact_P < 0) | (d.num_exact_P > d.num_entries_P), "more entries are exact than there are")
    if d.log_z_PT is not None:
        if d.log_z_PT.ndim != 2 or len(d.log_z_PT) != d.num_positions:
            raise FormatError(f"log_z has the shape {d.log_z_PT.shape} at {d.num_positions} positions")
        rows_PT = np.repeat(rows_P, d.log_z_PT.shape[1])
        _refuse(rows_PT, ~np.isfinite(d.log_z_PT).reshape(-1), "log_z is not finite")
    if d.entropy_P is not None:
        if len(d.entropy_P) != d.num_positions:
            raise FormatError(f"entropy has {len(d.entropy_P)} values for {d.num_positions} positions")
        _refuse(rows_P, ~(d.entropy_P >= 0) | np.isinf(d.entropy_P), "the entropy is below 0 or not finite")


def _refuse(rows: NDArray[np.int64], bad: NDArray[np.bool_], sentence: str) -> None:
    if bad.any():
        raise FormatError(f"record {int(rows[np.argmax(bad)])}: {sentence}")
