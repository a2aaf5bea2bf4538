"""How an answer that the teacher wrote itself ended: kept, counted, covered by the digest, absent where nothing was written."""

from dataclasses import replace

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from cache_making import assert_same_record, make_identity, make_manifest, make_unit

import kdcache
from kdcache.codec import get_codec
from kdcache.errors import CorruptCacheError, FormatError
from kdcache.format.manifest import GenerationInfo
from kdcache.format.record import FINISHES
from kdcache.format.schema import FINISH_FIELD, SEQUENCE_FIELDS, sequence_digest, shard_metadata, shard_schema
from kdcache.store.records.batch import BatchReader
from kdcache.store.records.column_view import column_view
from kdcache.store.records.encode import encode_records
from kdcache.store.verify import verify_cache
from kdcache.store.writing.writer import CacheWriter

GENERATION = GenerationInfo(
    temperature=0.7, top_p=0.9, top_k=0, min_p=0.0, n=2, max_tokens=16, stop=("\n",), stop_token_ids=(), ignore_eos=False,
    long_prompts="error", last_answer="error",
)  # fmt: skip
CODEC = get_codec("raw", {"vocab_size": 97})


def with_finish(record, finish):
    return replace(record, sequence=replace(record.sequence, finish=finish))


def write(path, generation, finishes):
    manifest = make_manifest(1, msgspec.structs.replace(make_identity(), generation=generation))
    records = [with_finish(r, f) for r, f in zip(make_unit(0, num_sequences=len(finishes)), finishes, strict=True)]
    writer = CacheWriter.open(path, manifest)
    writer.write_unit(0, records)
    writer.fold()
    return records


def test_how_answers_ended_comes_back_and_is_counted_and_verified(tmp_path):
    records = write(tmp_path / "cache", GENERATION, ["stop", "length", "stop", "stop"])
    with kdcache.open(tmp_path / "cache") as reader:
        assert [reader[n].sequence.finish for n in range(len(reader))] == ["stop", "length", "stop", "stop"]
        for n, record in enumerate(records):
            assert_same_record(reader[n], record)
        (shard,) = reader.manifest.shards
        assert shard.num_finished == {"length": 1, "stop": 3}
        assert reader.manifest.identity.generation == GENERATION
    assert verify_cache(tmp_path / "cache").problems == []


def test_a_cache_of_given_text_has_no_such_column(tmp_path):
    write(tmp_path / "cache", None, ["", ""])
    (path,) = (tmp_path / "cache" / "data").iterdir()
    assert "finish" not in pa.ipc.open_file(path).schema.names
    with kdcache.open(tmp_path / "cache") as reader:
        assert reader[0].sequence.finish == ""
        assert reader.manifest.shards[0].num_finished is msgspec.UNSET


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(FormatError, match="identity has no generation"):
        write(tmp_path / "a", None, ["stop"])
    with pytest.raises(FormatError, match="ended by 'bored', known are stop, length"):
        write(tmp_path / "b", GENERATION, ["bored"])


def batch_of(finishes):
    identity = make_identity()
    schema = shard_schema(
        CODEC.fields(), unit=0, vocab_size=97, selection=identity.selection, codec=identity.codec, optional=[FINISH_FIELD]
    )
    records = [with_finish(r, f) for r, f in zip(make_unit(0, num_sequences=len(finishes)), finishes, strict=True)]
    return encode_records(records, CODEC, schema, 5)


def changed(batch, codes, *, is_signed):
    """The batch with other codes, and, as an attacker would, with the digests that belong to them."""
    names = batch.schema.names
    arrays = [pa.array(codes, pa.uint8()) if name == "finish" else batch.column(name) for name in names]
    if is_signed:
        views = {name: column_view(array) for name, array in zip(names[:-1], arrays, strict=False)}
        digests = [sequence_digest({n: view[row] for n, view in views.items()}, names[:-1]) for row in range(len(batch))]
        arrays[-1] = pa.array(digests, pa.uint64())
    return pa.RecordBatch.from_arrays(arrays, schema=batch.schema)


@pytest.mark.parametrize(
    ("codes", "is_signed", "sentence"), [([1, 2], False, "digest does not match"), ([1, 3], True, "finish has the code 3")]
)
def test_a_flipped_code_and_an_unknown_one_are_refused(codes, is_signed, sentence):
    batch = batch_of(["stop", "stop"])
    assert np.array_equal(batch.column("finish"), [FINISHES.index("stop")] * 2)
    batch = changed(batch, codes, is_signed=is_signed)
    reader = BatchReader(batch, shard_metadata(batch.schema, where="s"), CODEC, "shard: record batch 0")
    assert reader.record(0).sequence.finish == "stop"
    with pytest.raises(CorruptCacheError, match=sentence):
        reader.record(1)


def test_a_shard_that_says_it_where_the_manifest_does_not_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "cache", GENERATION, ["stop"])
    with kdcache.open(tmp_path / "cache").reader as reader:
        identity = msgspec.structs.replace(reader.manifest.identity, generation=None)
        reader.manifest = msgspec.structs.replace(reader.manifest, identity=identity)
        with pytest.raises(CorruptCacheError, match="says how answers ended, the manifest says otherwise"):
            reader[0]


def test_the_column_follows_those_that_every_shard_has():
    names = batch_of(["stop"]).schema.names
    assert names[: len(SEQUENCE_FIELDS) + 1] == [*(field.name for field in SEQUENCE_FIELDS), "finish"]
