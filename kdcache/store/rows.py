"""Sequence records <-> Arrow record batches: the shared columns, the codec's columns, the row digest.

Shape letters: S sequences of a record batch, N tokens, P supervised positions, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from kdcache.codec.base import Codec, ColumnValues, ids_fit, list_array
from kdcache.codec.features import decode_features, encode_features, feature_fields
from kdcache.codec.into import EntryArrays, Job
from kdcache.errors import CorruptCacheError, FormatError, KdcacheError
from kdcache.format.manifest import FeatureInfo
from kdcache.format.record import FINISHES, ROLES, SequenceRecord, TokenSequence
from kdcache.format.schema import DIGEST, FINISH_FIELD, NULL_LENGTH, SEQUENCE_FIELDS, ShardMetadata, row_digest, shard_metadata
from kdcache.format.selection import fixed_entries

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
    elif any(s.finish for s in sequences):
        raise FormatError("a sequence says how it ended, in a cache whose identity has no generation")
    columns += codec.encode([r.distributions for r in records])
    columns += encode_features([r.distributions.features for r in records], shard_metadata(schema, where="shard").features)
    names = schema.names[: len(columns)]
    views = {name: column_view(column) for name, column in zip(names, columns, strict=True)}
    digests = [row_digest({n: view[i] for n, view in views.items()}, names) for i in range(len(sequences))]
    return pa.RecordBatch.from_arrays([*columns, pa.array(digests, pa.uint64())], schema=schema)


class ColumnView:
    """NumPy views of one Arrow column, sliced per sequence without copying; null gives None."""

    def __init__(self, values: NDArray[Any], offsets_S1: NDArray[np.integer], valid_S: NDArray[np.bool_] | None) -> None:
        self.values, self._valid_S = values, valid_S
        # Plain numbers and a view of bytes: a row is looked at once per epoch, and NumPy's own indexing would take longer than
        # decoding a short one.
        self._offsets = offsets_S1.tolist()
        self._bytes, self._item_bytes = values.view(np.uint8).data, values.dtype.itemsize

    def __getitem__(self, row: int) -> NDArray[Any] | None:
        if self._valid_S is not None and not self._valid_S[row]:
            return None
        return self.values[self._offsets[row] : self._offsets[row + 1]]

    def row_bytes(self, row: int) -> memoryview | None:
        """The bytes of a row's value; None for null."""
        if self._valid_S is not None and not self._valid_S[row]:
            return None
        return self._bytes[self._offsets[row] * self._item_bytes : self._offsets[row + 1] * self._item_bytes]


def column_view(column: pa.Array) -> ColumnView:
    """Views of a validated column, not to be written: lists as typed arrays (bools unpacked to one byte each), strings and
    binary as uint8.

    Raises:
        CorruptCacheError: a null inside a list.
    """
    if column.offset:
        raise ValueError("columns are read as whole record batches")
    valid_S = np.asarray(column.is_valid()) if column.null_count else None
    if pa.types.is_list(column.type):
        offsets_S1 = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1) if len(column) else np.zeros(1, np.int32)
        if column.values.null_count:
            raise CorruptCacheError("a list holds nulls")
        values = column.values.to_numpy(zero_copy_only=not pa.types.is_boolean(column.type.value_type))
        values.flags.writeable = False  # bools are unpacked once for all rows: who wrote there would change what others read
        return ColumnView(values, offsets_S1, valid_S)
    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        values = np.frombuffer(column.buffers()[1] or b"", np.uint8, len(column) * width)
        return ColumnView(values, np.arange(len(column) + 1) * width, valid_S)
    if pa.types.is_integer(column.type):
        return ColumnView(column.to_numpy(), np.arange(len(column) + 1), valid_S)
    offset_type = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    offsets_S1 = np.frombuffer(column.buffers()[1], offset_type, len(column) + 1) if len(column) else np.zeros(1, offset_type)
    data = column.buffers()[2]
    return ColumnView(np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8), offsets_S1, valid_S)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRecord:
    """A row whose bytes are whole, with its entries as the codec wrote them: views of the shard, to be decoded where they go.

    Attributes:
        sequence: decoded and checked.
        offsets_P1: (P+1,) int64, as in Distributions.
        columns: the row's values of the codec's columns and the features'.
        codec: that wrote them.
        where: the place in the cache, for messages.
        features: that the cache keeps beside the entries.
    """

    sequence: TokenSequence
    offsets_P1: NDArray[np.int64]
    columns: ColumnValues
    codec: Codec
    where: str
    features: tuple[FeatureInfo, ...] = ()

    @property
    def num_positions(self) -> int:
        """P."""
        return len(self.offsets_P1) - 1

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

    def job(self, out: EntryArrays, keep_P: NDArray[np.bool_] | None = None) -> Job:
        """To write the kept positions where they belong: `kdcache.codec.into.decode_many_into` does it, for several at once."""
        return Job(self.columns, self.offsets_P1, out, keep_P, self.where)


class BatchReader:
    """One record batch, decoded a row at a time; each row's digest is checked on every read.

    Raises:
        CorruptCacheError: the batch's offsets, lengths or text are not valid Arrow, or there are nulls where none may be.
    """

    def __init__(self, batch: pa.RecordBatch, metadata: ShardMetadata, codec: Codec, where: str) -> None:
        self._metadata, self._codec, self._where = metadata, codec, where
        try:
            batch.validate(full=True)  # offsets in bounds and rising, so that no view below can leave its buffer
            _refuse_nulls(batch)
            self._fixed = fixed_entries(metadata.selection)
            self.views = {name: column_view(batch.column(name)) for name in metadata.digest_columns}
        except (pa.ArrowException, FormatError) as error:
            raise CorruptCacheError(f"{where}: {error}") from error
        self._codec_names = [field.name for field in (*codec.fields(), *feature_fields(metadata.features))]
        self._digests_S = batch.column(DIGEST).to_numpy()
        self.num_rows = batch.num_rows

    def record(self, row: int, *, verify: bool = True) -> SequenceRecord:
        """The record in this row; raises CorruptCacheError where the digest does not match or parts do not fit together."""
        return self.encoded(row, verify=verify).decode()

    def encoded(self, row: int, *, verify: bool = True) -> EncodedRecord:
        """The record in this row, its entries not decoded yet.

        Raises:
            CorruptCacheError: the digest does not match, or the parts do not fit together.
        """
        values: dict[str, Any] = {name: view[row] for name, view in self.views.items()}
        if verify and digest_of([view.row_bytes(row) for view in self.views.values()]) != int(self._digests_S[row]):
            raise CorruptCacheError(
                f"{self._where}, row {row}: the row's digest does not match its bytes; the shard is damaged"
            )
        where = f"{self._where}, row {row}"
        try:
            sequence = _sequence(values, self._metadata.vocab_size)
            num_positions = int(np.count_nonzero(sequence.supervised_N))
            offsets_P1 = _entry_offsets(values["num_entries"], num_positions, self._fixed)
        except KdcacheError as error:
            raise CorruptCacheError(f"{where}: {error}") from error
        return EncodedRecord(
            sequence,
            offsets_P1,
            {name: values[name] for name in self._codec_names},
            self._codec,
            where,
            self._metadata.features,
        )


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


def _sequence(values: dict[str, Any], vocab_size: int) -> TokenSequence:
    input_ids_N, supervised_N, turn_starts = values["input_ids"], values["supervised"], values["turn_starts"]
    num_tokens = len(input_ids_N)
    roles_N = values["roles"] if values["roles"] is not None else np.zeros(num_tokens, np.uint8)
    if num_tokens == 0 or len(supervised_N) != num_tokens or len(roles_N) != num_tokens:
        raise CorruptCacheError("input_ids, supervised and roles have lengths that do not fit together")
    if not ids_fit(input_ids_N, vocab_size):
        raise CorruptCacheError(f"a token id of the text is outside the vocabulary of {vocab_size}")
    if values["roles"] is not None and roles_N.max() >= len(ROLES):
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
