"""What to make of some caches. Of what is asked for, the order is always the same: see `DeriveOptions`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdcache.derive.choose import Select
from kdcache.derive.reduction.reduce import Reduction
from kdcache.store.writing.writer import DEFAULT_RECORD_BATCH_BYTES


@dataclass(frozen=True, kw_only=True)
class DeriveOptions:
    """The operations, in the order in which they are done; all at their defaults write the sources again, one behind the other.

    Attributes:
        mix: a weight for each source, their sum 1: one cache of the mixture of the sources' teachers, of the sequences that all
            have. None: the sources follow one another, and have to be of one teacher.
        missing: what a mixture does with a sequence that is not in all sources: `error` names it and stops, `skip` leaves
            it out.
        select: sequences by number or key.
        fraction: share of those, in (0, 1], taken at random.
        where: condition on a sequence, see `kdcache.derive.expression`; others are left out.
        where_position: condition on a position; others are left out, and are supervised no more.
        reduce: fewer entries per position.
        seed: of everything random here.
        codec: id of the new cache's; None: the first source's.
        bits: of the codecs `quantized` and `archive`; None for their own choice.
        accept: `incomplete`: use a source whose capture has not finished as it is.
        unit_sequences: sequences of the sources per shard; None: about 256 MiB of them.
        record_batch_bytes: about this many bytes of rows per Arrow record batch.
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
