"""Reading an Arrow record batch of sequences: each is checked against its digest, and decoded when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from kdcache.codec.base import Codec, ColumnValues, DecodeTask, EntryArrays
from kdcache.codec.features.columns import ConstantsByName, decode_features, feature_fields
from kdcache.errors import CorruptCacheError, FormatError, KdcacheError
from kdcache.format.manifest import FeatureInfo
from kdcache.format.record import SequenceRecord, TokenSequence
from kdcache.format.schema import DIGEST, NULL_LENGTH, SEQUENCE_FIELDS, ShardMetadata
from kdcache.format.selection import fixed_entries
from kdcache.store.records.column_view import SequenceValues, column_view
from kdcache.store.records.sequence_checks import all_sound, decode_sequence, entries_fit, entry_offsets, num_positions
from kdcache.store.records.sequence_table import sequence_table

_SMALL_BYTES = 4096
"""A value of fewer bytes is copied next to the others rather than hashed by itself."""


class EncodedRecord:
    """A sequence whose bytes are whole, with its entries as the codec wrote them: views of the shard, not decoded yet.

    Its parts are made when they are asked for: a batch needs few of them, and making all takes as long as decoding.

    Attributes:
        num_tokens: N of its sequence.
        num_positions: P.
    """

    __slots__ = ("_index", "_offsets_P1", "_reader", "_sequence", "num_positions", "num_tokens")

    def __init__(self, reader: BatchReader, index: int) -> None:
        self._reader, self._index = reader, index
        self.num_tokens, self.num_positions = reader.num_tokens[index], reader.num_positions[index]
        self._sequence: TokenSequence | None = None
        self._offsets_P1: NDArray[np.int64] | None = None

    @property
    def sequence(self) -> TokenSequence:
        """The sequence, decoded and checked when it is first asked for."""
        if self._sequence is None:
            self._sequence = self._reader.sequence(self._index)
        return self._sequence

    @property
    def key(self) -> bytes:
        """The key of the sequence."""
        return self._reader.key(self._index)

    @property
    def offsets_P1(self) -> NDArray[np.int64]:
        """(P+1,) int64, as in Distributions; not to be written."""
        if self._offsets_P1 is None:
            self._offsets_P1 = self._reader.entry_offsets(self._index)
        return self._offsets_P1

    @property
    def columns(self) -> ColumnValues:
        """The sequence's values of the codec's columns and of the features'."""
        return SequenceValues(self._reader.views, self._reader.codec_names, self._index)

    @property
    def codec(self) -> Codec:
        """The codec of the entries."""
        return self._reader.codec

    @property
    def where(self) -> str:
        """Shard, record batch and sequence, for messages."""
        return self._reader.where(self._index)

    @property
    def features(self) -> tuple[FeatureInfo, ...]:
        """The features that the cache keeps besides the entries."""
        return self._reader.features

    @property
    def supervised_N(self) -> NDArray[np.bool_]:
        """(N,) the sequence's mask, as it is stored; not to be written."""
        return self._reader.views["supervised"].values_of(self._index)

    @property
    def token_addresses(self) -> tuple[int, int]:
        """Where the sequence's int32 ids and its flags, a byte each, lie in memory; valid as long as this record exists."""
        views = self._reader.views
        return views["input_ids"].address(self._index), views["supervised"].address(self._index)

    def decode(self) -> SequenceRecord:
        """The record; raises CorruptCacheError where the columns do not fit together."""
        try:
            distributions = self.codec.decode(self.columns, self.offsets_P1)
            if self.features:
                constants = self._reader.constants()
                features = decode_features(self.columns, self.features, self.supervised_N, constants)
                distributions = replace(distributions, features=features)
            return SequenceRecord(self.sequence, distributions)
        except KdcacheError as error:
            raise CorruptCacheError(f"{self.where}: {error}") from error

    def decode_task(self, out: EntryArrays, keep_P: NDArray[np.bool_] | None = None) -> DecodeTask:
        """The task of decoding the kept positions into arrays, for `Codec.decode_many_into`."""
        return DecodeTask(self.columns, self.offsets_P1, out, keep_P, self.where)


class BatchReader:
    """One record batch, decoded one sequence at a time; its digest is checked on every read.

    Attributes:
        arrow: the batch itself.
        constants: gives those of the features, for decoding them.

    Raises:
        CorruptCacheError: the batch's offsets, lengths or text are not valid Arrow, or there are nulls where none may be.
    """

    def __init__(
        self,
        batch: pa.RecordBatch,
        metadata: ShardMetadata,
        codec: Codec,
        where: str,
        constants: Callable[[], ConstantsByName] = dict,
    ) -> None:
        self._vocab_size, self.codec, self._where, self.arrow = metadata.vocab_size, codec, where, batch
        self.constants = constants
        self.features: tuple[FeatureInfo, ...] = metadata.features
        try:
            batch.validate(full=True)  # offsets in bounds and rising, so that no view below can leave its buffer
            _refuse_nulls(batch)
            self._fixed = fixed_entries(metadata.selection)
            self.views = {name: column_view(batch.column(name)) for name in metadata.digest_columns}
        except (pa.ArrowException, FormatError) as error:
            raise CorruptCacheError(f"{where}: {error}") from error
        self.codec_names = [field.name for field in (*codec.fields(), *feature_fields(metadata.features))]
        self._digests: list[int] = batch.column(DIGEST).to_numpy().tolist()
        self.num_sequences = batch.num_rows
        self._count()

    def _count(self) -> None:
        num_positions_S = num_positions(self.views["supervised"])
        self.num_positions: list[int] = num_positions_S.tolist()
        self.num_tokens: list[int] = self.views["input_ids"].lengths_S.tolist()
        self._entries_fit_S = entries_fit(self.views, self.codec_names, num_positions_S, (self._fixed, self._vocab_size))
        self._is_sound = bool(self._entries_fit_S.all()) and all_sound(
            self.views, num_positions_S, self._vocab_size, self._fixed
        )
        # One array for all sequences.
        most = max(self.num_positions, default=0) + 1 if self._fixed is not None and self._entries_fit_S.any() else 0
        self._fixed_offsets = np.arange(most, dtype=np.int64) * (self._fixed or 0)
        self._fixed_offsets.flags.writeable = False
        self._tables: list[NDArray[np.void] | None] = []
        self._lines: tuple[int, int] | None = None

    def record(self, index: int, *, verify: bool = True) -> SequenceRecord:
        """Read a sequence; raises CorruptCacheError where its digest does not match or its parts do not fit together."""
        return self.encoded(index, verify=verify).decode()

    def encoded(self, index: int, *, verify: bool = True) -> EncodedRecord:
        """Read a sequence without decoding its entries.

        Raises:
            CorruptCacheError: the digest does not match, or the parts do not fit together.
        """
        if verify and not self.is_whole(index):
            raise CorruptCacheError(f"{self.where(index)}: the digest does not match the bytes; the shard is damaged")
        if not self._is_sound:
            self._check(index)
        return EncodedRecord(self, index)

    def is_whole(self, index: int) -> bool:
        """Whether a sequence's digest matches its bytes."""
        return digest_of([view.value_bytes(index) for view in self.views.values()]) == self._digests[index]

    def line(self, index: int) -> int:
        """The address of a sequence's line in this record batch's `sequence_table`, valid as long as this reader exists.

        0 where the record batch has no such sequence, and for all where one of them is not sound.
        """
        start, num_bytes = self._lines or self._make_lines()
        return start + index * num_bytes if index < self.num_sequences else 0

    def _make_lines(self) -> tuple[int, int]:
        """The first line's address, and the bytes of each."""
        table = None
        if self._is_sound:
            table = sequence_table(self.views, self.num_tokens, self.num_positions, self._digests)
        # Two threads may both come here: the table of each is kept as long as this reader.
        self._tables.append(table)
        self._lines = (0, 0) if table is None else (table.__array_interface__["data"][0], table.strides[0])
        return self._lines

    def most_entries(self, index: int) -> int:
        """The most entries of any position of a sequence, as it claims."""
        num_entries_P = self.views["num_entries"][index]
        if num_entries_P is None:
            return (self._fixed or 0) if self.num_positions[index] else 0
        return int(num_entries_P.max(initial=0))

    @property
    def fixed(self) -> int | None:
        """Entries of every position by the selection; None where their number varies."""
        return self._fixed

    def where(self, index: int) -> str:
        """Shard, record batch and sequence, for messages."""
        return f"{self._where}, sequence {index}"

    def key(self, index: int) -> bytes:
        """The key of a sequence."""
        return bytes(self.views["key"].value_bytes(index) or b"")

    def sequence(self, index: int) -> TokenSequence:
        """Decode a sequence; raises CorruptCacheError where its parts do not fit together."""
        return decode_sequence(SequenceValues(self.views, list(self.views), index), self._vocab_size)

    def entry_offsets(self, index: int) -> NDArray[np.int64]:
        """Where the entries of each position of a sequence start, (P+1,); raises CorruptCacheError as `sequence` does."""
        count, num_entries_P = self.num_positions[index], self.views["num_entries"][index]
        if num_entries_P is None and self._fixed is not None:
            return self._fixed_offsets[: count + 1]
        return entry_offsets(num_entries_P, count, self._fixed)

    def _check(self, index: int) -> None:
        """Raise CorruptCacheError if this sequence is not sound; some sequence of the record batch is not."""
        try:
            self.sequence(index)
            self.entry_offsets(index)
            if not self._entries_fit_S[index]:
                raise CorruptCacheError("claims more entries than its bytes can hold, or than there are ids")
        except KdcacheError as error:
            raise CorruptCacheError(f"{self.where(index)}: {error}") from error


def digest_of(parts: Sequence[memoryview | None]) -> int:
    """`kdcache.format.schema.sequence_digest` of a sequence's values as bytes; small values are joined first."""
    hasher = xxhash.xxh3_64()
    waiting: list[bytes | memoryview] = []
    for part in parts:
        waiting.append((NULL_LENGTH if part is None else len(part)).to_bytes(8, "little"))
        if part is None:
            continue
        if len(part) < _SMALL_BYTES:
            waiting.append(part)
            continue
        hasher.update(b"".join(waiting))
        hasher.update(part)
        waiting = []
    hasher.update(b"".join(waiting))
    return hasher.intdigest()


def _refuse_nulls(batch: pa.RecordBatch) -> None:
    nullable = {field.name for field in SEQUENCE_FIELDS if field.nullable}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.null_count and name not in nullable:
            raise CorruptCacheError(f"column {name!r} holds nulls")
