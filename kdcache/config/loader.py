"""What a loader may be asked for. Frozen, keyword-only, unknown keys refused; imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from kdcache.config.capture import Config, NonNegative, Positive

PackWindow = Annotated[int, Meta(ge=1, le=16_384)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class LoaderConfig(Config, frozen=True, kw_only=True):
    """How a cache is read: what a batch holds and in which order. Ranks and world size are arguments of the loader.

    All fields but `num_threads` and `prefetch_batches` decide what is in each batch; a state saved under others is refused.

    Attributes:
        seq_len: tokens in a row of a batch. A cache with a longer sequence is refused.
        batch_rows: rows in a GLOBAL batch, all ranks together; the number of ranks must divide it.
        packing: `first_fit` puts several sequences in a row, `none` one in each.
        pack_window: sequences, in the epoch's order, that are packed together. More fill the rows better; fewer keep what
            is close in the order close in the stream.
        shuffle: another order each epoch; else the order of the cache.
        seed: of the order, in [0, 2**63).
        num_threads: threads that read and decode ahead; 0 reads when a batch is asked for.
        prefetch_batches: most batches that the threads are ahead; each takes this rank's share of a batch in memory.
    """

    seq_len: Positive = 1024
    batch_rows: Positive = 8
    packing: Literal["first_fit", "none"] = "first_fit"
    pack_window: PackWindow = 1024
    shuffle: bool = True
    seed: Seed = 0
    num_threads: NonNegative = 2
    prefetch_batches: Positive = 4
