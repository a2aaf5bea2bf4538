"""Hidden states of named layers beside the distributions: what comes back, how far off, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from cache_making import make_identity, make_manifest, make_record
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kdcache.codec.features.columns import feature_fields
from kdcache.codec.features.vectors import bytes_per_vector, quantize_vectors
from kdcache.errors import CorruptCacheError, FormatError
from kdcache.format.feature_checks import check_features
from kdcache.format.feature_positions import num_vectors
from kdcache.format.manifest import FeatureInfo
from kdcache.format.record import SequenceRecord
from kdcache.store.reader import open_reader
from kdcache.store.verify import verify_cache
from kdcache.store.writing.writer import CacheWriter

FEATURES = (
    FeatureInfo(name="layer4", layer=4, size=6),
    FeatureInfo(name="layer2", layer=2, size=3, dtype="int8"),
    FeatureInfo(name="layer4_mean", layer=4, size=6, dtype="int8", pooling="mean"),
)


def with_features(seed: int, features: tuple[FeatureInfo, ...] = FEATURES) -> SequenceRecord:
    record = make_record(seed)
    rng = np.random.default_rng(seed)
    mask = record.sequence.supervised_N
    made = {f.name: rng.normal(0, 10, (num_vectors(f, mask), f.size)).astype(np.float32) for f in features}
    return replace(record, distributions=replace(record.distributions, features=made))


def write(path, records, features=FEATURES):
    identity = msgspec.structs.replace(make_identity("packed"), features=features)
    writer = CacheWriter.open(path, make_manifest(1, identity))
    writer.write_unit(0, records)
    return writer.fold()


def test_features_come_back_within_their_bound(tmp_path):
    records = [with_features(seed) for seed in range(3)]
    manifest = write(tmp_path, records)
    assert verify_cache(tmp_path).problems == []
    with open_reader(tmp_path) as reader:
        for index, record in enumerate(records):
            expected, found = record.distributions.features, reader[index].distributions.features
            assert list(found) == [feature.name for feature in FEATURES]
            np.testing.assert_allclose(found["layer4"], expected["layer4"], rtol=2.0**-11, atol=2.0**-25)
            for name in ("layer2", "layer4_mean"):
                half_step_R = np.abs(expected[name]).max(axis=-1) / 127 / 2
                assert (np.abs(found[name] - expected[name]) <= half_step_R[:, None] * (1 + 1e-5)).all()
    num_rows = {"layer4": manifest.total("num_positions"), "layer2": manifest.total("num_positions"), "layer4_mean": 3}
    stored = manifest.shards[0].column_bytes
    for feature in FEATURES:
        num_bytes = sum(stored[field.name] for field in feature_fields([feature]))
        assert num_bytes >= bytes_per_vector(feature) * num_rows[feature.name]
        assert num_bytes <= bytes_per_vector(feature) * num_rows[feature.name] + 64


@given(arrays.arrays(np.float32, (3, 4), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_eight_bits_are_off_by_half_a_step_at_most(values_RH):
    quantized_RH, scale_R = quantize_vectors(values_RH)
    error_RH = np.abs(quantized_RH * scale_R.astype(np.float64)[:, None] - values_RH)
    smallest = 127 * 2.0**-149  # a row whose scale vanishes in float32 is stored as zeros
    assert (error_RH <= scale_R[:, None] * 0.5 * (1 + 1e-5) + smallest).all()


def test_a_damaged_feature_is_found(tmp_path):
    write(tmp_path, [with_features(1)])
    (path,) = (tmp_path / "data").iterdir()
    data = bytearray(path.read_bytes())
    values = with_features(1).distributions.features["layer4"].astype(np.float16).tobytes()
    data[data.index(values) + 5] ^= 1
    path.write_bytes(data)
    with open_reader(tmp_path) as reader, pytest.raises(CorruptCacheError, match="digest"):
        reader[0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: {}, r"features \[\], but the cache keeps"),
        (lambda f: f | {"other": f["layer2"]}, "'other'"),
        (lambda f: f | {"layer4": f["layer4"][:, :5]}, "expected float32 of"),
        (lambda f: f | {"layer4": f["layer4"] * np.float32(1e6)}, "float16 ends at 65504: use bfloat16 or int8"),
        (lambda f: f | {"layer2": f["layer2"] * np.float32(np.nan)}, "not finite"),
    ],
)
def test_features_that_the_cache_cannot_keep_are_refused_by_name(change, sentence):
    features = change(with_features(1).distributions.features)
    with pytest.raises(FormatError, match=sentence):
        check_features(features, FEATURES, with_features(1).sequence.supervised_N)


def test_too_few_vectors_are_refused_when_they_are_written(tmp_path):
    record = with_features(1)
    features = {name: values[:-1] for name, values in record.distributions.features.items()}
    short = replace(record, distributions=replace(record.distributions, features=features))
    with pytest.raises(FormatError, match=r"feature 'layer4' has 10 vectors, expected 11"):
        write(tmp_path, [short])
