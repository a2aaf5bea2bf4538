"""What the reader of a foreign format gives, whatever the format: sequences of stored positions, and what is claimed of them.

A stored position is a distribution that claims an index t of its text: to be what the teacher said after reading
tokens 0..t. The probes find out whether it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.foreign.advice import ADVICE
from kdcache.teacher.tokenizer import Tokenizer

ValueKind = Literal["logprobs", "logits", "probs", "nll"]
Severity = Literal["fatal", "repairable", "undecided", "note"]

MAX_ENTRIES_PER_POSITION = 2**20
MAX_ENTRIES_PER_SEQUENCE = 2**28
"""More is refused: 2 GiB of ids. A real position has at most a vocabulary, a real sequence some 10^5 positions of 10^2."""


@dataclass(frozen=True, slots=True, eq=False)
class ForeignSequence:
    """One item of a foreign file.

    Attributes:
        source: its file and line or item, for people.
                input_ids_N: (N,) int64; None where the file holds no tokens.
        positions_P: (P,) int64, the index t that each stored position claims; rising.
        counts_P: (P,) int64, entries of each position; 0 for one that is missing or null.
        token_ids_E: (E,) int64, as stored.
        values_E: (E,) float64, as stored (decompressed where compressed): see `ForeignCache.values`.
        log_z_P: (P,) float64, the normaliser of logits: logprob = value - log_z; None where there is none.
        learnt_N: (N,) bool, tokens that a student is to learn by the file's own mask, so that position t is supervised where
            learnt_N[t+1] is; None where it has no mask.
    """

    source: str
    input_ids_N: NDArray[np.int64] | None
    positions_P: NDArray[np.int64]
    counts_P: NDArray[np.int64]
    token_ids_E: NDArray[np.int64]
    values_E: NDArray[np.float64]
    log_z_P: NDArray[np.float64] | None = None
    learnt_N: NDArray[np.bool_] | None = None

    @property
    def offsets_P1(self) -> NDArray[np.int64]:
        """Return (P+1,) where each position's entries start."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts_P)])


@dataclass(frozen=True)
class Finding:
    """One thing to be said of a cache.

    Attributes:
        name: for machines, as `shifted_positions`.
        severity: `fatal` (nothing but another capture helps), `repairable` (`repair` names what to ask `convert` for),
            `undecided` (the file does not tell; `--accept NAME` takes it on trust), `note` (no defect).
        sentence: for people.
        repair: the flag of `kdcache convert` that mends it.
    """

    name: str
    severity: Severity
    sentence: str
    repair: str | None = None

    def __post_init__(self) -> None:
        if self.repair is not None and self.repair not in ADVICE.get(self.name, ()):
            raise ValueError(f"the finding {self.name!r} advises {self.repair!r}, which is not in ADVICE")


@dataclass(frozen=True)
class ForeignCache:
    """An opened foreign cache.

    Attributes:
        format: `distillkit`, `axolotl`, `nemo-aligner`, `answers`, `columns`, `megatron`.
        title: the same for people.
        path: as the user named it.
        values: what the values are claimed to be.
        read: gives the sequences from the first on; may be called again.
        facts: what the files say of themselves, for people.
        vocab_size: ids that a distribution ranges over, where the files say so.
        approximate_from: rank from which on values are a fitted curve; None where all are stored.
        findings: what is known from the layout alone.
    """

    format: str
    title: str
    path: str
    values: ValueKind
    read: Callable[[], Iterator[ForeignSequence]]
    facts: Mapping[str, str] = field(default_factory=dict)
    vocab_size: int | None = None
    approximate_from: int | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """What a user may say of a foreign cache that its files do not.

    Attributes:
        columns: our name (a key of `columns.KNOWN`) -> the column's name in the files.
        values: what the values are; None to take the format's word.
        config: path of DistillKit's `compression_config.yaml`, or of a training config that holds it.
        first_position: index t of the first stored position, for plain columns; None for the format's own rule.
        tokenizer: of the token ids: makes ids of chats and of tokens that files hold as text.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    values: ValueKind | None = None
    config: str | None = None
    first_position: int | None = None
    tokenizer: Tokenizer | None = None


NO_ENTRIES = ((np.zeros(0), np.zeros(0, np.int64)), (np.zeros(0), np.zeros(0, np.int64)))
"""Ids and values, for `ragged`, of a sequence whose cells are null: it is counted, not passed over."""


def without_positions(source: str, input_ids_N: NDArray[np.int64] | None) -> ForeignSequence:
    """Make a sequence without positions."""
    none = np.zeros(0, np.int64)
    return ForeignSequence(source, input_ids_N, none, none, none, np.zeros(0))


def ragged(
    source: str, ids: tuple[Any, Any], values: tuple[Any, Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Join two nested lists of a file to counts, ids and values of positions.

    Args:
        source: for messages.
        ids, values: (flat array, lengths of the inner lists) of each; see `tables.nested`.

    Raises:
        InputError: the two nested lists do not have the same shape, or are larger than anything real.
    """
    (flat_ids, counts_P), (flat_values, value_counts_P) = ids, values
    if len(counts_P) != len(value_counts_P) or (counts_P != value_counts_P).any():
        raise InputError(f"{source}: {_shape(counts_P)} ids, but {_shape(value_counts_P)} values; each id needs one value")
    check_size(source, counts_P)
    return counts_P.astype(np.int64), to_ids(source, flat_ids), np.asarray(flat_values, np.float64)


def check_size(source: str, counts_P: NDArray[np.integer]) -> None:
    """Raise InputError for positions or sequences larger than anything real, before they are allocated."""
    if len(counts_P) and int(counts_P.max()) > MAX_ENTRIES_PER_POSITION:
        raise InputError(
            f"{source}: a position has {int(counts_P.max()):,} entries; at most {MAX_ENTRIES_PER_POSITION:,} are read"
        )
    if int(counts_P.sum()) > MAX_ENTRIES_PER_SEQUENCE:
        raise InputError(f"{source}: {int(counts_P.sum()):,} entries; at most {MAX_ENTRIES_PER_SEQUENCE:,} are read")


def to_ids(source: str, ids: Any) -> NDArray[np.int64]:
    """Convert ids to int64; raises InputError where they are not whole numbers."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.trunc(array)).all() and (abs(array) < 2**53).all():
        return array.astype(np.int64)
    if array.dtype.kind not in "iu" or (array.dtype == np.uint64 and int(array.max()) >= 2**63):
        raise InputError(f"{source}: token ids must be whole numbers, found {array.dtype}")
    return array.astype(np.int64)


def _shape(counts_P: NDArray[np.integer]) -> str:
    if not len(counts_P):
        return "no positions of"
    low, high = int(counts_P.min()), int(counts_P.max())
    return f"{len(counts_P)} positions of {low if low == high else f'{low} to {high}'}"
