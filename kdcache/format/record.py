"""The record in memory: token sequences, and the teacher's sparse next-token distributions at their supervised positions.

At position t the model has read tokens 0..t; its distribution is for token t+1, as the student's logits[t].
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import FormatError
from kdcache.format.identity import FeatureInfo

KEY_BYTES = 16
NO_TARGET = -100
"""What torch's cross entropy leaves out by default."""
PADDING_ID = -1

ROLES = ("none", "system", "user", "assistant", "tool")
"""Names of the codes in `TokenSequence.roles_N`; `none` is plain text and the template's own tokens."""

PREFERENCES = ("", "chosen", "rejected")
"""Names of the codes of `TokenSequence.preference`; "" where the input does not say."""

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
        group: 16 bytes, equal for the answers to one prompt, as the input says; b"" where it does not.
        preference: of the group's answers; one of PREFERENCES.
    """

    input_ids_N: NDArray[np.int32]
    supervised_N: NDArray[np.bool_]
    roles_N: NDArray[np.uint8]
    turn_starts: NDArray[np.int32]
    source: str
    key: bytes
    finish: str = ""
    domain: str = ""
    group: bytes = b""
    preference: str = ""

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
        tail_mass_P: (P,) float32 in [0, 1], the probability of all tokens that are not exact entries.
        outside_target_logprobs: 1-D float32, nats: the target's logprob at each position that has a target and whose
            target is not an exact entry, in position order. With it the teacher's NLL of the text can be recomputed.
        num_exact_P: (P,) int64, how many of a position's entries are exact; None where all of all positions are.
        log_z_PL: (P, L) float32, nats: for each of the selection's L further temperatures the log of the sum over the
            vocabulary of p^(1/temperature), so that p^(1/temperature) / exp(log_z) is the distribution at that temperature.
            None where the selection has no further temperatures.
        entropy_P: (P,) float32, nats, of the whole distribution; None where it is not kept.
        features: name -> (F, H) float32, the teacher's states at the feature's positions (`feature_positions`), or (1, H) where
            they are pooled; see `FeatureInfo`. Of a projected feature, what the projection gives. Of `attention` the
            probabilities of each head's top keys, falling, 0 where there are fewer, and under `distances_key` (F, H) int32,
            position minus key. Empty, as a rule.
    """

    token_ids_E: NDArray[np.int32]
    logprobs_E: NDArray[np.float32]
    offsets_P1: NDArray[np.int64]
    tail_mass_P: NDArray[np.float32]
    outside_target_logprobs: NDArray[np.float32]
    num_exact_P: NDArray[np.int64] | None = None
    log_z_PL: NDArray[np.float32] | None = None
    entropy_P: NDArray[np.float32] | None = None
    features: Mapping[str, NDArray[Any]] = field(default_factory=dict)

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
        rank_E = np.arange(self.num_entries) - np.repeat(self.offsets_P1[:-1], counts_P)
        return rank_E < np.repeat(self.num_exact_P, counts_P)

    def target_logprobs(self, target_ids_P: NDArray[np.int32]) -> NDArray[np.float32]:
        """(P,) float32, the teacher's logprob of each target; NaN where the target is NO_TARGET.

        Raises:
            FormatError: the number of stored outside targets is not the number of targets that are not exact entries.
        """
        has_target, inside_P, logprobs_P = find_targets(self, target_ids_P)
        outside_P = has_target & ~inside_P
        if int(outside_P.sum()) != len(self.outside_target_logprobs):
            raise FormatError(
                f"{len(self.outside_target_logprobs)} logprobs are stored for targets that are not exact entries, "
                f"but {int(outside_P.sum())} targets are none"
            )
        logprobs_P[outside_P] = self.outside_target_logprobs
        return logprobs_P

    def padded(self, num_columns: int | None = None) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Rectangular view of the ragged entries.

        Args:
            num_columns: K; by default the largest support. Must not be smaller than that.

        Returns:
            (P, K) int32 token ids, PADDING_ID without an entry, and (P, K) float32 logprobs, -inf there.
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
    """A sequence and what the teacher said about it: one record of a cache."""

    sequence: TokenSequence
    distributions: Distributions


def distances_key(feature: FeatureInfo) -> str:
    """Where `Distributions.features` has the distances of a feature of kind `attention`."""
    return f"{feature.name}:distance"


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
    positions_E = np.repeat(np.arange(distributions.num_positions), distributions.num_entries_P)
    hits_E = distributions.token_ids_E == target_ids_P[positions_E]
    has_target_P = target_ids_P != NO_TARGET
    hits_E &= has_target_P[positions_E]
    if distributions.num_exact_P is not None:
        hits_E &= distributions.is_exact_E
    inside_P = np.zeros(distributions.num_positions, bool)
    inside_P[positions_E[hits_E]] = True
    logprobs_P = np.full(distributions.num_positions, np.nan, np.float32)
    logprobs_P[positions_E[hits_E]] = distributions.logprobs_E[hits_E]
    return has_target_P, inside_P, logprobs_P


def distributions_from_dense(
    token_ids_PK: NDArray[np.integer],
    logprobs_PK: NDArray[np.floating],
    target_ids_P: NDArray[np.int32],
    target_logprobs_P: NDArray[np.floating],
) -> Distributions:
    """Distributions with K entries at every position, put into the record's order; what the teachers end with.

    Args:
        token_ids_PK: (P, K) ids, distinct at each position, in any order.
        logprobs_PK: (P, K) nats, normalised over the whole vocabulary.
        target_ids_P: (P,) int32, NO_TARGET where there is none.
        target_logprobs_P: (P,) nats, the target's logprob; ignored without a target.
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
        outside_target_logprobs=np.asarray(target_logprobs_P, np.float32)[outside_P],
    )


def _in_order(ids_PK: NDArray[np.int32], logprobs_PK: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Each position by falling logprob and, among equals, rising id. Sorts only those that are not: 20 us for 256 entries."""
    before_PK, after_PK = logprobs_PK[:, :-1], logprobs_PK[:, 1:]
    wrong_PK = ~(before_PK >= after_PK) | ((before_PK == after_PK) & (ids_PK[:, :-1] > ids_PK[:, 1:]))
    unsorted = np.flatnonzero(wrong_PK.any(axis=-1))
    if len(unsorted):
        ids_PK, logprobs_PK = ids_PK.copy(), logprobs_PK.copy()
        order = np.lexsort((ids_PK[unsorted], -logprobs_PK[unsorted]), axis=-1)
        ids_PK[unsorted] = np.take_along_axis(ids_PK[unsorted], order, axis=-1)
        logprobs_PK[unsorted] = np.take_along_axis(logprobs_PK[unsorted], order, axis=-1)
    return ids_PK, logprobs_PK
