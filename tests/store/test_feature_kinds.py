"""Features of every kind, dtype, grid and projection: written, verified, read back, within the bound of their dtype."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from cache_making import make_identity, make_manifest
from feature_making import ALL_KINDS, UNFITTED, fitted, full_vectors, make_feature_cache, most_off, open_writer, record_with

from kdcache.codec.features.columns import feature_fields, read_vectors
from kdcache.codec.features.fit import fit_feature
from kdcache.codec.features.vectors import bytes_per_vector, encode_vectors
from kdcache.errors import CorruptCacheError, FormatError, MismatchError
from kdcache.format import manifest as manifest_module
from kdcache.format import paths
from kdcache.format.feature_checks import check_features
from kdcache.format.feature_claims import FEATURES_2, requirements
from kdcache.format.feature_positions import feature_positions, num_vectors
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.identity import FeatureInfo
from kdcache.format.record import distances_key
from kdcache.store.reader import open_reader
from kdcache.store.verify import verify_cache
from kdcache.store.writing.writer import CacheWriter

FITS = fitted(ALL_KINDS)
RECORDS = [record_with(seed, FITS, supervised=how) for seed, how in enumerate(["all", "holes", "none", "every"])]


def test_every_kind_comes_back_within_its_bound(tmp_path):
    manifest = make_feature_cache(tmp_path / "c", RECORDS, FITS, record_batch_bytes=600)
    assert verify_cache(tmp_path / "c").problems == []
    assert manifest.requires == (FEATURES_2,)
    stored = manifest.shards[0].column_bytes
    with open_reader(tmp_path / "c") as reader:
        assert reader.num_record_batches(0) > 1
        for index, record in enumerate(RECORDS):
            found = reader[index].distributions.features
            assert set(found) == set(record.distributions.features)
            for fit in FITS:
                feature, expected = fit.info, record.distributions.features[fit.info.name]
                assert found[feature.name].dtype == np.float32
                off = np.abs(found[feature.name] - expected)
                assert (off <= most_off(feature, expected, fit.constants)).all(), feature.name
                if feature.kind == "attention":
                    np.testing.assert_array_equal(
                        found[distances_key(feature)], record.distributions.features[distances_key(feature)]
                    )
        for fit in FITS:
            count = sum(num_vectors(fit.info, record.sequence.supervised_N) for record in RECORDS)
            in_all = sum(stored[field.name] for field in feature_fields([fit.info]))
            assert 0 <= in_all - bytes_per_vector(fit.info) * count <= 400, fit.info.name


@pytest.mark.parametrize("name", ["strided", "few", "plain", "brain"])
def test_positions_are_those_of_the_spec_one_by_one(name):
    feature = UNFITTED[name]
    for seed in range(20):
        mask = np.random.default_rng(seed).random(int(seed * 1.7)) < 0.6
        expected = [
            t for t in range(len(mask)) if (feature.positions == "all" or mask[t]) and t % feature.stride == feature.offset
        ]
        most = feature.max_positions
        if most is not None and len(expected) > most:
            expected = [expected[i * len(expected) // most] for i in range(most)]
        assert feature_positions(feature, mask).tolist() == expected


def test_a_scale_per_channel_is_ten_times_nearer_where_few_channels_are_a_hundred_times_larger():
    rng = np.random.default_rng(0)
    scale_H = np.where(np.arange(64) % 16 == 3, 100.0, 1.0)
    sample, values = ((rng.normal(0, 1, (n, 64)) * scale_H).astype(np.float32) for n in (2000, 500))
    errors = {}
    for scale in ("vector", "channel"):
        feature = FeatureInfo(name="x", layer=1, size=64, dtype="int8", scale=scale)
        constants = fit_feature(feature, sample).constants
        stored, scales = encode_vectors(feature, values, constants)
        vectors = FeatureVectors(feature, stored, np.arange(500), scales, constants.mean_H, constants.scale_H)
        others = scale_H == 1
        errors[scale] = np.linalg.norm((vectors.float32() - values)[:, others]) / np.linalg.norm(values[:, others])
    assert errors["channel"] * 10 < errors["vector"]
    assert errors["channel"] < 0.02


def test_numbers_beyond_the_sample_are_never_clipped():
    feature = FeatureInfo(name="x", layer=1, size=4, dtype="int8", scale="channel")
    constants = fit_feature(feature, np.random.default_rng(0).normal(0, 1, (100, 4)).astype(np.float32)).constants
    values = np.array([[1e4, 0.1, 0, 0], [0.3, -0.2, 0.1, 0]], np.float32)
    stored, scales = encode_vectors(feature, values, constants)
    found = FeatureVectors(feature, stored, np.arange(2), scales, constants.mean_H, constants.scale_H).float32()
    assert abs(found[0, 0] - 1e4) < 1e4 / 250
    np.testing.assert_allclose(found[1], values[1], atol=0.03)


def test_only_features_that_an_older_reader_misreads_are_required():
    old = FeatureInfo(name="x", layer=1, size=4, num_layers=4)
    assert requirements([old, msgspec.structs.replace(old, dtype="int8", pooling="mean")]) == ()
    for change in (
        {"layer": -1},
        {"layer": 4},
        {"positions": "all"},
        {"stride": 2},
        {"dtype": "bfloat16"},
        {"max_positions": 3},
    ):
        assert requirements([msgspec.structs.replace(old, **change)]) == (FEATURES_2,), change


def test_a_cache_is_not_started_before_its_features_are_fitted(tmp_path):
    identity = msgspec.structs.replace(make_identity("packed"), features=(UNFITTED["channels"],))
    with pytest.raises(FormatError, match=r"scale_digest of feature 'channels' is None, expected the SHA-256 of a sidecar"):
        CacheWriter.open(tmp_path / "c", make_manifest(1, identity))
    fits = fitted([UNFITTED["channels"]])
    identity = msgspec.structs.replace(identity, features=(fits[0].info,))
    with pytest.raises(FormatError, match=r"needs the sidecar 'scale:channels' with SHA-256 '[0-9a-f]{64}', .* lists None"):
        CacheWriter.open(tmp_path / "c", make_manifest(1, identity))


def test_the_fit_of_the_cache_that_is_there_counts(tmp_path):
    feature = UNFITTED["channels"]
    first = open_writer(tmp_path / "c", fitted([feature]))
    other = fit_feature(feature, full_vectors(5, feature, 50))
    second = open_writer(tmp_path / "c", [other])
    assert other.info != first.features[0] == second.features[0]
    np.testing.assert_array_equal(second.constants["channels"].scale_H, first.constants["channels"].scale_H)
    unfitted = msgspec.structs.replace(make_identity("packed"), features=(feature,))
    assert CacheWriter.open(tmp_path / "c", make_manifest(1, unfitted)).features == first.features
    changed = msgspec.structs.replace(make_identity("packed"), features=(msgspec.structs.replace(feature, stride=2),))
    with pytest.raises(MismatchError, match=r"features\.channels\.stride: 1 != 2"):
        CacheWriter.open(tmp_path / "c", make_manifest(1, changed))


def mended(name, change):
    record = RECORDS[3]
    values = dict(record.distributions.features)
    values |= change({key: values[key].copy() for key in values if key.split(":")[0] == name})
    return values, record.sequence.supervised_N


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("brain", lambda f: {"brain": np.full_like(f["brain"], 3.4e38)}, "bfloat16 ends there"),
        ("strided", lambda f: {"strided": f["strided"][1:]}, "feature 'strided' has 3 vectors, expected 4"),
        ("attention_2", lambda f: {"attention_2": -f["attention_2"]}, "below 0"),
        ("attention_2", lambda f: {"attention_2": f["attention_2"] * 2 + 0.5}, "sum to more than 1"),
        ("attention_2", lambda f: {"attention_2": f["attention_2"][:, ::-1].copy()}, "not in falling order"),
        ("attention_2", lambda f: {"attention_2:distance": f["attention_2:distance"] + 1}, "a key lies outside the sequence"),
        ("attention_2", lambda f: {"attention_2:distance": f["attention_2:distance"] * 0}, "a head has a key twice"),
        ("attention_2", lambda f: {"attention_2:distance": f["attention_2:distance"].astype(np.int64)}, "expected int32"),
    ],
)
def test_what_a_kind_cannot_be_is_refused_by_name(name, change, sentence):
    values, mask = mended(name, change)
    with pytest.raises(FormatError, match=sentence):
        check_features(values, [fit.info for fit in FITS], mask)


@pytest.mark.parametrize("name", [fit.info.name for fit in FITS])
def test_a_flipped_bit_in_any_column_is_found(tmp_path, name):
    manifest = make_feature_cache(tmp_path, RECORDS, FITS)
    assert manifest.shards
    (path,) = (tmp_path / "data").iterdir()
    for column in (field.name for field in feature_fields([fit.info for fit in FITS if fit.info.name == name])):
        data = path.read_bytes()
        table = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
        values = table.column(column).values.to_numpy().tobytes()
        at = data.index(values) + len(values) // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert verify_cache(tmp_path).problems, column
        path.write_bytes(data)
    with open_reader(tmp_path) as reader:
        assert len(reader[0].distributions.features) == len(RECORDS[0].distributions.features)


def test_a_column_of_another_length_is_refused(tmp_path):
    feature = UNFITTED["strided"]
    columns = {"feature:strided": np.zeros(24, np.int8), "feature:strided:scale": np.zeros(2, np.float32)}
    assert read_vectors(columns, feature, np.ones(5, bool)).values_FH.shape == (2, 12)
    with pytest.raises(CorruptCacheError, match="column 'feature:strided' holds 24 values"):
        read_vectors(columns, feature, np.ones(9, bool))


def test_the_lines_of_the_spec_decode_every_feature(tmp_path):
    """With pyarrow, numpy and safetensors alone."""
    safetensors = pytest.importorskip("safetensors.numpy")
    spec = Path(manifest_module.__file__).with_name("README.md").read_text()
    (source,) = re.findall(r"```python\n(def decode_feature.*?)```", spec, re.DOTALL)
    lines: dict = {"np": np}
    exec(source, lines)
    manifest = make_feature_cache(tmp_path, RECORDS, FITS)
    sidecars = {s.name: safetensors.load_file(tmp_path / paths.sidecar_name(s.sha256)) for s in manifest.sidecars}
    features = json.loads((tmp_path / paths.manifest_name(1)).read_bytes())["identity"]["features"]
    table = pa.ipc.open_file(tmp_path / manifest.shards[0].name).read_all().to_pylist()
    with open_reader(tmp_path) as reader:
        for line, record in zip(table, reader, strict=True):
            for feature in features:
                found = lines["decode_feature"](feature, line, sidecars)
                np.testing.assert_allclose(found, record.distributions.features[feature["name"]], rtol=1e-6, atol=1e-6)
