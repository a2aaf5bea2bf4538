"""A teacher backend in one file: every distribution is one Zipf law, and the token just read is its most probable next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kdcache.config.teacher import TeacherConfig
from kdcache.errors import TeacherError
from kdcache.format.manifest import FeatureInfo, SelectionInfo, TeacherIdentity
from kdcache.format.record import Distributions, TokenSequence
from kdcache.teacher.backend import Backend
from kdcache.teacher.base import check_selectable, check_sequences, no_positions
from kdcache.teacher.features import check_askable
from kdcache.teacher.select.reference import select_reference
from kdcache.teacher.select.uniforms import position_states


class ToyBackend(Backend):
    """Named `toy` in a config."""

    teacher = "toy_teacher:ToyTeacher"

    def tokenizer_name(self, config: TeacherConfig) -> str:
        """See `Backend`."""
        return "fake"


class ToyTeacher:
    """Called with the config's section `teacher`; `engine_options` are its own to read."""

    def __init__(self, config: TeacherConfig) -> None:
        vocab_size = int(config.engine_options.get("vocab_size", 300))
        weights_V = np.arange(1, vocab_size + 1, dtype=np.float64) ** -1.3
        self._by_rank_V = np.log(weights_V / weights_V.sum())
        self._is_closed = False
        self._identity = TeacherIdentity(
            model=config.model,
            architecture="Toy",
            vocab_size=vocab_size,
            dtype="float64",
            engine="toy",
            engine_version="1.0",
            engine_options={"vocab_size": vocab_size},
            context_length=512,
        )

    @property
    def identity(self) -> TeacherIdentity:
        return self._identity

    def dense_logprobs(self, sequence: TokenSequence) -> np.ndarray:
        """(N, V) the whole distribution at every position."""
        ids_V, vocab_size = np.arange(self._identity.vocab_size), self._identity.vocab_size
        return self._by_rank_V[(ids_V[None, :] - sequence.input_ids_N[:, None]) % vocab_size]

    def score(
        self, sequences: Sequence[TokenSequence], selection: SelectionInfo, features: Sequence[FeatureInfo] = ()
    ) -> Iterator[Distributions]:
        check_selectable(selection, vocab_size=self._identity.vocab_size)
        check_askable(features, None)
        if self._is_closed:
            raise TeacherError(f"the teacher {self._identity.model!r} is closed")
        check_sequences(sequences, self._identity)
        return (self._score(sequence, selection) for sequence in sequences)

    def _score(self, sequence: TokenSequence, selection: SelectionInfo) -> Distributions:
        if not sequence.supervised_N.any():
            return no_positions(selection)
        states_P = position_states(selection.params.get("seed", 0), sequence.key, sequence.positions_P)
        dense_PV = self.dense_logprobs(sequence)[sequence.supervised_N]
        return select_reference(dense_PV, sequence.target_ids_P, selection, states_P)

    def close(self) -> None:
        self._is_closed = True
