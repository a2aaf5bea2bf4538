"""The config of a loader."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kdcache.config.base import Config, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from kdcache.errors import ConfigError

PackingBuffer = Annotated[int, Meta(ge=1, le=16_384)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Role = Literal["none", "system", "user", "assistant", "tool"]


class MixConfig(Config, frozen=True, kw_only=True):
    """How several caches share an epoch. Each is spread evenly over it, in an order of its own.

    An epoch continues each cache where the epoch before stopped, so over epochs all its sequences come equally often.

    Attributes:
        weights: one number per cache: its share of the epoch's sequences, up to a common factor. Empty: each cache once.
        counts: one number per cache: its sequences in an epoch; instead of weights.
        epoch_ends: with weights: `first_exhausted` ends the epoch once one cache was read completely and no cache more than
            once; `all_exhausted` once each cache was read at least once, and the last of them exactly once.
    """

    weights: tuple[PositiveFloat, ...] = ()
    counts: tuple[Positive, ...] = ()
    epoch_ends: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"

    def __post_init__(self) -> None:
        if self.weights and self.counts:
            raise ConfigError("mix has both weights and counts; give one of them")


class MaskConfig(Config, frozen=True, kw_only=True):
    """Which cached positions are trained on, and with which weight. A position is judged by the token that it predicts.

    A position that the capture left out cannot come back. A sequence's last position predicts no token and has no role: it is
    left out where `roles` or `role_weights` are given.

    Attributes:
        roles: train on the tokens of these roles only, as in [assistant]; null for all. The roles are those in the cache.
        role_weights: weight of a position by the role of its token, as in {user: 0.1}; 1 for roles not named; 0 leaves it out.
        drop_first: leave out this many positions at the start of each sequence or turn.
        drop_first_of: `sequence`: positions 0..drop_first-1; `turn`: the positions that predict a turn's first tokens.
    """

    roles: tuple[Role, ...] | None = None
    role_weights: dict[Role, NonNegativeFloat] = msgspec.field(default_factory=dict)
    drop_first: NonNegative = 0
    drop_first_of: Literal["sequence", "turn"] = "sequence"

    @property
    def is_all(self) -> bool:
        """Whether every cached position is trained on, with weight 1."""
        return self.roles is None and not self.role_weights and not self.drop_first


class LoaderConfig(Config, frozen=True, kw_only=True):
    """How a cache is read: what a batch holds, and in which order. Ranks and world size are arguments of the loader.

    All fields except `num_threads`, `prefetch_batches`, `features`, `with_roles`, `with_domains`, `with_target_logprobs` and
    `logprob_dtype` decide which positions are in each batch: a state saved under other values is refused.

    Attributes:
        seq_len: tokens in a row of a batch. A cache with a longer sequence is refused.
        batch_rows: rows of a GLOBAL batch, over all ranks; the number of ranks must divide it. With `max_batch_tokens`, the
            number of rows is a multiple of it.
        packing: `first_fit` puts several sequences in a row, `none` one in each.
        packing_buffer: sequences, in the epoch's order, that are packed or grouped together. A larger buffer fills rows
            better; a smaller one keeps the stream closer to the order.
        group_by_length: with packing `none`: sequences of one buffer that are about equally long share a batch. The batches of
            a buffer are shuffled.
        pad_to: with packing `none`: `longest` makes the rows of a batch as long as its longest sequence, over all ranks.
        pad_multiple: `longest` is rounded up to a multiple of this, and cut to seq_len.
        max_batch_tokens: with packing `none`: most tokens of a global batch, rows x row length, padding included; the number
            of rows then varies. null for batches of `batch_rows`.
        order: `global` mixes all sequences of a cache, for disks, which read any of them at once; `local` mixes the sequences
            of a few shards at a time, for caches in object stores.
        local_shards: how many shards `local` mixes at a time.
        shuffle: a new order each epoch; otherwise the order of the cache.
        seed: that of the order, in [0, 2**63).
        mix: how several caches share an epoch.
        mask: which positions are trained on.
        features: names of the cache's features (hidden states, attention, ...) that a batch holds, as they are stored; empty
            for none, which costs nothing.
        with_roles: whether a batch holds, for each position, the role of the token that it predicts (`roles_P`), for losses or
            statistics by role.
        with_domains: whether a batch names the domain of each of its sequences, as the input said it (`domains`).
        with_target_logprobs: whether `batch.teacher` holds the teacher's own logprob of each target id, in or out of the
            entries. Each sequence is then decoded twice.
        pairs: with packing `first_fit`: the chosen and the rejected answer to a prompt (`input.group_field`) share a row, next
            to each other, and `batch.pairs` says which they are; both must fit into seq_len. Sequences without a partner are
            read as well.
        logprob_dtype: dtype of the logprobs in a batch. `float16` gives the same values in half the bytes where the caches
            store float16 (codec `packed`, or `archive` of 16 bits, with exact entries), and is refused elsewhere.
        num_threads: threads that read and decode ahead; 0 reads a batch when it is asked for.
        prefetch_batches: most batches that the threads are ahead; each takes the memory of this rank's share of a batch.
    """

    seq_len: Positive = 1024
    batch_rows: Positive = 8
    packing: Literal["first_fit", "none"] = "first_fit"
    packing_buffer: PackingBuffer = 1024
    group_by_length: bool = False
    pad_to: Literal["seq_len", "longest"] = "seq_len"
    pad_multiple: Positive = 8
    max_batch_tokens: Positive | None = None
    order: Literal["global", "local"] = "global"
    local_shards: Positive = 16
    shuffle: bool = True
    seed: Seed = 0
    mix: MixConfig = MixConfig()
    mask: MaskConfig = MaskConfig()
    features: tuple[str, ...] = ()
    with_roles: bool = False
    with_domains: bool = False
    with_target_logprobs: bool = False
    pairs: bool = False
    logprob_dtype: Literal["float32", "float16"] = "float32"
    num_threads: NonNegative = 2
    prefetch_batches: Positive = 4

    def __post_init__(self) -> None:
        unpacked_only = {"group_by_length": self.group_by_length, "max_batch_tokens": self.max_batch_tokens is not None}
        unpacked_only["pad_to longest"] = self.pad_to == "longest"
        asked = [name for name, is_asked in unpacked_only.items() if is_asked]
        if asked and self.packing != "none":
            raise ConfigError(
                f"{asked[0]} needs packing 'none': packed rows are seq_len long, batch_rows of them bound the tokens"
            )
        if self.pairs and self.packing == "none":
            raise ConfigError("pairs needs packing 'first_fit': both answers of a pair share a row")
        if self.max_batch_tokens is not None and self.max_batch_tokens < self.batch_rows * self.seq_len:
            raise ConfigError(
                f"max_batch_tokens is {self.max_batch_tokens}, but {self.batch_rows} rows of {self.seq_len} tokens may be "
                f"needed; raise it to {self.batch_rows * self.seq_len}, or lower batch_rows or seq_len"
            )
