"""What a manifest, a journal record and a shard's metadata may claim: refused when parsed, with the name and the value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from format.test_manifest import make_full, make_shard, unsigned

from kdcache.errors import CorruptCacheError, FormatError, UnsupportedVersionError
from kdcache.format.manifest import CodecInfo, FeatureInfo, SelectionInfo, manifest_from_json, shard_from_json, shard_to_json
from kdcache.format.manifest_checks import MAX_JSON_DEPTH
from kdcache.format.schema import shard_metadata, shard_schema

Change = Callable[[dict[str, Any]], object]
COST = {"wall_seconds": 1.0, "cpu_seconds": 1.0}
FEATURE = {"name": "last", "layer": 1, "size": 4}


def signed(fields: dict[str, Any]) -> bytes:
    """The fields with a right digest; floats in the format's own form, which is not that of `json`."""
    digest = hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()
    return msgspec.json.encode(fields | {"digest": digest})


def shard(**values: Any) -> Change:
    return lambda fields: fields["shards"][0].update(values)


def both(**values: Any) -> Change:
    return lambda fields: [entry.update(values) for entry in fields["shards"]]


def identity(part: str, **values: Any) -> Change:
    return lambda fields: fields["identity"][part].update(values)


def features(*changes: dict[str, Any]) -> Change:
    return lambda fields: fields["identity"].update(features=[FEATURE | change for change in changes])


def nested(depth: int) -> Any:
    return {"x": nested(depth - 1)} if depth else {}


REFUSED: dict[str, tuple[Change, str]] = {
    "a negative number": (shard(num_sequences=-(10**12)), r"num_sequences is -1000000000000, expected 0 to"),
    "numbers that add up beyond 63 bits": (both(num_tokens=2**62), r"the sum of num_tokens is 9223372036854775808"),
    "a count beyond 63 bits": (shard(num_entries=2**63), r"num_entries is 9223372036854775808"),
    "more exact entries than entries": (shard(num_exact_entries=91), r"num_exact_entries is 91, expected 0 to 90"),
    "bytes of a column below 0": (shard(column_bytes={"input_ids": -1}), r"column_bytes of 'input_ids' is -1"),
    "more answers than sequences": (shard(num_finished={"stop": 2, "length": 1}), r"the sum of num_finished is 3"),
    "answers below 0": (shard(num_finished={"stop": -1}), r"num_finished by 'stop' is -1"),
    "sums that leave float64": (both(tail_mass_sum=1.7e308), r"the sum of tail_mass_sum is inf"),
    "sums of NLL that leave float64": (both(target_logprob_sum=-1.7e308), r"the sum of target_logprob_sum is -inf"),
    "time that leaves float64": (both(account=COST | {"wall_seconds": 1.7e308}), r"the sum of wall_seconds is inf"),
    "energy that leaves float64": (both(account=COST | {"energy_joules": 1.7e308}), r"the sum of energy_joules is inf"),
    "time below 0": (shard(account=COST | {"cpu_seconds": -1.0}), r"cpu_seconds is -1.0"),
    "a unit beyond the plan": (lambda f: f["plan"].update(num_units=4), r"of unit 4, the plan has 4"),
    "a plan below 0": (lambda f: f["plan"].update(num_units=-1), r"plan.num_units is -1"),
    "no vocabulary": (identity("teacher", vocab_size=0), r"the teacher's vocab_size is 0, expected 1 to"),
    "ids beyond int32": (identity("teacher", vocab_size=2**31 + 1), r"the teacher's vocab_size is 2147483649"),
    "a tokenizer below 0": (identity("tokenizer", vocab_size=-5), r"the tokenizer's vocab_size is -5"),
    "a seed beyond int64": (lambda f: f["identity"].update(seeds={"generate": 2**63}), r"the seed of 'generate'"),
    "draws that are an object": (
        identity("selection", kind="sampled", params={"num_draws": {"k": 5}, "seed": 0}), r"num_draws = \{'k': 5\}",
    ),
    "draws that are text": (identity("selection", kind="sampled", params={"num_draws": "x", "seed": 0}), r"num_draws = 'x'"),
    "draws that are missing": (identity("selection", kind="sampled", params={"seed": 0}), r"expected \['num_draws', 'seed'\]"),
    "a temperature of 0": (identity("selection", temperatures=[0.0]), r"temperature 0.0"),
    "a feature named twice": (features({}, {}), r"name 'last', expected one of letters"),
    "a feature named as a path": (features({"name": "../x"}), r"name '\.\./x'"),
    "a feature of no numbers": (features({"size": 0}), r"size of feature 'last' is 0"),
    "a feature of too many numbers": (features({"size": 2**40}), r"size of feature 'last' is 1099511627776"),
    "a feature below the first layer": (features({"layer": -2}), r"layer of feature 'last' is -2"),
    "deep JSON for people": (lambda f: f.update(config=nested(MAX_JSON_DEPTH)), r"nested deeper than 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_manifest_with_a_value_out_of_range_is_refused_when_it_is_parsed(name):
    change, words = REFUSED[name]
    fields = unsigned(make_full())
    change(fields)
    with pytest.raises(CorruptCacheError, match=f"^here: .*{words}"):
        manifest_from_json(signed(fields), where="here")


@pytest.mark.parametrize(
    ("change", "words"), [({"dtype": "float64"}, "dtype 'float64'"), ({"pooling": "max"}, "pooling 'max'")]
)
def test_a_feature_of_a_kind_that_is_unknown_here_says_upgrade(change, words):
    fields = unsigned(make_full())
    features(change)(fields)
    with pytest.raises(UnsupportedVersionError, match=f"^here: .*{words}.*upgrade"):
        manifest_from_json(signed(fields), where="here")


def test_a_lineage_of_lineages_is_checked_to_its_end():
    fields = unsigned(make_full())
    parent = {"name": "p", "snapshot": "x", "input_fingerprint": "y", **{
        part: json.loads(json.dumps(fields["identity"][part])) for part in ("teacher", "tokenizer", "selection", "codec")
    }}  # fmt: skip
    inner = json.loads(json.dumps(parent))
    inner["selection"] = {"kind": "top_k", "params": {"k": -1}}
    fields["lineage"] = {"operations": [], "parents": [parent | {"lineage": {"operations": [], "parents": [inner]}}]}
    with pytest.raises(CorruptCacheError, match="k = -1"):
        manifest_from_json(signed(fields), where="here")


def test_the_greatest_values_that_are_allowed_pass():
    most = make_shard(0, num_tokens=2**63 - 1, num_exact_entries=90, num_finished={"stop": 2})
    fields = unsigned(msgspec.structs.replace(make_full(), shards=(most,)))
    fields["config"] = nested(MAX_JSON_DEPTH - 3)
    assert manifest_from_json(signed(fields), where="here").total("num_tokens") == 2**63 - 1


def test_a_journal_record_is_checked_as_a_manifests_entry_is():
    with pytest.raises(CorruptCacheError, match=r"^here: num_positions is -1"):
        shard_from_json(shard_to_json(make_shard(num_positions=-1)), where="here")


@pytest.mark.parametrize(
    "change", [{"vocab_size": 0}, {"selection": SelectionInfo(kind="top_k", params={"k": "5"})}, {"features": (-1, 4)}]
)
def test_a_shards_metadata_is_checked_as_a_manifest_is(change):
    about: dict[str, Any] = {
        "unit": 0,
        "vocab_size": 97,
        "selection": SelectionInfo(kind="top_k", params={"k": 5}),
        "codec": CodecInfo(codec_id="raw", params={}),
    } | change
    if "features" in change:
        about["features"] = (FeatureInfo(name="last", layer=-2, size=4),)
    with pytest.raises(FormatError, match=r"^here: "):
        shard_metadata(shard_schema([], **about), where="here")
