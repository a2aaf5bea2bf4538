"""A teacher and a tokenizer that need no model: arithmetic on hashes, NumPy alone.

The distribution at position t is a function of (seed, tokens 0..t): a Zipf law over ranks, p(r) = (r+1)^-s / Z, whose exponent
s and assignment of ids to ranks, id = (a*r + b) mod V, are drawn from a hash of the prefix. Every index has a closed form,
so logprobs, tail mass and targets agree exactly for any vocabulary, and `top_k` needs no [tokens, vocab] array.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.config.capture import GenerateConfig, TeacherConfig
from kdcache.errors import ConfigError, TeacherError
from kdcache.format.feature_positions import feature_positions
from kdcache.format.manifest import FeatureInfo, SelectionInfo, TeacherIdentity, TokenizerIdentity
from kdcache.format.record import Distributions, TokenSequence, distances_key
from kdcache.inputs.chat import Chat, Message, is_learnt
from kdcache.teacher.backend import Backend
from kdcache.teacher.base import answer, check_selectable, check_sequences, no_positions
from kdcache.teacher.features import ATTENTION, HEADS, HIDDEN, LAST, HiddenShape, check_askable, pooled, top_keys
from kdcache.teacher.generation import Ending, Generated, Observe, Prompt, check_prompts, draw_from, end_tokens
from kdcache.teacher.select.found import concatenate
from kdcache.teacher.select.reference import select_reference
from kdcache.teacher.select.uniforms import GOLDEN, mix64, position_states
from kdcache.teacher.tokenizer import ROLE_CODES, ChatTokens, Tokenizer, check_chat

FAKE_VERSION = "1"
"""Part of the identity: raise it when the distributions or the rendering of chats change."""

EXPONENTS = np.linspace(1.05, 2.5, 16)
NUM_MULTIPLIERS = 64

FAKE_HIDDEN = HiddenShape(num_layers=4, size=16, num_heads=4, num_kv_heads=2, head_dim=4)

DENSE_ELEMENTS = 2**20
"""How many logprobs of whole distributions exist at once; the plain `top_k` needs none."""


class FakeBackend(Backend):
    """The backend `fake`, whose model is any name."""

    teacher = "kdcache.teacher.fake:FakeTeacher"

    def tokenizer_name(self, config: TeacherConfig) -> str:  # noqa: ARG002
        """See `Backend`."""
        return "fake"

    def hidden_shape(self, config: TeacherConfig) -> HiddenShape | None:  # noqa: ARG002
        """See `Backend`."""
        return FAKE_HIDDEN


class FakeTeacher:
    """A teacher with deterministic distributions from hashes of the prefix; see the module's docstring."""

    def __init__(self, config: TeacherConfig) -> None:
        self._seed = config.fake.seed
        self._is_closed = False
        self._identity = TeacherIdentity(
            model=config.model,
            architecture="Fake",
            vocab_size=config.fake.vocab_size,
            dtype="float64",
            engine="fake",
            engine_version=FAKE_VERSION,
            engine_options={"seed": config.fake.seed},
            context_length=config.fake.context_length,
        )
        vocab_size = config.fake.vocab_size
        ranks_V = np.arange(1, vocab_size + 1, dtype=np.float64)
        self._log_z = np.array([math.log(math.fsum(ranks_V**-s)) for s in EXPONENTS])
        self._multipliers = _units_modulo(vocab_size, NUM_MULTIPLIERS)
        self._inverses = np.array([pow(int(a), -1, vocab_size) for a in self._multipliers], np.int64)

    @property
    def identity(self) -> TeacherIdentity:
        """See `Teacher`."""
        return self._identity

    @property
    def hidden_shape(self) -> HiddenShape:
        """See `FeatureTeacher`."""
        return FAKE_HIDDEN

    def score(
        self, sequences: Sequence[TokenSequence], selection: SelectionInfo, features: Sequence[FeatureInfo] = ()
    ) -> Iterator[Distributions]:
        """See `Teacher`."""
        check_selectable(selection, vocab_size=self._identity.vocab_size)
        check_askable(features, FAKE_HIDDEN)
        if self._is_closed:
            raise TeacherError(f"the teacher {self._identity.model!r} is closed")
        check_sequences(sequences, self._identity)
        answers = ((sequence, self._score(sequence, selection)) for sequence in sequences)
        if not features:
            return (distributions for _, distributions in answers)
        return (replace(distributions, features=self._features(sequence, features)) for sequence, distributions in answers)

    def hidden_states(self, sequence: TokenSequence, layer: int) -> NDArray[np.float32]:
        """(N, H) in [-8, 8): the layer's vector at every position, from hashes of the prefix and the layer.

        The final norm halves: the last layer before it is twice that after it, LAST.
        """
        last = layer in (LAST, FAKE_HIDDEN.num_layers)
        states_NH = self._hashed(sequence, (FAKE_HIDDEN.num_layers if last else layer) + 1, FAKE_HIDDEN.size)
        return states_NH * np.float32(2) if layer == FAKE_HIDDEN.num_layers else states_NH

    def head_states(self, sequence: TokenSequence, kind: str, layer: int) -> NDArray[np.float32]:
        """(N, heads, numbers per head) in [-8, 8): queries, keys or values of a layer."""
        heads, head_dim = FAKE_HIDDEN.heads_of(kind) or 0, FAKE_HIDDEN.head_dim or 0
        salt = (1 + HEADS.index(kind)) * 2**16 + layer
        return self._hashed(sequence, salt, heads * head_dim).reshape(-1, heads, head_dim)

    def attention(self, sequence: TokenSequence, layer: int) -> NDArray[np.float64]:
        """(heads, N, N): the softmax of a layer's queries and keys, over the keys up to each position."""
        queries, keys = (self.head_states(sequence, kind, layer).astype(np.float64) for kind in ("queries", "keys"))
        keys = np.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)
        scores = np.einsum("nhd,mhd->hnm", queries, keys) / queries.shape[2]
        scores = np.where(np.tri(len(queries), dtype=np.bool_), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def _hashed(self, sequence: TokenSequence, salt: int, width: int) -> NDArray[np.float32]:
        hashes_N = prefix_hashes(sequence.input_ids_N, self._seed)
        indices_W = np.arange(width, dtype=np.uint64) + np.uint64(salt * FAKE_HIDDEN.size)
        # The upper 24 bits: as many as a float32 holds exactly.
        bits_NW = mix64(hashes_N[:, None] + mix64(indices_W)) >> np.uint64(40)
        return (bits_NW.astype(np.float32) * np.float32(2.0**-20)) - np.float32(8)

    def _features(self, sequence: TokenSequence, features: Sequence[FeatureInfo]) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {}
        for feature in features:
            positions = feature_positions(feature, sequence.supervised_N)
            if feature.kind == ATTENTION:
                maps = self.attention(sequence, feature.layer)[:, positions]
                found[feature.name], found[distances_key(feature)] = top_keys(maps, positions, feature.top_keys or 1)
                continue
            if feature.kind == HIDDEN:
                vectors = self.hidden_states(sequence, feature.layer)[positions]
            else:
                vectors = self.head_states(sequence, feature.kind, feature.layer)[positions].reshape(len(positions), -1)
            found[feature.name] = pooled(vectors, feature.pooling)
        return found

    def dense_logprobs(self, sequence: TokenSequence) -> NDArray[np.float64]:
        """(N, V): the whole distribution at every position, the definition that `score` is compared with."""
        hashes_N = prefix_hashes(sequence.input_ids_N, self._seed)
        ids_V = np.broadcast_to(np.arange(self._identity.vocab_size), (len(hashes_N), self._identity.vocab_size))
        return self._logprobs_of_ids(hashes_N, ids_V)

    def generate(
        self, prompts: Sequence[Prompt], config: GenerateConfig, tokenizer: Tokenizer, observe: Observe = lambda _: None
    ) -> Iterator[Generated]:
        """See `GeneratingTeacher`: one token after another, from `dense_logprobs`."""
        if self._is_closed:
            raise TeacherError(f"the teacher {self._identity.model!r} is closed")
        check_prompts(prompts, config, self._identity)
        ending = Ending(config, tokenizer, end_tokens(config, tokenizer.end_ids))
        return (self._answer(prompt, config, ending, observe) for prompt in prompts)

    def close(self) -> None:
        """See `Teacher`."""
        self._is_closed = True

    def _answer(self, prompt: Prompt, config: GenerateConfig, ending: Ending, observe: Observe) -> Generated:
        random = np.random.default_rng(prompt.seed)
        ids_V = np.arange(self._identity.vocab_size)[None]
        token_ids, finish = prompt.sequence.input_ids_N.tolist(), ""
        while not finish:
            hash_1 = prefix_hashes(np.array(token_ids, np.int32), self._seed)[-1:]
            token_ids.append(draw_from(self._logprobs_of_ids(hash_1, ids_V)[0], config, random.random()))
            finish = ending.finish(token_ids[prompt.sequence.num_tokens :])
        observe(len(token_ids) - prompt.sequence.num_tokens)
        return Generated(np.array(token_ids[prompt.sequence.num_tokens :], np.int32), finish)

    def _score(self, sequence: TokenSequence, selection: SelectionInfo) -> Distributions:
        if not sequence.supervised_N.any():
            return no_positions(selection)
        hashes_P = prefix_hashes(sequence.input_ids_N, self._seed)[sequence.supervised_N]
        if selection.kind != "top_k" or selection.temperatures or selection.entropy or selection.filters:
            return self._select(sequence, selection, hashes_P)
        exponents_P, multipliers_P, shifts_P, _ = self._draw(hashes_P)
        ranks_K = np.arange(selection.params["k"])
        ids_PK = (multipliers_P[:, None] * ranks_K + shifts_P[:, None]) % self._identity.vocab_size
        logprobs_PK = self._logprobs_of_ranks(exponents_P[:, None], ranks_K[None, :])
        target_ids_P = sequence.target_ids_P.astype(np.int64)
        target_ids_P = np.maximum(target_ids_P, 0)
        return answer(sequence, ids_PK, logprobs_PK, self._logprobs_of_ids(hashes_P, target_ids_P[:, None])[:, 0])

    def _select(self, sequence: TokenSequence, selection: SelectionInfo, hashes_P: NDArray[np.uint64]) -> Distributions:
        """Select by the definition, from whole distributions, a few positions at a time."""
        states_P = position_states(selection.params.get("seed", 0), sequence.key, sequence.positions_P)
        target_ids_P, ids_V = sequence.target_ids_P, np.arange(self._identity.vocab_size)
        size = max(1, DENSE_ELEMENTS // len(ids_V))
        parts = []
        for start in range(0, len(hashes_P), size):
            here = slice(start, start + size)
            dense_PV = self._logprobs_of_ids(hashes_P[here], np.broadcast_to(ids_V, (len(hashes_P[here]), len(ids_V))))
            parts.append(select_reference(dense_PV, target_ids_P[here], selection, states_P[here]))
        return concatenate(parts)

    def _draw(self, hashes_P: NDArray[np.uint64]) -> tuple[NDArray[np.int64], ...]:
        """(P,) each: the exponent's index, a, b, and a's inverse modulo V. Each takes other bits of the hash."""
        choices_P = ((hashes_P >> np.uint64(4)) % np.uint64(len(self._multipliers))).astype(np.int64)
        exponents_P = (hashes_P % np.uint64(len(EXPONENTS))).astype(np.int64)
        shifts_P = ((hashes_P >> np.uint64(16)) % np.uint64(self._identity.vocab_size)).astype(np.int64)
        return exponents_P, self._multipliers[choices_P], shifts_P, self._inverses[choices_P]

    def _logprobs_of_ids(self, hashes_P: NDArray[np.uint64], ids: NDArray[np.integer]) -> NDArray[np.float64]:
        """The logprobs of (P, any) ids."""
        exponents_P, _, shifts_P, inverses_P = self._draw(hashes_P)
        ranks = (inverses_P[:, None] * ((ids - shifts_P[:, None]) % self._identity.vocab_size)) % self._identity.vocab_size
        return self._logprobs_of_ranks(exponents_P[:, None], ranks)

    def _logprobs_of_ranks(self, exponents: NDArray[np.int64], ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        return -EXPONENTS[exponents] * np.log1p(ranks) - self._log_z[exponents]


def prefix_hashes(input_ids_N: NDArray[np.int32], seed: int) -> NDArray[np.uint64]:
    """(N,) uint64: a hash of (seed, tokens 0..t) for each t.

    It is a sum over the prefix of mixed (token, position) pairs, mixed again: one cumulative sum instead of a loop.
    """
    lengths_N = np.arange(1, len(input_ids_N) + 1, dtype=np.uint64)
    pairs_N = mix64(input_ids_N.astype(np.uint64) * np.uint64(GOLDEN) + mix64(lengths_N))
    with np.errstate(over="ignore"):
        return mix64(np.cumsum(pairs_N, dtype=np.uint64) + mix64(np.array([seed & (2**64 - 1)], np.uint64)))


def _units_modulo(vocab_size: int, count: int) -> NDArray[np.int64]:
    """Up to `count` integers spread over [1, vocab_size] that have an inverse modulo vocab_size."""
    step = max(1, vocab_size // count)
    units: list[int] = []
    for start in range(1, vocab_size + 1, step):
        unit = next((a for a in range(start, min(start + step, vocab_size + 1)) if math.gcd(a, vocab_size) == 1), None)
        if unit is not None:
            units.append(unit)
    return np.array(units, np.int64)


NUM_BYTES = 256
BOS_ID = 256
END_ID = 257
SPECIAL_TEXTS = ("<bos>", "<end>", "<system>", "<user>", "<assistant>", "<tool>")
"""The ids from 256 on. A chat is `<bos>`, then for each message its role's token, the content's bytes, `<end>`."""


class FakeTokenizer:
    """A tokenizer of UTF-8 bytes and six special tokens, with a fixed rendering of chats; see SPECIAL_TEXTS."""

    def __init__(self, chat_template: str | None = None) -> None:
        if chat_template is not None:
            raise ConfigError("input.chat_template: the fake tokenizer has a fixed chat rendering; set it to null")
        self._identity = TokenizerIdentity(
            name="fake",
            fingerprint=_sha256(f"fake tokenizer {FAKE_VERSION}: utf-8 bytes, {' '.join(SPECIAL_TEXTS)}"),
            chat_template_fingerprint=_sha256(f"fake chat {FAKE_VERSION}: <bos> (<role> content <end>)*"),
            vocab_size=NUM_BYTES + len(SPECIAL_TEXTS),
        )

    @property
    def identity(self) -> TokenizerIdentity:
        """See `Tokenizer`."""
        return self._identity

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """See `Tokenizer`: BOS is the only special token that is added; a lone surrogate becomes "?"."""
        return [BOS_ID] * add_special_tokens + list(text.encode("utf-8", errors="replace"))

    @property
    def template_variables(self) -> frozenset[str]:
        """See `Tokenizer`."""
        return frozenset({"messages"})

    @property
    def reads_clock(self) -> bool:
        """See `Tokenizer`."""
        return False

    def set_clock(self, moment: datetime) -> None:
        """See `Tokenizer`: it ignores it."""

    def encode_chat(self, chat: Chat | Sequence[Message]) -> ChatTokens:
        """See `Tokenizer`: it writes nothing of a message but its content."""
        chat = check_chat(chat)
        ids, roles, starts, mask, excluded = [BOS_ID], [0], [], [False], [False]
        for index, message in enumerate(chat.messages):
            role = ROLE_CODES[message["role"]]
            content = self.encode(message.get("content", ""), False)
            is_assistant, is_left_out = message["role"] == "assistant", not is_learnt(message, f"message {index}")
            starts.append(len(ids))
            ids += [END_ID + role, *content, END_ID]
            roles += [0, *[role] * len(content), role if is_assistant else 0]
            mask += [False, *[is_assistant and not is_left_out] * (len(content) + 1)]
            excluded += [False, *[is_left_out] * (len(content) + 1)]
        starts[0] = 0
        return ChatTokens(
            np.array(ids, np.int32), np.array(roles, np.uint8), np.array(starts, np.int32), np.array(mask, np.bool_),
            np.array(excluded, np.bool_), chat.unused,
        )  # fmt: skip

    def encode_prompt(self, chat: Chat | Sequence[Message]) -> ChatTokens:
        """See `Tokenizer`: the assistant's header is its role's token."""
        tokens = self.encode_chat(chat)
        return ChatTokens(
            np.append(tokens.input_ids, np.int32(END_ID + ROLE_CODES["assistant"])),
            np.append(tokens.roles, np.uint8(0)),
            np.append(tokens.turn_starts, np.int32(len(tokens.input_ids))),
            np.append(tokens.assistant_mask, False),
            np.append(tokens.excluded, False),
            tokens.notes,
        )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """See `Tokenizer`."""
        return (END_ID,)

    @property
    def underlying(self) -> None:
        """See `Tokenizer`."""
        return None

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`.

        Raises:
            TeacherError: an id that this tokenizer does not have.
        """
        data = bytearray()
        for token_id in ids:
            if not 0 <= token_id < self._identity.vocab_size:
                raise TeacherError(
                    f"{token_id} is not an id of the fake tokenizer, whose vocabulary is {self._identity.vocab_size}"
                )
            data += bytes([token_id]) if token_id < NUM_BYTES else SPECIAL_TEXTS[token_id - NUM_BYTES].encode()
        return data.decode("utf-8", errors="replace")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
