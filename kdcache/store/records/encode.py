"""Encode sequences as an Arrow record batch: the shared columns, the codec's columns and the digest of each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec.base import Codec, list_array
from kdcache.codec.features.columns import ConstantsByName, encode_features
from kdcache.format.record import FINISHES, KEY_BYTES, PREFERENCES, SequenceRecord
from kdcache.format.schema import DOMAIN_FIELD, FINISH_FIELD, GROUP_FIELDS, SEQUENCE_FIELDS, sequence_digest, shard_metadata
from kdcache.store.records.column_view import column_view


def encode_records(
    records: Sequence[SequenceRecord],
    codec: Codec,
    schema: pa.Schema,
    fixed_entries: int | None,
    constants: ConstantsByName | None = None,
) -> pa.RecordBatch:
    """Encode sequences as one record batch.

    Args:
        records: S of them.
        schema: of the shard, see `shard_schema`.
        fixed_entries: entries that every position has by the selection (k of `top_k`), or None.
        constants: of the features that have some.
    """
    sequences = [r.sequence for r in records]
    columns = _sequence_columns(records, fixed_entries)
    if FINISH_FIELD.name in schema.names:
        columns.append(pa.array([FINISHES.index(s.finish) for s in sequences], FINISH_FIELD.type))
    if DOMAIN_FIELD.name in schema.names:
        columns.append(pa.array([s.domain for s in sequences], DOMAIN_FIELD.type))
    group, preference = GROUP_FIELDS
    if group.name in schema.names:
        columns.append(pa.array([s.group or bytes(KEY_BYTES) for s in sequences], group.type))
        columns.append(pa.array([PREFERENCES.index(s.preference) for s in sequences], preference.type))
    columns += codec.encode([r.distributions for r in records])
    features = shard_metadata(schema, where="shard").features
    columns += encode_features([r.distributions.features for r in records], features, constants or {})
    names = schema.names[: len(columns)]
    views = {name: column_view(column) for name, column in zip(names, columns, strict=True)}
    digests = [sequence_digest({n: view[i] for n, view in views.items()}, names) for i in range(len(sequences))]
    return pa.RecordBatch.from_arrays([*columns, pa.array(digests, pa.uint64())], schema=schema)


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
