"""The teacher protocol: token sequences in, sparse next-token distributions out.

Contract (tests/contracts/teacher.py runs it for every backend):

- `score` yields one `Distributions` per sequence, in the order given, with one position per supervised position of the
  sequence: the record at position t is the distribution after reading tokens 0..t. The last position may be supervised.
- Logprobs are normalised over the whole vocabulary (`identity.vocab_size` ids) at temperature 1, whatever the selection keeps.
- `check_distributions` holds for every answer.
- The same sequence gives the same support and logprobs (up to the engine's numerics) alone or beside others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from kdcache.errors import ConfigError
from kdcache.format.manifest import SelectionInfo, TeacherIdentity
from kdcache.format.record import Distributions, TokenSequence


class Teacher(Protocol):
    """A model that can be asked for its next-token distributions. Has a lifetime: close it."""

    @property
    def identity(self) -> TeacherIdentity:
        """Which model, through which engine."""
        ...

    def score(self, sequences: Sequence[TokenSequence], selection: SelectionInfo) -> Iterator[Distributions]:
        """Teacher-force the sequences.

        Args:
            sequences: each no longer than identity.context_length; the backend forms its own batches.
            selection: which entries to keep; see `kdcache.format.manifest.SelectionInfo`.

        Raises:
            ConfigError: a selection this backend cannot make, or k larger than the vocabulary.
            InputError: a sequence longer than the context.
            TeacherError: the engine failed.
        """
        ...

    def close(self) -> None:
        """Give the model's memory back; calling it twice is fine."""
        ...


def top_k_of(selection: SelectionInfo, *, vocab_size: int, backend: str) -> int:
    """k of a `top_k` selection.

    Raises:
        ConfigError: another kind of selection, or a k outside [1, vocab_size].
    """
    if selection.kind != "top_k":
        raise ConfigError(f"selection.kind: the {backend} teacher makes 'top_k', not {selection.kind!r}")
    k = int(selection.params["k"])
    if not 1 <= k <= vocab_size:
        raise ConfigError(f"selection.k is {k}, but must be from 1 to the teacher's vocabulary of {vocab_size}")
    return k
