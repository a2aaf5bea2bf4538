from __future__ import annotations

import hashlib
import json
import pickle
import sys
import types

import msgspec
import pytest
from cache_making import make_identity, make_manifest

from kdcache.errors import CorruptCacheError, FormatError, UnsupportedVersionError
from kdcache.format.manifest import (
    FORMAT_VERSION,
    IndexInfo,
    Manifest,
    ShardInfo,
    fingerprint,
    manifest_from_json,
    manifest_to_json,
    shard_from_json,
    shard_to_json,
)


def make_shard(unit: int = 3, **fields) -> ShardInfo:
    sha256 = hashlib.sha256(str(unit).encode()).hexdigest()
    values = {
        "name": f"data/{unit:06d}-{sha256[:16]}.arrow",
        "sha256": sha256,
        "num_bytes": 100,
        "num_sequences": 2,
        "num_tokens": 20,
        "num_positions": 18,
        "num_entries": 90,
        "num_targets": 17,
        "target_logprob_sum": -40.25,
        "tail_mass_sum": 1e-17,
        "entropy_floor_sum": 3.0,
        "entropy_ceiling_sum": 4.0,
        "column_bytes": {"input_ids": 80},
    }
    return ShardInfo(unit=unit, **(values | fields))


def make_full() -> Manifest:
    sha256 = "a" * 64
    index = IndexInfo(name=f"index/{sha256[:16]}.arrow", sha256=sha256)
    return msgspec.structs.replace(
        make_manifest(7), number=2, parent="b" * 64, shards=(make_shard(1), make_shard(4)), index=index
    )


def signed(fields: dict) -> bytes:
    """The fields as a manifest file whose digest is right, as an attacker (or a newer version) would write it."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return json.dumps(fields | {"digest": hashlib.sha256(text.encode()).hexdigest()}).encode()


def fields_of(manifest: Manifest, **changes) -> dict:
    return json.loads(manifest_to_json(manifest)) | changes


def unsigned(manifest: Manifest, **changes) -> dict:
    fields = fields_of(manifest, **changes)
    del fields["digest"]
    return fields


def test_a_manifest_comes_back_from_its_json():
    manifest = make_full()
    again = manifest_from_json(manifest_to_json(manifest), where="m")
    assert again == manifest
    assert again.digest == manifest.digest == json.loads(manifest_to_json(manifest))["digest"]


def test_the_digest_is_the_one_that_the_spec_describes():
    manifest = make_full()
    assert signed(unsigned(manifest)) != b""
    assert json.loads(signed(unsigned(manifest)))["digest"] == manifest.digest


def test_the_digest_changes_with_every_field():
    manifest = make_full()
    changed = [
        msgspec.structs.replace(manifest, number=3),
        msgspec.structs.replace(manifest, parent="c" * 64),
        msgspec.structs.replace(manifest, identity=make_identity("packed")),
        msgspec.structs.replace(manifest, shards=manifest.shards[:1]),
        msgspec.structs.replace(manifest, index=None),
        msgspec.structs.replace(manifest, versions={"kdcache": "9"}),
    ]
    assert len({m.digest for m in [manifest, *changed]}) == len(changed) + 1


def test_every_flipped_bit_is_found_or_changes_nothing():
    data = manifest_to_json(make_full())
    original = manifest_from_json(data, where="m")
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert manifest_from_json(bytes(damaged), where="m") == original, bit  # as in 1e-17 written 1E-17
        except FormatError:
            continue


@pytest.mark.parametrize("length", [0, 1, 2, 100, -100, -2])
def test_a_cut_off_manifest_is_refused(length):
    data = manifest_to_json(make_full())
    with pytest.raises(CorruptCacheError, match=r"^here: "):
        manifest_from_json(data[:length], where="here")


def test_another_major_version_is_refused_with_both_versions():
    with pytest.raises(UnsupportedVersionError, match=r"here: format version 2\.5, this kdcache reads 1\.x"):
        manifest_from_json(signed(unsigned(make_full(), format_version=[2, 5])), where="here")


def test_an_unknown_required_feature_is_refused_by_name():
    with pytest.raises(UnsupportedVersionError, match="here: the cache requires entropy-coding, warp; upgrade"):
        manifest_from_json(signed(unsigned(make_full(), requires=["entropy-coding", "warp"])), where="here")


def test_a_newer_minor_version_is_read_and_keeps_its_own_digest():
    minor = [FORMAT_VERSION[0], FORMAT_VERSION[1] + 1]
    fields = unsigned(make_full(), format_version=minor, novelty={"a": [1, 2]})
    fields["shards"][0]["novelty"] = 1
    data = signed(fields)
    manifest = manifest_from_json(data, where="m")
    assert manifest.shards == make_full().shards
    assert manifest.digest == json.loads(data)["digest"]


HOSTILE = {
    "not an object": b"[1, 2]",
    "not JSON": b"{]",
    "not UTF-8": b'{"format": "\xff"}',
    "deep": b'{"format": "kdcache", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep but closed": b'{"format": "kdcache", "format_version": [1, 0], "x": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a huge integer": b'{"format": "kdcache", "format_version": [1, 0], "number": 1' + b"0" * 5000 + b"}",
    "a huge float": b'{"format": "kdcache", "format_version": [1, 0], "number": 1e999}',
    "no format": b"{}",
    "no version": b'{"format": "kdcache"}',
    "version of text": b'{"format": "kdcache", "format_version": ["1", "0"]}',
    "version of one": b'{"format": "kdcache", "format_version": [1]}',
    "no digest": b'{"format": "kdcache", "format_version": [1, 0]}',
    "a digest of another kind": b'{"format": "kdcache", "format_version": [1, 0], "digest": [1]}',
    "a list key": b'{"format": {}, "format_version": [1, 0]}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_text_that_is_no_manifest_is_refused_with_its_place(name):
    with pytest.raises(CorruptCacheError, match=r"^here: "):
        manifest_from_json(HOSTILE[name], where="here")


def hostile_fields() -> dict[str, dict]:
    def shard(**fields):
        return {"shards": [msgspec.to_builtins(make_shard(1)) | fields]}

    one, four = (msgspec.to_builtins(make_shard(u)) for u in (1, 4))
    return {
        "requires a number": {"requires": 5},
        "requires true": {"requires": True},
        "no identity": {"identity": None},
        "number of text": {"number": "2"},
        "shards of another kind": {"shards": {"a": 1}},
        "a path that climbs": shard(name="../../etc/passwd"),
        "a path from the root": shard(name="/etc/passwd"),
        "a path that climbs within a name": shard(name="data/../../000001-0123456789abcdef.arrow"),
        "a name with a line break": shard(name=one["name"] + "\n"),
        "a name with other digits": shard(name=one["name"].replace("0", "\u0660")),
        "another unit's name": shard(name=four["name"]),
        "another sha256": shard(sha256="0" * 64),
        "a count of text": shard(num_sequences="many"),
        "a sum that is null": shard(target_logprob_sum=None),
        "a unit twice": {"shards": [one, one]},
        "units out of order": {"shards": [four, one]},
        "an index that climbs": {"index": {"name": "../index/0123456789abcdef.arrow", "sha256": "0123456789abcdef" * 4}},
        "another index's name": {"index": {"name": "index/0123456789abcdef.arrow", "sha256": "f" * 64}},
    }


@pytest.mark.parametrize("name", hostile_fields())
def test_a_manifest_with_a_right_digest_and_impossible_fields_is_refused(name):
    with pytest.raises(CorruptCacheError, match=r"^here: "):
        manifest_from_json(signed(unsigned(make_full(), **hostile_fields()[name])), where="here")


def test_a_journal_record_comes_back():
    shard = make_shard(5, num_impossible_targets=2)
    assert shard_from_json(shard_to_json(shard), where="j") == shard


def test_every_flipped_bit_of_a_journal_record_is_found_or_changes_nothing():
    shard = make_shard(5)
    data = shard_to_json(shard)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert shard_from_json(bytes(damaged), where="j") == shard, bit
        except CorruptCacheError:
            continue


def test_a_journal_record_that_names_a_file_elsewhere_is_refused():
    shard = make_shard(5, name="../data/000005-0123456789abcdef.arrow")
    with pytest.raises(CorruptCacheError, match=r"^here: '\.\./data"):
        shard_from_json(shard_to_json(shard), where="here")


def test_two_identities_differ_in_their_leaves_and_not_in_the_tokenizers_name():
    mine = make_identity("raw", k=5)
    theirs = make_identity("packed", k=6, model="other")
    assert mine.differences(theirs) == [
        "teacher.model: 'made-up' != 'other'",
        "selection.params.k: 5 != 6",
        "codec.codec_id: 'raw' != 'packed'",
    ]
    renamed = msgspec.structs.replace(mine, tokenizer=msgspec.structs.replace(mine.tokenizer, name="elsewhere"))
    assert mine.differences(renamed) == []
    seeded = msgspec.structs.replace(mine, seeds={"sampling": 1})
    assert mine.differences(seeded) == ["seeds.sampling: None != 1"]


def test_equal_meaning_has_equal_fingerprints():
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})


def test_a_manifest_is_complete_when_every_unit_has_a_shard():
    manifest = make_full()
    assert not manifest.is_complete
    assert make_manifest(0).is_complete
    assert manifest.total("num_positions") == 36


def test_a_manifest_is_pickled_whole_and_asks_no_module_for_it():
    """pickle looks for the absent fields' mark in all modules that are loaded; some of them fail when they are asked."""

    class Asked(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError(f"asked for {name}")

    manifest = make_manifest(2)
    sys.modules["asked"] = Asked("asked")
    try:
        again = pickle.loads(pickle.dumps(manifest))
    finally:
        del sys.modules["asked"]
    assert again == manifest
    assert again.digest == manifest.digest
