"""Features and sidecars of a cache in an object store: written, read, kept as blocks, repaired."""

from __future__ import annotations

import uuid

import numpy as np
import pytest
from feature_making import ALL_KINDS, fitted, make_feature_cache, record_with

from kdcache.config.loader import LoaderConfig
from kdcache.config.remote import RemoteConfig
from kdcache.derive.run import derive
from kdcache.errors import CorruptCacheError
from kdcache.format import paths
from kdcache.loader.cache import open_cache
from kdcache.loader.loader import Loader
from kdcache.store.files.location import locate
from kdcache.store.repair import repair_cache
from kdcache.store.verify import verify_cache

pytest.importorskip("fsspec")

FITS = fitted(ALL_KINDS)
RECORDS = [record_with(seed, FITS) for seed in range(3)]
NAMES = tuple(fit.info.name for fit in FITS)


@pytest.fixture
def uri() -> str:
    return f"memory://{uuid.uuid4().hex}/cache"


def test_a_cache_in_a_store_gives_what_one_on_a_disk_gives(tmp_path, uri):
    manifests = [make_feature_cache(path, RECORDS, FITS) for path in (uri, tmp_path / "c")]
    assert manifests[0].sidecars == manifests[1].sidecars
    assert verify_cache(uri).problems == []
    config = LoaderConfig(seq_len=16, batch_rows=3, packing="none", shuffle=False, num_threads=0, features=NAMES)
    found = []
    for path in (uri, tmp_path / "c"):
        with open_cache(path) as cache, Loader(cache, config) as loader:
            (batch,) = loader
            found.append(batch.features)
    for name in NAMES:
        np.testing.assert_array_equal(found[0][name].values_FH, found[1][name].values_FH)
        np.testing.assert_array_equal(found[0][name].float32(), found[1][name].float32())
    derived = derive([uri], tmp_path / "d").manifest
    assert derived.sidecars == manifests[0].sidecars


def test_a_sidecar_is_kept_next_to_the_other_blocks(tmp_path, uri):
    manifest = make_feature_cache(uri, RECORDS, FITS)
    remote = RemoteConfig(block_dir=str(tmp_path / "blocks"))
    with open_cache(uri, remote=remote) as cache:
        expected = cache.sidecar("pca:small")
    (info,) = (sidecar for sidecar in manifest.sidecars if sidecar.name == "pca:small")
    (locate(uri) / paths.sidecar_name(info.sha256)).unlink()
    with open_cache(uri, remote=remote) as cache:
        np.testing.assert_array_equal(cache.sidecar("pca:small")["basis"], expected["basis"])
    with open_cache(uri) as cache, pytest.raises(CorruptCacheError, match="'pca:small' is missing"):
        cache.sidecar("pca:small")


def test_a_damaged_sidecar_in_a_store_is_found_and_set_aside(uri):
    from kdcache.store.writing.writer import CacheWriter

    manifest = make_feature_cache(uri, RECORDS, FITS)
    info = CacheWriter(locate(uri), manifest, 10**6).add_sidecar("output_projection", {"weight": np.ones(5)})
    path = locate(uri) / paths.sidecar_name(info.sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert any("'output_projection'" in problem for problem in verify_cache(uri).problems)
    assert [damage.name for damage in repair_cache(uri).damage] == [paths.sidecar_name(info.sha256)]
    assert verify_cache(uri).problems == []
