"""Features and sidecars in derived caches: carried along as they are stored, filtered with their positions, or refused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from feature_making import ALL_KINDS, UNFITTED, fitted, full_vectors, make_feature_cache, record_with

from kdcache.codec.features.fit import fit_feature
from kdcache.config.loader import LoaderConfig
from kdcache.derive.config import DeriveConfig
from kdcache.derive.run import derive
from kdcache.errors import ConfigError, MismatchError
from kdcache.format.feature_positions import feature_positions
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.loader.cache import open_cache
from kdcache.loader.loader import Loader
from kdcache.store.verify import verify_cache
from kdcache.store.writing.writer import CacheWriter

FITS = fitted(ALL_KINDS)
FOLLOWING = fitted([feature for feature in ALL_KINDS if feature.name != "few"])
RECORDS = [record_with(seed, FITS, supervised=how) for seed, how in enumerate(["all", "holes", "every", "all"])]
READ = LoaderConfig(seq_len=16, batch_rows=4, packing="none", shuffle=False, num_threads=0)


def stored(path) -> dict[str, FeatureVectors]:
    with open_cache(path) as cache:
        names = tuple(feature.name for feature in cache.manifest.identity.features)
        (batch,) = Loader(cache, msgspec.structs.replace(READ, features=names))
    assert batch.features is not None
    return batch.features


def test_a_copy_has_the_same_numbers_in_every_dtype_and_the_same_sidecars(tmp_path):
    writer_manifest = make_feature_cache(tmp_path / "a", RECORDS, FITS)
    CacheWriter.open(tmp_path / "a", msgspec.structs.replace(writer_manifest, number=0, parent=None)).add_sidecar(
        "extra", {"weight": np.ones((4, 3), np.uint16)}, bfloat16=["weight"]
    )
    manifest = derive([tmp_path / "a"], tmp_path / "b", DeriveConfig(codec="quantized", bits=8)).manifest
    assert verify_cache(tmp_path / "b").problems == []
    with open_cache(tmp_path / "a") as source:
        assert manifest.sidecars == source.manifest.sidecars
        assert manifest.requires == source.manifest.requires
        assert len(manifest.sidecars) == 4
    theirs, ours = stored(tmp_path / "a"), stored(tmp_path / "b")
    for name, vectors in theirs.items():
        np.testing.assert_array_equal(ours[name].slots_F, vectors.slots_F)
        if vectors.info.dtype != "int8":
            np.testing.assert_array_equal(ours[name].values_FH, vectors.values_FH)
        else:
            # Decoded and rounded again: an eight-bit number may move by one where it lay between two.
            moved = ours[name].values_FH.astype(int) - vectors.values_FH
            assert np.abs(moved).max() <= 1
            assert (moved != 0).mean() < 1e-3
    # The same call again finds all of it done.
    assert derive([tmp_path / "a"], tmp_path / "b", DeriveConfig(codec="quantized", bits=8)).manifest == manifest


def test_positions_left_out_take_their_vectors_along_and_all_positions_keep_theirs(tmp_path):
    records = [record_with(seed, FOLLOWING, supervised="all") for seed in range(4)]
    source = make_feature_cache(tmp_path / "a", records, FOLLOWING)
    derived = derive([tmp_path / "a"], tmp_path / "b", DeriveConfig(where_position="tail_mass > 0.1"))
    assert verify_cache(tmp_path / "b").problems == []
    assert 0 < derived.manifest.total("num_positions") < source.total("num_positions")
    theirs, ours = stored(tmp_path / "a"), stored(tmp_path / "b")
    with open_cache(tmp_path / "b") as cache:
        masks = [record.sequence.supervised_N for record in map(cache.__getitem__, range(len(cache)))]
    for name, vectors in ours.items():
        slots = [feature_positions(vectors.info, mask) + 16 * row for row, mask in enumerate(masks)]
        expected = np.arange(len(masks)) if vectors.info.pooling != "none" else np.concatenate(slots)
        np.testing.assert_array_equal(vectors.slots_F, expected)
        kept_F = np.isin(theirs[name].slots_F, vectors.slots_F)
        np.testing.assert_allclose(vectors.float32(), theirs[name].float32()[kept_F], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"max_positions": 3}, "'plain' is chosen among all positions"), ({"pooling": "mean"}, "'plain' is pooled over all")],
)
def test_features_of_all_supervised_positions_are_refused_where_some_are_left_out(tmp_path, change, sentence):
    fits = fitted([msgspec.structs.replace(UNFITTED["plain"], **change)])
    make_feature_cache(tmp_path / "a", [record_with(1, fits)], fits)
    with pytest.raises(ConfigError, match=sentence):
        derive([tmp_path / "a"], tmp_path / "b", DeriveConfig(where_position="tail_mass > 0.1"))


def test_caches_with_one_fit_follow_one_another_and_with_two_they_do_not(tmp_path):
    fits = fitted([UNFITTED["channels"]])
    for name in "ab":
        make_feature_cache(tmp_path / name, [record_with(ord(name), fits)], fits)
    manifest = derive([tmp_path / "a", tmp_path / "b"], tmp_path / "ab").manifest
    assert [sidecar.name for sidecar in manifest.sidecars] == ["scale:channels"]
    assert verify_cache(tmp_path / "ab").problems == []
    other = [fit_feature(UNFITTED["channels"], full_vectors(9, UNFITTED["channels"], 99))]
    make_feature_cache(tmp_path / "c", [record_with(3, other)], other)
    with pytest.raises(MismatchError, match=r"features\.channels\.scale_digest"):
        derive([tmp_path / "a", tmp_path / "c"], tmp_path / "ac")


def test_a_mixture_has_neither_features_nor_sidecars(tmp_path):
    for name in "ab":
        make_feature_cache(tmp_path / name, RECORDS, FITS)
    manifest = derive([tmp_path / "a", tmp_path / "b"], tmp_path / "ab", DeriveConfig(mix=(0.5, 0.5))).manifest
    assert (manifest.identity.features, manifest.sidecars, manifest.requires) == ((), (), ())
