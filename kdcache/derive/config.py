"""What a user may ask of a derivation; the order of the operations is always that of the fields of `DeriveConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdcache.derive.choose import Select
from kdcache.derive.reduction.reduce import Reduction
from kdcache.store.writing.writer import DEFAULT_RECORD_BATCH_BYTES


@dataclass(frozen=True, kw_only=True)
class DeriveConfig:
    """The operations, in the order in which they are done; the defaults write the sources again, one after the other.

    Attributes:
        mix: a weight for each source, their sum 1: one cache of the mixture of the sources' teachers, of the sequences that all
            have. None: the sources are concatenated, and must be of one teacher.
        missing: what a mixture does with a sequence that is not in all sources: `error` names it and stops, `skip` leaves
            it out.
        select: sequences by index or key.
        fraction: share of those, in (0, 1], taken at random.
        where: condition on a sequence, see `kdcache.derive.expression`; others are left out.
        where_position: condition on a position; others are left out, and are no longer supervised.
        reduce: fewer entries per position.
        seed: seed of every random draw of the derivation.
        codec: id of the new cache's; None: the first source's.
        bits: of the codecs `quantized` and `archive`; None for their default.
        accept: `incomplete`: use a source whose capture has not finished as it is.
        unit_sequences: sequences of the sources per shard; None: about 256 MiB of them.
        record_batch_bytes: about this many bytes of sequences per Arrow record batch.
    """

    mix: tuple[float, ...] | None = None
    missing: Literal["error", "skip"] = "error"
    select: Select | None = None
    fraction: float | None = None
    where: str | None = None
    where_position: str | None = None
    reduce: Reduction | None = None
    seed: int = 0
    codec: str | None = None
    bits: int | None = None
    accept: frozenset[Literal["incomplete"]] = frozenset()
    unit_sequences: int | None = None
    record_batch_bytes: int = DEFAULT_RECORD_BATCH_BYTES
