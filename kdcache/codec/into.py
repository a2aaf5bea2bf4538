"""Decoding straight into arrays that are there already, as a loader's batch is: an optional ability of a codec.

A codec that has it has a method `decode_into` with the arguments and the meaning of the function here, which serves all codecs:
`place` defines the result, and tests compare.

Shape letters: P positions, Q positions that are kept, K entries per position (padded), T further temperatures, E entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.base import Codec, ColumnValues
from kdcache.errors import CorruptCacheError, KdcacheError
from kdcache.format.record import Distributions


@dataclass(frozen=True, slots=True, eq=False)
class EntryArrays:
    """Where one sequence's positions go; C-contiguous, to be written whole.

    Attributes:
        token_ids_QK: (Q, K) int32; PADDING_ID behind a position's entries.
        logprobs_QK: (Q, K) float32; -inf there. float16 where `stores_half_logprobs` says that they are that, and then exact.
        tail_mass_Q: (Q,) float32.
        num_exact_Q, log_z_QT, entropy_Q: (Q,) int64, (Q, T) float32 and (Q,) float32, as in Distributions; None where not
            asked for.
    """

    token_ids_QK: NDArray[np.int32]
    logprobs_QK: NDArray[np.floating]
    tail_mass_Q: NDArray[np.float32]
    num_exact_Q: NDArray[np.int64] | None = None
    log_z_QT: NDArray[np.float32] | None = None
    entropy_Q: NDArray[np.float32] | None = None


def stores_half_logprobs(codec: Codec) -> bool:
    """Whether every logprob that the codec gives is a float16: a property of that name, which most codecs lack."""
    return bool(getattr(codec, "stores_half_logprobs", False))


@dataclass(frozen=True, slots=True, eq=False)
class EntryFormat:
    """How a codec's columns of exact entries are to be read, for a compiled loop that reads many rows without Python between:
    see `entry_format`.

    Attributes:
        stream, logprobs, tail: names of the columns.
        id_bits: of an id in the bit stream.
        value_bits: of a logprob's code (see levels.py), or 0 for float16.
        vocab_size: ids are below it.
        masses: (2^16,) float32 by the bits of a float16 in the tail's column, or (2^8,) by a byte in it.
    """

    stream: str
    logprobs: str
    tail: str
    id_bits: int
    value_bits: int
    vocab_size: int
    masses: NDArray[np.float32]


def entry_format(codec: Codec) -> EntryFormat | None:
    """What the codec's method of this name gives; None where it has none, or where it gives none for its selection. Further
    columns, of `scalars.py`, must be float16."""
    method: Callable[[], EntryFormat | None] | None = getattr(codec, "entry_format", None)
    return None if method is None else method()


class DecodesInto(Protocol):
    """A codec that does not need arrays in between."""

    def decode_into(
        self, columns: ColumnValues, offsets_P1: NDArray[np.int64], out: EntryArrays, keep_P: NDArray[np.bool_] | None
    ) -> None:
        """See the function of this name."""
        ...


def decode_into(
    codec: Codec,
    columns: ColumnValues,
    offsets_P1: NDArray[np.int64],
    out: EntryArrays,
    keep_P: NDArray[np.bool_] | None = None,
) -> None:
    """Decode the kept positions of one sequence into `out`.

    Args:
        codec: that the columns are of.
        columns, offsets_P1: as for `Codec.decode`.
        out: for the Q positions that are kept.
        keep_P: (P,) bool, which these are; None for all.

    Raises:
        CorruptCacheError: as `Codec.decode`, or a position with more than K entries. `out` may be half written then.
    """
    # Not isinstance: asking whether an object fits a protocol takes longer than decoding a short sequence.
    direct: DecodesInto | None = getattr(codec, "decode_into", None) and cast("DecodesInto", codec)
    if direct is None:
        place(codec.decode(columns, offsets_P1), out, keep_P)
    else:
        direct.decode_into(columns, offsets_P1, out, keep_P)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One sequence of several that are decoded together; see `decode_into` for the fields.

    Attributes:
        where: the place in the cache, for messages.
    """

    columns: ColumnValues
    offsets_P1: NDArray[np.int64]
    out: EntryArrays
    keep_P: NDArray[np.bool_] | None
    where: str


def decode_many_into(codec: Codec, jobs: Sequence[Job]) -> None:
    """`decode_into` for each job. A codec that has a method `decode_many_into` may take them together.

    Raises:
        CorruptCacheError: as `decode_into`; names the place of the first one.
    """
    together: Callable[[Sequence[Job]], None] | None = getattr(codec, "decode_many_into", None)
    if together is not None:
        together(jobs)
        return
    for_each(jobs, lambda job: decode_into(codec, job.columns, job.offsets_P1, job.out, job.keep_P))


def for_each(jobs: Sequence[Job], function: Callable[[Job], None]) -> None:
    """Call a function with each job; what it raises then says where in the cache."""
    where = ""
    try:
        for job in jobs:
            where = job.where
            function(job)
    except KdcacheError as error:
        raise CorruptCacheError(f"{where}: {error}") from error


def place(d: Distributions, out: EntryArrays, keep_P: NDArray[np.bool_] | None = None) -> None:
    """Write decoded distributions into `out`: the definition of `decode_into`.

    Raises:
        CorruptCacheError: a position with more than K entries.
    """
    check_width(d.offsets_P1, out)
    kept = slice(None) if keep_P is None else keep_P
    if keep_P is None and d.num_entries == out.token_ids_QK.size:  # each support has K entries: one straight copy
        out.token_ids_QK[:] = d.token_ids_E.reshape(out.token_ids_QK.shape)
        out.logprobs_QK[:] = d.logprobs_E.reshape(out.logprobs_QK.shape)
    else:
        token_ids_PK, logprobs_PK = d.padded(out.token_ids_QK.shape[1])
        out.token_ids_QK[:], out.logprobs_QK[:] = token_ids_PK[kept], logprobs_PK[kept]
    out.tail_mass_Q[:] = d.tail_mass_P[kept]
    place_scalars(d.num_exact_P, d.log_z_PT, d.entropy_P, out, keep_P)


def place_scalars(
    num_exact_P: NDArray[np.int64] | None,
    log_z_PT: NDArray[np.float32] | None,
    entropy_P: NDArray[np.float32] | None,
    out: EntryArrays,
    keep_P: NDArray[np.bool_] | None,
) -> None:
    """Write what a selection keeps beside the entries, where `out` asks for it."""
    kept = slice(None) if keep_P is None else keep_P
    for target, values in ((out.num_exact_Q, num_exact_P), (out.log_z_QT, log_z_PT), (out.entropy_Q, entropy_P)):
        if target is not None and values is not None:
            target[:] = values[kept]


def check_width(offsets_P1: NDArray[np.int64], out: EntryArrays) -> None:
    """Raise CorruptCacheError where a position has more entries than `out` has columns."""
    widest, num_columns = int(np.diff(offsets_P1).max(initial=0)), out.token_ids_QK.shape[1]
    if widest > num_columns:
        raise CorruptCacheError(f"a position has {widest} entries, but the cache's selection {num_columns}; expected no more")
