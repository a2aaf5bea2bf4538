"""The teacher protocol: token sequences in, sparse next-token distributions out.

The contract, which tests/contracts/teacher.py runs for every backend:

- `score` yields one `Distributions` per sequence, in the order given, with one position per supervised position of the
  sequence: the record at position t is the distribution after reading tokens 0..t. The last position may be supervised.
- Logprobs are normalised over the whole vocabulary (`identity.vocab_size` ids) at temperature 1, whatever the selection keeps.
- The support is what `kdcache.teacher.select.reference` gives for the same distribution; among tokens that tie for rank k, the
  engine chooses. The random kinds draw from `kdcache.teacher.select.uniforms`, so a second run gives the same.
- `check_distributions` holds for every answer.
- A sequence has the same support and logprobs (up to the engine's numerics) alone and together with others.
- What can be refused is refused before anything is computed, by `score` itself and not by the first `next`.
- The teacher remains usable if an iterator is dropped half-way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ConfigError, FormatError, InputError, TeacherError
from kdcache.format.manifest import FeatureInfo, SelectionInfo, TeacherIdentity
from kdcache.format.record import Distributions, TokenSequence, distributions_from_dense
from kdcache.format.selection import check_selection, has_estimates


class Teacher(Protocol):
    """A model that can be asked for its next-token distributions. It has a lifetime: close it."""

    @property
    def identity(self) -> TeacherIdentity:
        """Which model this is, run by which engine."""
        ...

    def score(
        self, sequences: Sequence[TokenSequence], selection: SelectionInfo, features: Sequence[FeatureInfo] = ()
    ) -> Iterator[Distributions]:
        """Teacher-force sequences and give their distributions.

        Args:
            sequences: each at most identity.context_length long; the backend forms its own batches.
            selection: which entries to keep; see `kdcache.format.manifest.SelectionInfo`.
            features: hidden states to give, too, as `Distributions.features`; `kdcache.teacher.features` says what they are,
                and which teachers have them.

        Raises:
            ConfigError: a selection that this backend cannot make, a k larger than the vocabulary, or features that it cannot
                give. `score([], selection, features)` runs only these checks.
            InputError: a sequence longer than the context, or an id outside the vocabulary.
            TeacherError: the engine failed, or the teacher is closed.
        """
        ...

    def close(self) -> None:
        """Release the model's memory; calling it twice is fine."""
        ...


def check_selectable(selection: SelectionInfo, *, vocab_size: int) -> None:
    """Raise ConfigError, with the field's name, unless the selection can be made over this vocabulary."""
    try:
        check_selection(selection)
    except FormatError as error:
        raise ConfigError(f"selection: {error}") from error
    k = selection.params.get("k", 1)
    if not 1 <= k <= vocab_size:
        raise ConfigError(f"selection.k is {k}, but must be from 1 to the teacher's vocabulary of {vocab_size}")


def top_k_of(
    selection: SelectionInfo, *, vocab_size: int, backend: str, kinds: tuple[str, ...] = ("top_k",), reason: str = ""
) -> int:
    """k, for a backend whose engine gives the k most probable tokens and no more.

    Args:
        selection: what is asked for.
        vocab_size: of the teacher.
        backend: the backend's name, for the error.
        kinds: the selections that it makes from the k most probable tokens.
        reason: a clause that says why it gives no more, for the error.

    Raises:
        ConfigError: a selection that needs the whole distribution, or a k outside [1, vocab_size].
    """
    check_selectable(selection, vocab_size=vocab_size)
    needs = [f"selection.kind {selection.kind!r}"] * (selection.kind not in kinds)
    needs += ["selection.temperatures"] * bool(selection.temperatures) + ["selection.entropy"] * selection.entropy
    needs += ["capturing after a sampler's filters"] * bool(selection.filters)
    if needs:
        raise ConfigError(
            f"{needs[0]} needs the whole distribution, but the {backend} teacher gives only the k most probable "
            f"tokens{reason}; "
            f"use selection.kind {' or '.join(map(repr, kinds))} without temperatures and entropy, or the transformers "
            "teacher, or vllm on its worker route"
        )
    return int(selection.params["k"])


def check_sequences(sequences: Sequence[TokenSequence], identity: TeacherIdentity) -> None:
    """Refuse sequences that the teacher cannot read, before anything is computed.

    Raises:
        InputError: a sequence without tokens, one longer than `identity.context_length`, or an id outside
            `identity.vocab_size`. vLLM's engine does not survive such an id, so it must not get there.
    """
    for sequence in sequences:
        num_tokens, ids_N = sequence.num_tokens, sequence.input_ids_N
        if num_tokens == 0:
            raise InputError(f"{sequence.source}: a sequence without tokens has no distribution")
        if num_tokens > identity.context_length:
            raise InputError(
                f"{sequence.source}: {num_tokens} tokens, but the teacher {identity.model!r} reads at most "
                f"{identity.context_length} per sequence; make input.window.size smaller"
            )
        if int(ids_N.min()) < 0 or int(ids_N.max()) >= identity.vocab_size:
            bad = int(ids_N.max()) if int(ids_N.min()) >= 0 else int(ids_N.min())
            raise InputError(
                f"{sequence.source}: token id {bad} is outside the vocabulary of {identity.vocab_size} of the teacher "
                f"{identity.model!r}; use the tokenizer that belongs to the model"
            )


def answer(
    sequence: TokenSequence,
    token_ids_PK: NDArray[np.integer],
    logprobs_PK: NDArray[np.floating],
    target_logprobs_P: NDArray[np.floating],
) -> Distributions:
    """The record of what a backend found at a sequence's supervised positions.

    Args:
        sequence: the one that was asked about, with P supervised positions.
        token_ids_PK: the support, in any order.
        logprobs_PK: nats, normalised over the whole vocabulary.
        target_logprobs_P: nats; anything where nothing follows.

    Raises:
        TeacherError: a logprob is NaN: the model overflowed.
    """
    if np.isnan(logprobs_PK).any():
        raise nan_error(sequence, int(np.isnan(logprobs_PK).any(axis=-1).argmax()))
    return distributions_from_dense(token_ids_PK, logprobs_PK, sequence.target_ids_P, target_logprobs_P)


def nan_error(sequence: TokenSequence, index: int) -> TeacherError:
    """The error about NaN at one of a sequence's supervised positions, the one with this index among them."""
    position = int(sequence.positions_P[index])
    return TeacherError(
        f"{sequence.source}: the teacher gave NaN at position {position}; "
        "float16 overflows in many models: set teacher.dtype to bfloat16 or float32"
    )


def no_positions(selection: SelectionInfo | None = None) -> Distributions:
    """The answer to a sequence in which nothing is supervised; without a selection, one with exact entries only."""
    has_random = selection is not None and has_estimates(selection)
    temperatures = selection.temperatures if selection is not None else ()
    return Distributions(
        num_exact_P=np.empty(0, np.int64) if has_random else None,
        log_z_PL=np.empty((0, len(temperatures)), np.float32) if temperatures else None,
        entropy_P=np.empty(0, np.float32) if selection is not None and selection.entropy else None,
        token_ids_E=np.empty(0, np.int32),
        logprobs_E=np.empty(0, np.float32),
        offsets_P1=np.zeros(1, np.int64),
        tail_mass_P=np.empty(0, np.float32),
        outside_target_logprobs=np.empty(0, np.float32),
    )
