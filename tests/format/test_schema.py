from __future__ import annotations

import json
import struct

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from cache_making import make_identity

from kdcache.codec import get_codec
from kdcache.errors import CorruptCacheError, FormatError, UnsupportedVersionError
from kdcache.format.schema import METADATA_KEY, sequence_digest, shard_metadata, shard_schema


def make_schema() -> pa.Schema:
    identity = make_identity("raw")
    fields = get_codec("raw", {"vocab_size": 97}).fields()
    return shard_schema(fields, unit=7, vocab_size=97, selection=identity.selection, codec=identity.codec)


def with_metadata(**changes) -> pa.Schema:
    schema = make_schema()
    about = json.loads(schema.metadata[METADATA_KEY]) | changes
    return schema.with_metadata({METADATA_KEY: json.dumps(about)})


def test_a_shard_says_what_it_is():
    metadata = shard_metadata(make_schema(), where="s")
    assert (metadata.unit, metadata.vocab_size, metadata.codec.codec_id) == (7, 97, "raw")
    assert metadata.digest_columns == tuple(make_schema().names[:-1])


def test_fields_of_a_newer_minor_version_are_passed_over():
    assert shard_metadata(with_metadata(format_version=[1, 9], novelty=1), where="s").unit == 7


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"format": "other"}, CorruptCacheError, "s: format is 'other', expected 'kdcache'"),
        ({"format_version": [2, 0]}, UnsupportedVersionError, "s: format version .*2, 0.*reads 1.x"),
        ({"digest": "crc32"}, UnsupportedVersionError, "s: .*'crc32'.*'xxh3_64'"),
        ({"unit": "7"}, CorruptCacheError, "s: broken"),
        ({"selection": 1}, CorruptCacheError, "s: broken"),
    ],
)
def test_metadata_of_another_kind_is_refused(changes, kind, sentence):
    with pytest.raises(kind, match=sentence):
        shard_metadata(with_metadata(**changes), where="s")


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"[" * 100_000, b'{"selection":' + b"[" * 900 + b"]" * 900 + b"}"])
def test_metadata_that_is_no_json_is_refused(text):
    with pytest.raises(FormatError, match=r"^s: "):
        shard_metadata(make_schema().with_metadata({METADATA_KEY: text}), where="s")


def test_an_arrow_file_of_others_is_no_shard():
    with pytest.raises(CorruptCacheError, match="no kdcache metadata"):
        shard_metadata(pa.schema([("x", pa.int64())]), where="s")


def test_the_sequence_digest_is_the_one_that_the_spec_describes():
    values = {"a": np.array([1, -2], np.int32), "b": None, "c": np.array([True, False]), "d": np.zeros(0, np.uint8)}
    text = struct.pack("<Qii", 8, 1, -2) + struct.pack("<Q", 2**64 - 1) + struct.pack("<Q??", 2, True, False) + bytes(8)
    assert sequence_digest(values, ["a", "b", "c", "d"]) == xxhash.xxh3_64(text).intdigest()


def test_the_sequence_digest_tells_null_from_empty_and_one_columns_end_from_the_nexts_start():
    def digest(*columns):
        return sequence_digest(dict(enumerate(columns)), range(len(columns)))

    one, two, none = np.array([1], np.uint8), np.array([1, 2], np.uint8), np.zeros(0, np.uint8)
    digests = [digest(None, one), digest(none, one), digest(one, none), digest(two, none), digest(one, np.array([2], np.uint8))]
    assert len(set(digests)) == len(digests)
    assert digest(np.repeat(two, 2)[::2]) == digest(two) == digest(bytes([1, 2]))
