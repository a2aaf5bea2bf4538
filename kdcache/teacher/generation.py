"""Answers that a teacher writes itself: what it is asked, what it gives, where an answer ends. Arrays and text; no model.

The contract of `generate`, which tests/contracts/generation.py runs for every backend that has it:

- One `Generated` per prompt, in the order given; at least one token each, at most `max_tokens`.
- An answer's tokens are as they were drawn, with the one that ended it: an end token, or the token
  that completed a stop string. `finish` is `stop` then, and `length` if the answer has `max_tokens`
  without either.
- Each draw comes from the prompt's own seed, so that an answer does not depend on what else is asked, up to the engine's
  numerics: in half precision a batch of another shape may round a near tie the other way, and the answer continues from there.
- At temperature 0 each token is the most probable one.
- What can be refused is refused before anything is computed, by `generate` itself and not by the first `next`.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kdcache.config.capture import GenerateConfig
from kdcache.errors import ConfigError, InputError
from kdcache.format.manifest import TeacherIdentity
from kdcache.format.record import TokenSequence
from kdcache.teacher.base import Teacher, check_sequences
from kdcache.teacher.tokenizer import Tokenizer

Observe = Callable[[int], None]
"""Called now and then while a teacher works, with the number of tokens since the last call."""

EXTRA_TOKENS = 8
"""How many tokens are decoded before those that could end a stop string: a tokenizer may drop the first one's space, or need
several tokens for one character."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A sequence in which nothing is supervised, to be answered, and the seed of its answer, in [0, 2^63)."""

    sequence: TokenSequence
    seed: int

    @property
    def source(self) -> str:
        """Where it came from, for people."""
        return self.sequence.source


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """An answer: (N,) int32 token ids, at least one, and `stop` or `length`."""

    token_ids_N: NDArray[np.int32]
    finish: str


@runtime_checkable
class GeneratingTeacher(Teacher, Protocol):
    """A teacher that can write answers."""

    def generate(
        self, prompts: Sequence[Prompt], config: GenerateConfig, tokenizer: Tokenizer, observe: Observe = ...
    ) -> Iterator[Generated]:
        """Answer the prompts.

        Args:
            prompts: each at least max_tokens shorter than identity.context_length; the backend forms its own batches.
            config: sampling and ends. `n` is not read: each answer has a prompt of its own.
            tokenizer: the one that the prompts came from, for its end tokens, and for text in which to find stop strings.
            observe: see Observe. The answers themselves may all come at the end.

        Raises:
            ConfigError: an id in stop_token_ids that the teacher does not have.
            InputError: a prompt that is too long, or an id outside the vocabulary.
            TeacherError: the engine failed, or the teacher is closed.
        """
        ...


def answer_seed(seed: int, key: bytes, index: int) -> int:
    """The seed of one of the answers to the prompt with this key, in [0, 2^63).

    Equal prompts have equal answers, wherever they stand in the input.
    """
    text = b"kdcache.generate.v1\0" + seed.to_bytes(16, "little") + key + index.to_bytes(8, "little")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def check_prompts(prompts: Sequence[Prompt], config: GenerateConfig, identity: TeacherIdentity) -> None:
    """Refuse what a teacher cannot answer, before it does anything; raises as `GeneratingTeacher.generate`."""
    outside = [token_id for token_id in config.stop_token_ids if token_id >= identity.vocab_size]
    if outside:
        raise ConfigError(
            f"generate.stop_token_ids: {outside[0]} is outside the vocabulary of {identity.vocab_size} of the teacher "
            f"{identity.model!r}"
        )
    check_sequences([prompt.sequence for prompt in prompts], identity)
    for prompt in prompts:
        num_tokens = prompt.sequence.num_tokens + config.max_tokens
        if num_tokens > identity.context_length:
            raise InputError(
                f"{prompt.sequence.source}: {prompt.sequence.num_tokens} tokens of prompt and {config.max_tokens} of answer "
                f"are more than the {identity.context_length} that the teacher {identity.model!r} reads; make "
                "generate.max_tokens or input.window.size smaller"
            )


def end_tokens(config: GenerateConfig, *ends: int | Sequence[int] | None) -> frozenset[int]:
    """The ids that end an answer: stop_token_ids, and `ends` (an id, several or None) unless the config ignores them."""
    own: set[int] = set()
    for end in ends if not config.ignore_eos else ():
        own |= {end} if isinstance(end, int) else set(end or ())
    return frozenset(own | set(config.stop_token_ids))


class Ending:
    """Finds where answers end; one serves all answers of a call."""

    def __init__(self, config: GenerateConfig, tokenizer: Tokenizer, end_ids: frozenset[int]) -> None:
        self.config, self.end_ids = config, end_ids
        self._tokenizer = tokenizer
        self._vocab_size = tokenizer.identity.vocab_size
        # A visible token has at least one character, so a stop string has no more tokens than characters.
        self._num_tail = max(map(len, config.stop), default=0) + EXTRA_TOKENS

    def finish(self, token_ids: Sequence[int]) -> str:
        """How an answer has ended with its last token: `stop`, `length`, or "" if it has not."""
        if token_ids[-1] in self.end_ids or self._completes_stop(token_ids):
            return "stop"
        return "length" if len(token_ids) >= self.config.max_tokens else ""

    def cut(self, token_ids: Sequence[int]) -> Generated:
        """Cut an answer that an engine may have continued past its end: up to the first token at which `finish` names an end.

        An answer without a stop string is decoded once, one with a stop string about a dozen times. Asking `finish` at each
        token would take longer than a fast engine.
        """
        token_ids = token_ids[: self.config.max_tokens]
        end = next((length for length, token_id in enumerate(token_ids, 1) if token_id in self.end_ids), None)
        token_ids = token_ids[:end]
        if self._has_stop(token_ids):
            lengths = range(1, len(token_ids) + 1)
            end = lengths[bisect_left(lengths, True, key=lambda length: self._has_stop(token_ids[:length]))]
        return Generated(np.array(token_ids[:end], np.int32), "length" if end is None else "stop")

    def _has_stop(self, token_ids: Sequence[int]) -> bool:
        if not self.config.stop:
            return False
        text = self._text(token_ids)
        return any(stop in text for stop in self.config.stop)

    def _completes_stop(self, token_ids: Sequence[int]) -> bool:
        if not self.config.stop:
            return False
        tail = token_ids[-self._num_tail :]
        before, after = self._text(tail[:-1]), self._text(tail)
        return any(after.count(stop) > before.count(stop) for stop in self.config.stop)

    def _text(self, token_ids: Sequence[int]) -> str:
        # A model may have ids beyond its tokenizer's; they have no text.
        return self._tokenizer.decode([token_id for token_id in token_ids if token_id < self._vocab_size])


def draw_from(logprobs_V: NDArray[np.float64], config: GenerateConfig, uniform: float) -> int:
    """Draw one token: the definition for every backend, except for the source of random numbers.

    Temperature comes first, then min_p, then top_k, then top_p, each on the probabilities of what the one before has left; this
    is the order of vLLM's sampler. Ties at a border stay.

    Args:
        logprobs_V: nats, or logits.
        config: how to sample.
        uniform: in [0, 1).
    """
    if config.temperature == 0:
        return int(np.argmax(logprobs_V))
    probabilities_V = filtered_probabilities(logprobs_V, config)
    sums_V = np.cumsum(probabilities_V)
    return int(np.searchsorted(sums_V, uniform * sums_V[-1], side="right"))


def filtered_probabilities(logprobs_V: NDArray[np.float64], config: GenerateConfig) -> NDArray[np.float64]:
    """The probabilities that are drawn from at a temperature above 0; see `draw_from`."""
    logits_V = np.asarray(logprobs_V, np.float64) / config.temperature
    probabilities_V = np.exp(logits_V - logits_V.max())
    probabilities_V[probabilities_V < config.min_p] = 0.0
    if 0 < config.top_k < len(probabilities_V):
        probabilities_V[probabilities_V < np.sort(probabilities_V)[-config.top_k]] = 0.0
    probabilities_V /= probabilities_V.sum()
    if config.top_p < 1:
        falling_V = np.sort(probabilities_V)[::-1]
        # The least probable token that is still needed to reach the mass.
        last = min(int(np.searchsorted(np.cumsum(falling_V), config.top_p)), len(falling_V) - 1)
        probabilities_V[probabilities_V < falling_V[last]] = 0.0
    return probabilities_V / probabilities_V.sum()
