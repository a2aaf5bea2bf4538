from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import strategies
from cache_making import assert_same_record, make_identity, make_record
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.codec import get_codec
from kdcache.errors import CorruptCacheError, FormatError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.schema import SEQUENCE_FIELDS, sequence_digest, shard_metadata, shard_schema
from kdcache.format.selection import fixed_entries
from kdcache.store.records.batch import BatchReader
from kdcache.store.records.column_view import column_view
from kdcache.store.records.encode import encode_records

CODEC = get_codec("raw", {"vocab_size": 97})


def schema_of(k: int = 6, vocab_size: int = 97) -> pa.Schema:
    identity = make_identity("raw", k=k, vocab_size=vocab_size)
    return shard_schema(CODEC.fields(), unit=0, vocab_size=vocab_size, selection=identity.selection, codec=identity.codec)


def encode(records, *, k: int = 6) -> pa.RecordBatch:
    return encode_records(records, CODEC, schema_of(k), k)


def through_a_file(batch: pa.RecordBatch) -> pa.RecordBatch:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_file(sink.getvalue()).get_batch(0)


def reader_of(batch: pa.RecordBatch, **changes) -> BatchReader:
    import msgspec

    metadata = msgspec.structs.replace(shard_metadata(batch.schema, where="s"), **changes)
    return BatchReader(batch, metadata, CODEC, "shard: record batch 0")


@settings(deadline=None, max_examples=60)
@given(records=st.lists(strategies.sequence_records(), max_size=4))
def test_any_records_come_back_from_a_record_batch(records):
    reader = reader_of(through_a_file(encode(records)))
    assert reader.num_sequences == len(records)
    for row, record in enumerate(records):
        assert_same_record(reader.record(row), record)


@pytest.mark.parametrize("k", [0, 5])
def test_counts_and_roles_that_say_nothing_are_null(k):
    records = [make_record(1, k=k), make_record(2, k=k, is_chat=True), make_record(3, k=5, is_ragged=True)]
    batch = encode(records if k else records[:2], k=k)
    assert batch.column("roles").is_null().to_pylist()[:2] == [True, False]
    assert batch.column("num_entries").is_null().to_pylist() == [True, True, False][: len(batch)]


def test_what_is_read_cannot_be_written_into():
    sequence = reader_of(through_a_file(encode([make_record(1)]))).record(0).sequence
    for values in (sequence.input_ids_N, sequence.supervised_N, sequence.turn_starts):
        assert not values.flags.writeable


@pytest.mark.parametrize("value_type", [pa.int32(), pa.bool_(), pa.float16()])
def test_lists_whose_first_offset_is_not_zero_are_read_right(value_type):
    values = pa.array(np.arange(10) % 2).cast(pa.float32()).cast(value_type)
    view = column_view(pa.ListArray.from_arrays(pa.array([3, 3, 8, 10], pa.int32()), values))
    assert [view[row].tolist() for row in range(3)] == [[], [1, 0, 1, 0, 1], [0, 1]]


def test_binary_whose_first_offset_is_not_zero_is_read_right():
    offsets = pa.py_buffer(np.array([2, 2, 5], np.int64))
    view = column_view(pa.LargeBinaryArray.from_buffers(pa.large_binary(), 2, [None, offsets, pa.py_buffer(b"abcdef")]))
    assert [view[row].tobytes() for row in range(2)] == [b"", b"cde"]


def test_a_slice_of_a_record_batch_is_not_mistaken_for_a_whole_one():
    with pytest.raises(ValueError, match="whole record batches"):
        column_view(pa.array([[1], [2]], pa.list_(pa.int32())).slice(1))


def signed(batch: pa.RecordBatch, **columns: pa.Array) -> pa.RecordBatch:
    """The batch with other columns, and digests that are right: what an attacker would write."""
    names = batch.schema.names
    arrays = [columns.get(name, batch.column(name)) for name in names[:-1]]
    views = {name: column_view(array) for name, array in zip(names, arrays, strict=False)}
    digests = [sequence_digest({n: v[row] for n, v in views.items()}, names[:-1]) for row in range(len(batch))]
    fields = [field.with_type(array.type) for field, array in zip(batch.schema, arrays, strict=False)]
    schema = pa.schema([*fields, batch.schema.field("digest")], metadata=batch.schema.metadata)
    return pa.RecordBatch.from_arrays([*arrays, pa.array(digests, pa.uint64())], schema=schema)


def lists(values, value_type) -> pa.Array:
    return pa.array([values], pa.list_(value_type))


HOSTILE = {
    "an id of the text beyond the vocabulary": ({"input_ids": lists([97, 1, 2], pa.int32())}, "vocabulary of 97"),
    "a negative id of the text": ({"input_ids": lists([1, -1, 2], pa.int32())}, "vocabulary of 97"),
    "no tokens": ({"input_ids": lists([], pa.int32())}, "lengths"),
    "a flag too few": ({"supervised": lists([True, True], pa.bool_())}, "lengths"),
    "a flag too many": ({"supervised": lists([True, False, False, True], pa.bool_())}, "lengths"),
    "another mask": ({"supervised": lists([True, True, True], pa.bool_())}, "column 'token_ids' holds"),
    "roles of another length": ({"roles": lists([1], pa.uint8())}, "lengths"),
    "an unknown role": ({"roles": lists([1, 200, 1], pa.uint8())}, "code 200"),
    "a turn behind the end": ({"turn_starts": lists([0, 3], pa.int32())}, "turn_starts"),
    "a turn in front": ({"turn_starts": lists([-1], pa.int32())}, "turn_starts"),
    "turns that fall": ({"turn_starts": lists([2, 0], pa.int32())}, "turn_starts"),
    "counts for other positions": ({"num_entries": lists([6], pa.uint16())}, "num_entries has 1 values for 2"),
    "counts that claim more": ({"num_entries": lists([6, 5], pa.uint16())}, "column 'token_ids' holds"),
    "counts beyond the selection": ({"num_entries": lists([65535, 65535], pa.uint16())}, "65535 entries.*keeps 6"),
    "an id of a support beyond the vocabulary": ({"token_ids": lists([1] * 11 + [97], pa.int32())}, "vocabulary of 97"),
    "null counts where they are needed": ({"token_ids": lists([1] * 11, pa.int32())}, "column 'token_ids' holds 11"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_row_with_a_right_digest_and_impossible_values_is_refused_with_its_place(name):
    columns, sentence = HOSTILE[name]
    batch = signed(encode([make_record(1, num_tokens=3, k=6)]), **columns)
    with pytest.raises(CorruptCacheError, match=f"^shard: record batch 0, sequence 0: .*{sentence}"):
        reader_of(batch).record(0)


SHARED = [name for name, (columns, sentence) in HOSTILE.items() if "token_ids" not in columns and "token_ids" not in sentence]


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_impossible_row_is_refused_before_its_entries_are_decoded_and_the_others_are_read(name, place):
    columns, sentence = HOSTILE[name]
    rows = [encode([make_record(seed, num_tokens=4 + seed, k=6)]) for seed in range(2)]
    rows.insert(place, signed(encode([make_record(1, num_tokens=3, k=6)]), **columns))
    reader = reader_of(pa.Table.from_batches(rows).combine_chunks().to_batches()[0])
    with pytest.raises(CorruptCacheError, match=f"^shard: record batch 0, sequence {place}: .*{sentence}"):
        reader.encoded(place)
    others = [reader.encoded(row).decode() for row in range(3) if row != place]
    assert [record.sequence.num_tokens for record in others] == [4, 5]


@pytest.mark.parametrize("name", [field.name for field in SEQUENCE_FIELDS if not field.nullable] + ["token_ids", "digest"])
def test_a_null_where_none_may_be_is_refused(name):
    batch = encode([make_record(1), make_record(2)])
    number = batch.schema.get_field_index(name)
    column = pa.array([batch.column(number)[0].as_py(), None], batch.schema.field(number).type)
    schema = batch.schema.set(number, batch.schema.field(number).with_nullable(True))
    columns = [column if i == number else batch.column(i) for i in range(batch.num_columns)]
    with pytest.raises(CorruptCacheError, match=f"column '{name}' holds nulls"):
        reader_of(pa.RecordBatch.from_arrays(columns, schema=schema))


@pytest.mark.parametrize(
    ("name", "values"), [("input_ids", lists([1, None, 1], pa.int32())), ("supervised", lists([True, None, True], pa.bool_()))]
)
def test_a_null_inside_a_list_is_refused(name, values):
    batch = encode([make_record(1, num_tokens=3)])
    number = batch.schema.get_field_index(name)
    columns = [values if i == number else batch.column(i) for i in range(batch.num_columns)]
    with pytest.raises(CorruptCacheError, match="a list holds nulls"):
        reader_of(pa.RecordBatch.from_arrays(columns, schema=batch.schema))


@pytest.mark.parametrize("k", [-1, 2**31 + 1, 2**62, 2**70, 1.5, "5", None, True])
def test_a_number_of_entries_that_is_none_is_refused_before_it_is_multiplied(k):
    with pytest.raises(FormatError, match="k = "):
        fixed_entries(SelectionInfo(kind="top_k", params={"k": k}))
    batch = encode([make_record(1)])
    with pytest.raises(CorruptCacheError, match=r"^shard: .*k = "):
        reader_of(batch, selection=SelectionInfo(kind="top_k", params={"k": k}))


def test_the_largest_number_of_entries_does_not_overflow():
    batch = signed(encode([make_record(1, k=6)]))
    reader = reader_of(batch, selection=SelectionInfo(kind="top_k", params={"k": 2**31}))
    with pytest.raises(CorruptCacheError, match="claims more entries than its bytes can hold"):
        reader.record(0)


def test_a_selection_that_fixes_nothing_needs_counts():
    batch = encode([make_record(1, k=6)])
    with pytest.raises(CorruptCacheError, match="num_entries is null"):
        reader_of(batch, selection=SelectionInfo(kind="top_p_k", params={"k": 6, "p": 0.9})).record(0)


def test_a_wrong_digest_is_refused_unless_the_caller_asked_not_to_look():
    batch = encode([make_record(1)])
    columns = [*batch.columns[:-1], pa.array([7], pa.uint64())]
    reader = reader_of(pa.RecordBatch.from_arrays(columns, schema=batch.schema))
    with pytest.raises(CorruptCacheError, match=r"^shard: record batch 0, sequence 0: the digest does not match"):
        reader.record(0)
    assert_same_record(reader.record(0, verify=False), make_record(1))
