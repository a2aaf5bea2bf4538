"""All that must be equal for two captures to be the same cache: teacher, tokenizer, selection, codec, generation, features.

Part of a manifest (`kdcache.format.manifest`, which gives these names too). JSON in, JSON out; no numpy, no pyarrow.
"""

from __future__ import annotations

from typing import Any

import msgspec

NOT_COMPARED = frozenset({"tokenizer.name", "teacher.context_length"})
"""Leaves of an identity that may differ: a name for people; how long a sequence may be, which changes none of a shorter one."""


class TeacherIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which model spoke, and through what.

    Attributes:
        model: hub id or the folder's name.
        revision: hub commit, or None for a local folder; of a server, what the config says.
        weights_digest: SHA-256 over the digests of a local folder's files that decide what it computes; None for a hub id or a
            server.
        architecture: the model class's name, as in `LlamaForCausalLM`.
        vocab_size: number of ids a distribution ranges over; may exceed the tokenizer's.
        dtype: of weights and activations, as in `bfloat16`; `unknown` of a server where the config does not say.
        quantization: method, or None.
        engine: `vllm`, `transformers`, `served` or `fake`.
        engine_version: of that package.
        engine_options: settings that move numerics (head dtype, attention backend, rope), as JSON values; and what was decided
            about batches where it is not the plain way: `rotary_factors` per text, `batches` of equal lengths or of one text.
        context_length: most tokens per sequence that this teacher scores.
    """

    model: str
    revision: str | None = None
    weights_digest: str | None = None
    architecture: str
    vocab_size: int
    dtype: str
    quantization: str | None = None
    engine: str
    engine_version: str
    engine_options: dict[str, Any] = {}
    context_length: int


class TokenizerIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which tokenizer made the ids: fingerprints of meaning, not of size.

    Attributes:
        name: hub id or folder name, for people; not compared.
        fingerprint: hash of vocabulary, merges, normaliser, pre-tokeniser and special tokens.
        chat_template_fingerprint: hash of the chat template's text, or "" where none was used.
        vocab_size: number of ids it can give.
    """

    name: str
    fingerprint: str
    chat_template_fingerprint: str = ""
    vocab_size: int


class SelectionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of each distribution; see `kdcache.format.selection` for the kinds.

    Attributes:
        kind: how supports were chosen.
        params: of the kind.
        temperatures: further temperatures T at which the normaliser is stored: log of the sum over the vocabulary of p^(1/T).
        entropy: whether the teacher's own entropy is stored.
        filters: `temperature`, `top_k`, `top_p`, `min_p` of the sampler, where they were applied before the selection: then the
            distributions are those that were drawn from, and not the model's. Empty, as a rule.
    """

    kind: str
    params: dict[str, Any]
    temperatures: tuple[float, ...] = ()
    entropy: bool = False
    filters: dict[str, float] = {}


class GenerationInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How the teacher answered prompts; the fields are those of `kdcache.config.capture.GenerateConfig`. The seed is among the
    identity's."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    n: int
    max_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    long_prompts: str
    last_answer: str


class FeatureInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Hidden states of one layer, kept next to the distributions.

    Attributes:
        name: of the feature, unique in the cache: letters, digits and underscores.
        layer: 0 for what the embeddings give, i for what layer i gives, counted from 1; of the last one after the final norm,
            where the output projection takes it.
        size: H, values per vector.
        dtype: `float16`, or `int8` with a scale per vector.
        pooling: `none`, a vector for each supervised position; `mean` over them, or `last`, the state at the last of them: one
            vector for the sequence, zeros where none is supervised.
    """

    name: str
    layer: int
    size: int
    dtype: str = "float16"
    pooling: str = "none"

    def num_vectors(self, num_positions: int) -> int:
        """How many vectors a sequence with this many supervised positions has."""
        return num_positions if self.pooling == "none" else 1


class CodecInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The codec's id and its parameters, as `get_codec` takes them."""

    codec_id: str
    params: dict[str, Any]


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """All that must be equal for two captures to be the same cache.

    Attributes:
        input_fingerprint: hash of the inputs and of how they are cut into sequences.
        seeds: purpose -> seed of every random draw at capture except the selection's, which is among its parameters.
        generation: how the teacher wrote the ends of the sequences itself; None where it read what was given.
        domains: whether each sequence says of which domain it is.
    """

    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    selection: SelectionInfo
    codec: CodecInfo
    input_fingerprint: str
    seeds: dict[str, int] = {}
    features: tuple[FeatureInfo, ...] = ()
    generation: GenerationInfo | None = None
    domains: bool = False

    def token_pairs(self, other: Identity) -> dict[str, tuple[Any, Any]]:
        """Of both: what must be equal for their token ids to mean the same, by a name for people."""
        return {
            "tokenizer fingerprint": (self.tokenizer.fingerprint, other.tokenizer.fingerprint),
            "tokenizer vocabulary": (self.tokenizer.vocab_size, other.tokenizer.vocab_size),
            "teacher's vocabulary": (self.teacher.vocab_size, other.teacher.vocab_size),
        }

    def differences(self, other: Identity) -> list[str]:
        """`field: mine != theirs` for each leaf that differs, except those of NOT_COMPARED."""
        return [f"{name}: {mine!r} != {theirs!r}" for name, (mine, theirs) in self.differing(other).items()]

    def differing(self, other: Identity) -> dict[str, tuple[Any, Any]]:
        """The leaves that differ, except those of NOT_COMPARED: name, as in `selection.kind` -> mine and theirs."""
        mine, theirs = _leaves(msgspec.to_builtins(self)), _leaves(msgspec.to_builtins(other))
        pairs = {name: (mine.get(name), theirs.get(name)) for name in mine | theirs if name not in NOT_COMPARED}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for name, child in value.items():
        leaves |= _leaves(child, f"{prefix}.{name}" if prefix else name)
    return leaves
