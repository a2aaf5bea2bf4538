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


class ProjectionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How a feature's vectors were made smaller before they were stored.

    Attributes:
        kind: `pca`: coefficients in a basis that was fitted to a sample and is the sidecar `pca:<feature>`; `random`: products
            with a Gaussian matrix that is a function of the seed and both sizes.
        full_size: numbers per vector before it; the feature's `size` is what is left.
        seed: `random` only.
        dropped: `pca` only, share of the sample's variance that the basis leaves out; None before the fit.
        digest: `pca` only, SHA-256 of the sidecar; None before the fit.
    """

    kind: str
    full_size: int
    seed: int = 0
    dropped: float | None = None
    digest: str | None = None


class FeatureInfo(msgspec.Struct, frozen=True, kw_only=True):
    """States of one layer of the teacher, kept next to the distributions. Without the fields below `pooling` it is what kdcache
    kept before format 1.3: hidden states, at each supervised position, none left out.

    Attributes:
        name: of the feature, unique in the cache: letters, digits and underscores.
        layer: `hidden`: 0 for what the embeddings give, i for the residual stream after layer i, counted from 1, the last one
            BEFORE the final norm; -1 for what the output projection takes, AFTER the final norm. Other kinds: i, inside layer
            i. Before format 1.3 (num_layers is None) the last layer's number means after the final norm.
        size: H, values per vector as stored: after the projection; `attention`: num_heads x top_keys.
        dtype: `float16`, `bfloat16`, or `int8` with a scale per vector.
        pooling: `none`, a vector for each of its positions; `mean` over them, or `last`, the state at the last of them: one
            vector for the sequence, zeros where it has none.
        kind: `hidden`; `queries`, `keys`, `values`: after a norm of theirs, before the rotary embedding, head after head;
            `attention`: the most probable keys of each head.
        positions: `supervised` positions of the sequence, or `all` of its tokens.
        stride: of these only the positions t with t % stride == offset.
        offset: below stride.
        max_positions: at most this many of these, spread evenly; None for all. See `feature_positions`.
        scale: of `int8`: `vector`, a scale for each vector; `channel`: also a mean and a scale for each channel, fitted at the
            start of the capture and kept as the sidecar `scale:<feature>`.
        scale_digest: SHA-256 of that sidecar; None where there is none, and before the fit.
        projection: None where vectors are stored whole.
        num_heads, head_dim: of all kinds but `hidden`: heads, and numbers per head; keys and values have the key-value heads.
        top_keys: `attention` only: keys kept per head.
        num_layers: of the teacher; None in caches from before format 1.3.
    """

    name: str
    layer: int
    size: int
    dtype: str = "float16"
    pooling: str = "none"
    kind: str = "hidden"
    positions: str = "supervised"
    stride: int = 1
    offset: int = 0
    max_positions: int | None = None
    scale: str = "vector"
    scale_digest: str | None = None
    projection: ProjectionInfo | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    top_keys: int | None = None
    num_layers: int | None = None

    @property
    def full_size(self) -> int:
        """Numbers per vector that the teacher gives: before the projection."""
        return self.size if self.projection is None else self.projection.full_size

    @property
    def is_after_norm(self) -> bool | None:
        """Whether the vectors are what the output projection takes; None where an old cache does not tell."""
        if self.layer == -1:
            return True
        return False if self.num_layers is not None or self.layer == 0 else None


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
        groups: whether each sequence says to which group of answers it belongs, and whether it was chosen there.
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
    groups: bool = False

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
        mine, theirs = (_leaves(_with_named_features(msgspec.to_builtins(identity))) for identity in (self, other))
        pairs = {name: (mine.get(name), theirs.get(name)) for name in mine | theirs if name not in NOT_COMPARED}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def unfitted(identity: Identity) -> Identity:
    """The identity without what was fitted to a sample of the input: of two captures that are the same, one's fit counts."""
    return msgspec.structs.replace(identity, features=tuple(map(_unfitted, identity.features)))


def _unfitted(feature: FeatureInfo) -> FeatureInfo:
    projection = feature.projection
    if projection is not None:
        projection = msgspec.structs.replace(projection, dropped=None, digest=None)
    return msgspec.structs.replace(feature, scale_digest=None, projection=projection)


def _with_named_features(identity: dict[str, Any]) -> dict[str, Any]:
    """The features by their names, so that a difference names one; their order apart."""
    features = {feature["name"]: feature for feature in identity["features"]}
    return identity | {"features": {**features, "order": list(features)}}


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for name, child in value.items():
        leaves |= _leaves(child, f"{prefix}.{name}" if prefix else name)
    return leaves
