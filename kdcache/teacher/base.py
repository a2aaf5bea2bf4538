"""The teacher protocol: token sequences in, sparse next-token distributions out.

Contract (tests/contracts/teacher.py runs it for every backend):

- `score` yields one `Distributions` per sequence, in the order given, with one position per supervised position of the
  sequence: the record at position t is the distribution after reading tokens 0..t. The last position may be supervised.
- Logprobs are normalised over the whole vocabulary (`identity.vocab_size` ids) at temperature 1, whatever the selection keeps.
- The support is what `kdcache.teacher.select.reference` says of the same distribution; of tokens that tie for the last of k
  places, the engine chooses. The random kinds take their draws from `kdcache.teacher.select.uniforms`: a re-run gives the same.
- `check_distributions` holds for every answer.
- The same sequence gives the same support and logprobs (up to the engine's numerics) alone or beside others.
- What can be refused is refused before anything is computed, by `score` itself and not by the first `next`.
- An iterator that is dropped half-way leaves the teacher usable.
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
    """A model that can be asked for its next-token distributions. Has a lifetime: close it."""

    @property
    def identity(self) -> TeacherIdentity:
        """Which model, through which engine."""
        ...

    def score(
        self, sequences: Sequence[TokenSequence], selection: SelectionInfo, features: Sequence[FeatureInfo] = ()
    ) -> Iterator[Distributions]:
        """Teacher-force the sequences.

        Args:
            sequences: each no longer than identity.context_length; the backend forms its own batches.
            selection: which entries to keep; see `kdcache.format.manifest.SelectionInfo`.
            features: hidden states to give beside them, as `Distributions.features`; `kdcache.teacher.features` says what they
                are, and which teachers have them.

        Raises:
            ConfigError: a selection this backend cannot make, k larger than the vocabulary, or features it cannot give.
                `score([], selection, features)` asks.
            InputError: a sequence longer than the context, or an id outside the vocabulary.
            TeacherError: the engine failed, or the teacher is closed.
        """
        ...

    def close(self) -> None:
        """Give the model's memory back; calling it twice is fine."""
        ...


def check_selectable(selection: SelectionInfo, *, vocab_size: int) -> None:
    """Raise ConfigError, with the field's name, unless the selection can be made of distributions over this vocabulary."""
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
        backend: its name, for the error.
        kinds: those that it makes of the k most probable tokens.
        reason: a clause about why it has no more, for the error.

    Raises:
        ConfigError: a selection that needs the whole distribution, or a k outside [1, vocab_size].
    """
    check_selectable(selection, vocab_size=vocab_size)
    needs = [f"selection.kind {selection.kind!r}"] * (selection.kind not in kinds)
    needs += ["selection.temperatures"] * bool(selection.temperatures) + ["selection.entropy"] * selection.entropy
    needs += ["capturing after a sampler's filters"] * bool(selection.filters)
    if needs:
        raise ConfigError(
            f"{needs[0]} needs the whole distribution, but the {backend} teacher gives the k most probable tokens "
            f"only{reason}; "
            f"use selection.kind {' or '.join(map(repr, kinds))} without temperatures and entropy, or the transformers "
            "teacher, or vllm on its worker route"
        )
    return int(selection.params["k"])


def check_sequences(sequences: Sequence[TokenSequence], identity: TeacherIdentity) -> None:
    """Refuse sequences that the teacher cannot read, before any is computed.

    Raises:
        InputError: a sequence without tokens, one longer than `identity.context_length`, or an id outside
            `identity.vocab_size`. vLLM's engine does not survive such an id, so it must not come that far.
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
    """What a backend found at the sequence's supervised positions, as a record.

    Args:
        sequence: the one that was asked about; P is the number of its supervised positions.
        token_ids_PK, logprobs_PK: the support in any order; nats, normalised over the whole vocabulary.
        target_logprobs_P: nats; anything where there is no target.

    Raises:
        TeacherError: a logprob is NaN: the model overflowed.
    """
    if np.isnan(logprobs_PK).any():
        raise nan_error(sequence, int(np.isnan(logprobs_PK).any(axis=-1).argmax()))
    return distributions_from_dense(token_ids_PK, logprobs_PK, sequence.target_ids_P, target_logprobs_P)


def nan_error(sequence: TokenSequence, index: int) -> TeacherError:
    """What to say of a sequence that has NaN at one of its supervised positions, the one with this index among them."""
    position = int(sequence.positions_P[index])
    return TeacherError(
        f"{sequence.source}: the teacher gave NaN at position {position}; "
        "float16 overflows in many models: set teacher.dtype to bfloat16 or float32"
    )


def no_positions(selection: SelectionInfo | None = None) -> Distributions:
    """The answer to a sequence in which nothing is supervised; without a selection, one of exact entries and nothing beside."""
    has_random = selection is not None and has_estimates(selection)
    temperatures = selection.temperatures if selection is not None else ()
    return Distributions(
        num_exact_P=np.empty(0, np.int64) if has_random else None,
        log_z_PT=np.empty((0, len(temperatures)), np.float32) if temperatures else None,
        entropy_P=np.empty(0, np.float32) if selection is not None and selection.entropy else None,
        token_ids_E=np.empty(0, np.int32),
        logprobs_E=np.empty(0, np.float32),
        offsets_P1=np.zeros(1, np.int64),
        tail_mass_P=np.empty(0, np.float32),
        outside_target_logprobs_M=np.empty(0, np.float32),
    )


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's text, without its full stop, for a sentence of ours; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
