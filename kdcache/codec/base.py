"""What a codec is: Distributions <-> Arrow columns, pure functions of arrays, one codec per file.

Contract (tests/contracts/codec.py runs it for every codec):

- `decode(encode(d))` gives `d` back: ids, offsets and their order exactly; each number within `max_error_nats`. Entries that a
  codec makes equal may be reordered by rising id, as the record requires.
- `encode` is deterministic: equal distributions and parameters give equal bytes. What it is given has passed
  `kdcache.format.record_checks.check_record`, once, at the writer's door: it checks nothing again.
- `decode` of hostile columns raises CorruptCacheError: it never crashes, never allocates more than its arguments imply,
  never returns ids outside the vocabulary.
- The id and the parameters (JSON scalars) are all that a reader needs; both are in the shard's metadata.

A codec derives from `Codec`. Its last four members are optional: the defaults are right for every codec, and a codec that
overrides them loads faster.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError, FormatError, KdcacheError
from kdcache.format.record import Distributions

MAX_LIST_VALUES = 2**31 - 1
MAX_VOCAB_SIZE = 2**31

ColumnValues = Mapping[str, NDArray[Any]]
"""One sequence's values of the codec's columns: list columns as typed arrays, binary columns as uint8 arrays."""


@dataclass(frozen=True, slots=True, eq=False)
class EntryArrays:
    """Where the kept positions of one sequence are decoded to: C-contiguous arrays, which are written completely.

    Attributes:
        token_ids_PK: int32; PADDING_ID after a position's entries.
        logprobs_PK: float32, or float16 where `Codec.stores_half_logprobs`; -inf after a position's entries.
        tail_mass_P: float32.
        num_exact_P, log_z_PL, entropy_P: int64, float32 and float32, as in Distributions; None where not asked for.
    """

    token_ids_PK: NDArray[np.int32]
    logprobs_PK: NDArray[np.floating]
    tail_mass_P: NDArray[np.float32]
    num_exact_P: NDArray[np.int64] | None = None
    log_z_PL: NDArray[np.float32] | None = None
    entropy_P: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EntryFormat:
    """How a compiled loop reads a codec's columns of exact entries, for many sequences without Python in between.

    Attributes:
        stream, logprobs, tail: names of the columns.
        id_bits: width of an id in the bit stream.
        value_bits: width of a logprob's code (see levels.py), or 0 for float16.
        vocab_size: ids are below it.
        masses: float32, the tail masses by the 2^16 bit patterns of a float16 in the tail's column, or by the 2^8 of a byte.
    """

    stream: str
    logprobs: str
    tail: str
    id_bits: int
    value_bits: int
    vocab_size: int
    masses: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class DecodeTask:
    """One of several sequences that are decoded together; see `Codec.decode_into` for the fields.

    Attributes:
        where: file, record batch and sequence, for messages.
    """

    columns: ColumnValues
    offsets_P1: NDArray[np.int64]
    out: EntryArrays
    keep_P: NDArray[np.bool_] | None
    where: str


class Codec(ABC):
    """What every codec does; the module's docstring has the contract."""

    codec_id: ClassVar[str]
    size_follows_content: ClassVar[bool] = False
    """Whether equally many entries take more or fewer bytes by what they are, as after entropy coding."""

    @abstractmethod
    def params(self) -> dict[str, Any]:
        """JSON scalars that, with the id, rebuild this codec."""

    @abstractmethod
    def fields(self) -> list[pa.Field]:
        """The codec's columns, in order."""

    @abstractmethod
    def encode(self, sequences: Sequence[Distributions]) -> list[pa.Array]:
        """One array per field, one value per sequence.

        Raises:
            FormatError: more values than a column's 31-bit offsets can count.
        """

    @abstractmethod
    def decode(self, columns: ColumnValues, offsets_P1: NDArray[np.int64]) -> Distributions:
        """Decode one sequence.

        Args:
            columns: its values, by field name; views of a memory map: not to be written.
            offsets_P1: (P+1,) where each position's entries start, from the record's `num_entries`.

        Raises:
            CorruptCacheError: lengths that do not fit offsets_P1, or ids outside the vocabulary.
        """

    @abstractmethod
    def max_error_nats(self, logprobs: NDArray[np.floating]) -> NDArray[np.float64]:
        """Elementwise bound on |decoded - stored| for logprobs of this size; zeros for an exact codec. It holds for the
        logarithms of tail masses too, when float32's rounding of the mass itself is added."""

    @property
    def stores_half_logprobs(self) -> bool:
        """Whether every logprob that the codec gives is a float16. Optional: False."""
        return False

    def entry_format(self) -> EntryFormat | None:
        """How a compiled loop reads the entries; None where it cannot. Optional: None.

        Columns of `scalars.py` must then be float16.
        """
        return None

    def decode_into(
        self,
        columns: ColumnValues,
        offsets_P1: NDArray[np.int64],
        out: EntryArrays,
        keep_P: NDArray[np.bool_] | None = None,
    ) -> None:
        """Decode the kept positions of one sequence into arrays that exist, such as a batch's. Optional: decode, then copy.

        Args:
            columns, offsets_P1: as for `decode`.
            out: for the positions that are kept.
            keep_P: (P,) bool, which positions these are; None for all.

        Raises:
            CorruptCacheError: as `decode`, or a position with more than K entries. `out` may be half written then.
        """
        copy_into(self.decode(columns, offsets_P1), out, keep_P)

    def decode_many_into(self, tasks: Sequence[DecodeTask]) -> None:
        """`decode_into` for several sequences. Optional: one after another.

        Raises:
            CorruptCacheError: as `decode_into`; the message begins with the sequence's `where`.
        """
        for_each(tasks, lambda task: self.decode_into(task.columns, task.offsets_P1, task.out, task.keep_P))


def for_each(tasks: Sequence[DecodeTask], function: Callable[[DecodeTask], None]) -> None:
    """Call a function with each task; what it raises then says where in the cache."""
    where = ""
    try:
        for task in tasks:
            where = task.where
            function(task)
    except KdcacheError as error:
        raise CorruptCacheError(f"{where}: {error}") from error


def copy_into(d: Distributions, out: EntryArrays, keep_P: NDArray[np.bool_] | None = None) -> None:
    """Copy decoded distributions into `out`: the definition of `Codec.decode_into`.

    Raises:
        CorruptCacheError: a position with more than K entries.
    """
    check_width(d.offsets_P1, out)
    kept = slice(None) if keep_P is None else keep_P
    if keep_P is None and d.num_entries == out.token_ids_PK.size:  # each support has K entries: one straight copy
        out.token_ids_PK[:] = d.token_ids_E.reshape(out.token_ids_PK.shape)
        out.logprobs_PK[:] = d.logprobs_E.reshape(out.logprobs_PK.shape)
    else:
        token_ids_PK, logprobs_PK = d.padded(out.token_ids_PK.shape[1])
        out.token_ids_PK[:], out.logprobs_PK[:] = token_ids_PK[kept], logprobs_PK[kept]
    out.tail_mass_P[:] = d.tail_mass_P[kept]
    copy_scalars_into(d.num_exact_P, d.log_z_PL, d.entropy_P, out, keep_P)


def copy_scalars_into(
    num_exact_P: NDArray[np.int64] | None,
    log_z_PL: NDArray[np.float32] | None,
    entropy_P: NDArray[np.float32] | None,
    out: EntryArrays,
    keep_P: NDArray[np.bool_] | None,
) -> None:
    """Copy what a selection keeps besides the entries, where `out` asks for it."""
    kept = slice(None) if keep_P is None else keep_P
    for target, values in ((out.num_exact_P, num_exact_P), (out.log_z_PL, log_z_PL), (out.entropy_P, entropy_P)):
        if target is not None and values is not None:
            target[:] = values[kept]


def check_width(offsets_P1: NDArray[np.int64], out: EntryArrays) -> None:
    """Raise CorruptCacheError where a position has more entries than `out` has columns."""
    widest, num_columns = int(np.diff(offsets_P1).max(initial=0)), out.token_ids_PK.shape[1]
    if widest > num_columns:
        raise CorruptCacheError(f"a position has {widest} entries, but the cache's selection {num_columns}; expected no more")


def list_array(arrays: Sequence[NDArray[Any]], value_type: pa.DataType) -> pa.Array:
    """An Arrow list column with one list per array.

    Raises:
        FormatError: more values than 31-bit offsets can count.
    """
    num_values = sum(len(a) for a in arrays)
    if num_values > MAX_LIST_VALUES:
        raise FormatError(f"a record batch would hold {num_values} values in one column, at most {MAX_LIST_VALUES} fit")
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    values = np.concatenate([*arrays, np.zeros(0, value_type.to_pandas_dtype())], dtype=value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, value_type))


def binary_array(streams: Sequence[NDArray[np.uint8]]) -> pa.Array:
    """An Arrow column of bytes with one value per stream."""
    offsets = np.zeros(len(streams) + 1, np.int64)
    np.cumsum([len(s) for s in streams], out=offsets[1:])
    data = np.concatenate([*streams, np.zeros(0, np.uint8)])
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(streams), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def checked_column(columns: ColumnValues, name: str, dtype: Any, length: int) -> NDArray[Any]:
    """A column's values, if they are of this type and number.

    Raises:
        CorruptCacheError: they are not.
    """
    values = columns[name]
    if values.dtype != np.dtype(dtype) or len(values) != length:
        raise CorruptCacheError(
            f"column {name!r} holds {len(values)} values of {values.dtype}, expected {length} of {np.dtype(dtype)}"
        )
    return values


def check_vocab_size(vocab_size: Any) -> None:
    """Raise ValueError unless a codec's parameter is a number of ids that int32 can hold."""
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size!r}, expected an integer from 1 to 2^31")
