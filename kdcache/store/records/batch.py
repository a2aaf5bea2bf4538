"""Sequence records <-> Arrow record batches: the shared columns, the codec's columns, the row digest.

Shape letters: S sequences of a record batch, N tokens, P supervised positions, E entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from kdcache.codec.base import Codec, ColumnValues, DecodeTask, EntryArrays, list_array
from kdcache.codec.features import decode_features, encode_features, feature_fields
from kdcache.errors import CorruptCacheError, FormatError, KdcacheError
from kdcache.format.manifest import FeatureInfo
from kdcache.format.record import FINISHES, ROLES, SequenceRecord, TokenSequence
from kdcache.format.record_checks import ids_fit
from kdcache.format.schema import (
    DIGEST,
    DOMAIN_FIELD,
    FINISH_FIELD,
    NULL_LENGTH,
    SEQUENCE_FIELDS,
    ShardMetadata,
    row_digest,
    shard_metadata,
)
from kdcache.format.selection import fixed_entries
from kdcache.store.records.column_view import RowValues, column_view
from kdcache.store.records.sequence_checks import all_sound, entries_fit, num_positions
from kdcache.store.records.sequence_table import NUM_POSITIONS, NUM_TOKENS, ROW_DIGEST, row_table

_SMALL_BYTES = 4096
"""A value of fewer bytes is copied to the ones beside it rather than hashed by itself."""


def encode_records(
    records: Sequence[SequenceRecord], codec: Codec, schema: pa.Schema, fixed_entries: int | None
) -> pa.RecordBatch:
    """One record batch.

    Args:
        records: S of them.
        schema: of the shard, see `shard_schema`.
        fixed_entries: entries that every position has by the selection (k of `top_k`), or None.
    """
    sequences = [r.sequence for r in records]
    columns = _sequence_columns(records, fixed_entries)
    if FINISH_FIELD.name in schema.names:
        columns.append(pa.array([FINISHES.index(s.finish) for s in sequences], FINISH_FIELD.type))
    if DOMAIN_FIELD.name in schema.names:
        columns.append(pa.array([s.domain for s in sequences], DOMAIN_FIELD.type))
    columns += codec.encode([r.distributions for r in records])
    columns += encode_features([r.distributions.features for r in records], shard_metadata(schema, where="shard").features)
    names = schema.names[: len(columns)]
    views = {name: column_view(column) for name, column in zip(names, columns, strict=True)}
    digests = [row_digest({n: view[i] for n, view in views.items()}, names) for i in range(len(sequences))]
    return pa.RecordBatch.from_arrays([*columns, pa.array(digests, pa.uint64())], schema=schema)


class EncodedRecord:
    """A row whose bytes are whole, with its entries as the codec wrote them: views of the shard, to be decoded where they go.

    Its parts are made when they are asked for: a batch needs few of them, and making all takes as long as decoding.

    Attributes:
        num_tokens: of its sequence.
        num_positions: P.
    """

    __slots__ = ("_offsets_P1", "_reader", "_row", "_sequence", "num_positions", "num_tokens")

    def __init__(self, reader: BatchReader, row: int) -> None:
        self._reader, self._row = reader, row
        self.num_tokens, self.num_positions = reader.num_tokens[row], reader.num_positions[row]
        self._sequence: TokenSequence | None = None
        self._offsets_P1: NDArray[np.int64] | None = None

    @property
    def sequence(self) -> TokenSequence:
        """Decoded and checked."""
        if self._sequence is None:
            self._sequence = self._reader.sequence(self._row)
        return self._sequence

    @property
    def key(self) -> bytes:
        """Of the sequence."""
        return self._reader.key(self._row)

    @property
    def offsets_P1(self) -> NDArray[np.int64]:
        """(P+1,) int64, as in Distributions; not to be written."""
        if self._offsets_P1 is None:
            self._offsets_P1 = self._reader.entry_offsets(self._row)
        return self._offsets_P1

    @property
    def columns(self) -> ColumnValues:
        """The row's values of the codec's columns and the features'."""
        return RowValues(self._reader.views, self._reader.codec_names, self._row)

    @property
    def codec(self) -> Codec:
        """That wrote them."""
        return self._reader.codec

    @property
    def where(self) -> str:
        """The place in the cache, for messages."""
        return self._reader.where(self._row)

    @property
    def features(self) -> tuple[FeatureInfo, ...]:
        """That the cache keeps beside the entries."""
        return self._reader.features

    @property
    def token_addresses(self) -> tuple[int, int]:
        """Where the sequence's int32 ids and its flags, a byte each, lie in memory; as long as this record is there."""
        views = self._reader.views
        return views["input_ids"].address(self._row), views["supervised"].address(self._row)

    def decode(self) -> SequenceRecord:
        """The record; raises CorruptCacheError where the columns do not fit together."""
        try:
            distributions = self.codec.decode(self.columns, self.offsets_P1)
            if self.features:
                features = decode_features(self.columns, self.features, self.num_positions)
                distributions = replace(distributions, features=features)
            return SequenceRecord(self.sequence, distributions)
        except KdcacheError as error:
            raise CorruptCacheError(f"{self.where}: {error}") from error

    def decode_task(self, out: EntryArrays, keep_P: NDArray[np.bool_] | None = None) -> DecodeTask:
        """The task of decoding the kept positions into arrays, for `Codec.decode_many_into`."""
        return DecodeTask(self.columns, self.offsets_P1, out, keep_P, self.where)


class BatchReader:
    """One record batch, decoded a row at a time; each row's digest is checked on every read.

    Attributes:
        arrow: the batch itself.

    Raises:
        CorruptCacheError: the batch's offsets, lengths or text are not valid Arrow, or there are nulls where none may be.
    """

    def __init__(self, batch: pa.RecordBatch, metadata: ShardMetadata, codec: Codec, where: str) -> None:
        self._vocab_size, self.codec, self._where, self.arrow = metadata.vocab_size, codec, where, batch
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
        self.num_rows = batch.num_rows
        self._count()

    def _count(self) -> None:
        num_positions_S = num_positions(self.views["supervised"])
        self.num_positions: list[int] = num_positions_S.tolist()
        self.num_tokens: list[int] = self.views["input_ids"].lengths_S.tolist()
        self._entries_fit_S = entries_fit(self.views, self.codec_names, num_positions_S, (self._fixed, self._vocab_size))
        self._is_sound = bool(self._entries_fit_S.all()) and all_sound(
            self.views, num_positions_S, self._vocab_size, self._fixed
        )
        # One array for all rows.
        most = max(self.num_positions, default=0) + 1 if self._fixed is not None and self._entries_fit_S.any() else 0
        self._fixed_offsets = np.arange(most, dtype=np.int64) * (self._fixed or 0)
        self._fixed_offsets.flags.writeable = False
        self._tables: list[NDArray[np.int64] | None] = []
        self._lines: tuple[int, int] | None = None

    def record(self, row: int, *, verify: bool = True) -> SequenceRecord:
        """The record in this row; raises CorruptCacheError where the digest does not match or parts do not fit together."""
        return self.encoded(row, verify=verify).decode()

    def encoded(self, row: int, *, verify: bool = True) -> EncodedRecord:
        """The record in this row, its entries not decoded yet.

        Raises:
            CorruptCacheError: the digest does not match, or the parts do not fit together.
        """
        if verify and not self.is_whole(row):
            raise CorruptCacheError(
                f"{self._where}, row {row}: the row's digest does not match its bytes; the shard is damaged"
            )
        if not self._is_sound:
            self._check(row)
        return EncodedRecord(self, row)

    def is_whole(self, row: int) -> bool:
        """Whether a row's digest matches its bytes."""
        return digest_of([view.row_bytes(row) for view in self.views.values()]) == self._digests[row]

    def line(self, row: int) -> int:
        """Where a row's line of this record batch's `row_table` lies in memory, as long as this reader is there; 0 where there
        is none, as there is no such row or not all rows are sound."""
        start, num_bytes = self._lines or self._make_lines()
        return start + row * num_bytes if row < self.num_rows else 0

    def _make_lines(self) -> tuple[int, int]:
        """The first one's address, and the bytes of each."""
        numbers = {NUM_TOKENS: self.num_tokens, NUM_POSITIONS: self.num_positions, ROW_DIGEST: self._digests}
        table = row_table(self.views, numbers) if self._is_sound else None
        # Two threads may both come here: the lines of each are kept as long as this reader.
        self._tables.append(table)
        self._lines = (0, 0) if table is None else (table.__array_interface__["data"][0], table.strides[0])
        return self._lines

    def most_entries(self, row: int) -> int:
        """Of any position of a row, as it says."""
        num_entries_P = self.views["num_entries"][row]
        if num_entries_P is None:
            return (self._fixed or 0) if self.num_positions[row] else 0
        return int(num_entries_P.max(initial=0))

    @property
    def fixed(self) -> int | None:
        """Entries of every position by the selection; None where their number varies."""
        return self._fixed

    def where(self, row: int) -> str:
        """The place of a row, for messages."""
        return f"{self._where}, row {row}"

    def key(self, row: int) -> bytes:
        """The key of a row's sequence."""
        return bytes(self.views["key"].row_bytes(row) or b"")

    def sequence(self, row: int) -> TokenSequence:
        """A row's sequence; raises CorruptCacheError where its parts do not fit together."""
        return _sequence(RowValues(self.views, list(self.views), row), self._vocab_size)

    def entry_offsets(self, row: int) -> NDArray[np.int64]:
        """(P+1,) where the entries of each of a row's positions start; raises CorruptCacheError as `sequence` does."""
        count, num_entries_P = self.num_positions[row], self.views["num_entries"][row]
        if num_entries_P is None and self._fixed is not None:
            return self._fixed_offsets[: count + 1]
        return _entry_offsets(num_entries_P, count, self._fixed)

    def _check(self, row: int) -> None:
        """Some row of this record batch is not as it must be: raise CorruptCacheError if this one is."""
        try:
            self.sequence(row)
            self.entry_offsets(row)
            if not self._entries_fit_S[row]:
                raise CorruptCacheError("claims more entries than its bytes can hold, or than there are ids")
        except KdcacheError as error:
            raise CorruptCacheError(f"{self.where(row)}: {error}") from error


def digest_of(parts: Sequence[memoryview | None]) -> int:
    """`kdcache.format.schema.row_digest` of a row's values as bytes, with few calls: small ones are put together first."""
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


def _sequence_columns(records: Sequence[SequenceRecord], fixed: int | None) -> list[pa.Array]:
    sequences = [r.sequence for r in records]
    columns = [
        pa.array([s.key for s in sequences], SEQUENCE_FIELDS[0].type),
        pa.array([s.source for s in sequences], pa.string()),
        list_array([s.input_ids_N for s in sequences], pa.int32()),
        list_array([s.supervised_N for s in sequences], pa.bool_()),
        _nullable_list([s.roles_N if s.roles_N.any() else None for s in sequences], pa.uint8()),
        list_array([s.turn_starts for s in sequences], pa.int32()),
    ]
    counts = [r.distributions.num_entries_P for r in records]
    return [*columns, _nullable_list([None if fixed is not None and (c == fixed).all() else c for c in counts], pa.uint16())]


def _nullable_list(values: Sequence[NDArray[Any] | None], value_type: pa.DataType) -> pa.Array:
    dtype = value_type.to_pandas_dtype()
    lists = list_array([np.zeros(0, dtype) if v is None else v.astype(dtype, copy=False) for v in values], value_type)
    missing = np.array([v is None for v in values], bool)
    if not missing.any():
        return lists
    return pa.ListArray.from_arrays(lists.offsets, lists.values, type=lists.type, mask=pa.array(missing))


def _sequence(values: Mapping[str, Any], vocab_size: int) -> TokenSequence:
    input_ids_N, supervised_N, turn_starts = values["input_ids"], values["supervised"], values["turn_starts"]
    num_tokens, roles = len(input_ids_N), values["roles"]
    roles_N = roles if roles is not None else np.zeros(num_tokens, np.uint8)
    if num_tokens == 0 or len(supervised_N) != num_tokens or len(roles_N) != num_tokens:
        raise CorruptCacheError("input_ids, supervised and roles have lengths that do not fit together")
    if not ids_fit(input_ids_N, vocab_size):
        raise CorruptCacheError(f"a token id of the text is outside the vocabulary of {vocab_size}")
    if roles is not None and roles_N.max() >= len(ROLES):
        raise CorruptCacheError(f"a role has the code {roles_N.max()}, known are 0 to {len(ROLES) - 1}")
    finish = int(values[FINISH_FIELD.name][0]) if FINISH_FIELD.name in values else 0
    if finish >= len(FINISHES):
        raise CorruptCacheError(f"finish has the code {finish}, known are 0 to {len(FINISHES) - 1}")
    if not ids_fit(turn_starts, num_tokens) or (len(turn_starts) > 1 and (np.diff(turn_starts) < 0).any()):
        raise CorruptCacheError("turn_starts fall, or leave the sequence")
    return TokenSequence(
        input_ids_N=input_ids_N,
        supervised_N=supervised_N,
        roles_N=roles_N,
        turn_starts=turn_starts,
        source=values["source"].tobytes().decode(),
        key=values["key"].tobytes(),
        finish=FINISHES[finish],
        domain=values[DOMAIN_FIELD.name].tobytes().decode() if DOMAIN_FIELD.name in values else "",
    )


def _entry_offsets(num_entries_P: NDArray[np.uint16] | None, num_positions: int, fixed: int | None) -> NDArray[np.int64]:
    if num_entries_P is None:
        if fixed is None:
            raise CorruptCacheError("num_entries is null, but the selection does not fix the number of entries")
        return np.arange(num_positions + 1, dtype=np.int64) * fixed
    if len(num_entries_P) != num_positions:
        raise CorruptCacheError(f"num_entries has {len(num_entries_P)} values for {num_positions} supervised positions")
    if fixed is not None and num_entries_P.max(initial=0) > fixed:
        raise CorruptCacheError(f"a position has {num_entries_P.max()} entries, but the selection keeps {fixed}")
    offsets_P1 = np.zeros(num_positions + 1, np.int64)
    np.cumsum(num_entries_P, out=offsets_P1[1:])
    return offsets_P1
