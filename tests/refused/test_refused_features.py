"""Features and sidecars that cannot be: refused in one sentence when the manifest is parsed, or when the shard is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
from feature_making import ALL_KINDS, fitted, make_feature_cache, record_with

from kdcache.codec.features.constants import read_constants
from kdcache.config.loader import LoaderConfig
from kdcache.errors import CorruptCacheError, UnsupportedVersionError
from kdcache.loader.loader import Loader
from kdcache.store.reader import open_reader
from kdcache.store.verify import verify_cache

FITS = fitted(ALL_KINDS)
NAMES = [fit.info.name for fit in FITS]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "cache"
    make_feature_cache(path, [record_with(seed, FITS) for seed in range(3)], FITS, record_batch_bytes=1)
    return path


def claims(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change what the manifest says of one feature."""

    def edited(fields: dict[str, Any]) -> None:
        change(next(feature for feature in fields["identity"]["features"] if feature["name"] == name))

    return lambda cache: hostile.edit_manifest(cache, edited)


def says(name: str, **values: Any) -> Callable[[Path], None]:
    return claims(name, lambda feature: feature.update(values))


def column(name: str, values: list[Any]) -> Callable[[Path], None]:
    return lambda cache: hostile.edit_rows(cache, hostile.set_list(name, values))


def sidecars(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    return lambda cache: hostile.edit_manifest(cache, lambda fields: change(fields["sidecars"]) and None)


CLAIMS = {
    "an unknown kind": (says("plain", kind="logits"), UnsupportedVersionError, "has the kind 'logits'"),
    "an unknown dtype": (says("plain", dtype="float8"), UnsupportedVersionError, "has the dtype 'float8'"),
    "unknown positions": (says("plain", positions="odd"), UnsupportedVersionError, "has the positions 'odd'"),
    "an unknown scale": (says("strided", scale="row"), UnsupportedVersionError, "has the scale 'row'"),
    "an unknown projection": (
        claims("mixed", lambda f: f["projection"].update(kind="svd")), UnsupportedVersionError, "projection of the kind 'svd'",
    ),
    "a stride of nothing": (says("strided", stride=0), CorruptCacheError, "stride of feature 'strided' is 0"),
    "an offset beyond the stride": (says("strided", offset=3), CorruptCacheError, "offset of feature 'strided' is 3"),
    "no positions": (says("few", max_positions=0), CorruptCacheError, "max_positions of feature 'few' is 0"),
    "a layer below the last": (says("plain", layer=-2), CorruptCacheError, "layer of feature 'plain' is -2"),
    "attention of the embeddings": (says("attention_2", layer=0), CorruptCacheError, "layer of feature 'attention_2' is 0"),
    "fewer layers than its own": (says("plain", num_layers=1), CorruptCacheError, "num_layers of feature 'plain' is 1"),
    "heads that do not divide": (says("queries_2", head_dim=5), CorruptCacheError, "has 3 heads of 5 numbers"),
    "no heads": (says("queries_2", num_heads=None), CorruptCacheError, "has None heads"),
    "pooled attention": (says("attention_2", pooling="mean"), CorruptCacheError, "must be float16, not pooled"),
    "channels of halves": (says("channels", dtype="float16"), CorruptCacheError, "scale 'channel' and the dtype 'float16'"),
    "a fit that is not there": (says("channels", scale_digest=None), CorruptCacheError, "expected the SHA-256 of a sidecar"),
    "a fit of nothing": (says("plain", scale_digest="0" * 64), CorruptCacheError, "scale_digest .* expected null"),
    "a digest that is a path": (says("channels", scale_digest="../" * 22), CorruptCacheError, "expected the SHA-256"),
    "another fit": (says("channels", scale_digest="0" * 64), CorruptCacheError, "needs the sidecar 'scale:channels'"),
    "a projection that makes more": (
        claims("mixed", lambda f: f["projection"].update(full_size=3)), CorruptCacheError, r"full_size .* is 3, expected 6 to",
    ),
    "a sidecar that is not listed": (
        sidecars(lambda s: s.clear()), CorruptCacheError, r"needs the sidecar .* the manifest lists None",
    ),
    "two sidecars of one name": (sidecars(lambda s: s.append(s[0])), CorruptCacheError, "two sidecars have the name"),
    "a sidecar that is a path": (sidecars(lambda s: s[0].update(name="../x")), CorruptCacheError, r"has the name '\.\./x'"),
    "a sidecar larger than any": (sidecars(lambda s: s[0].update(num_bytes=2**60)), CorruptCacheError, "num_bytes of sidecar"),
    "tensors larger than their file": (
        sidecars(lambda s: s[0]["tensors"]["basis"].update(shape=[2**31, 2**31])), CorruptCacheError, "bytes of the tensors",
    ),
    "a requirement of tomorrow": (
        lambda cache: hostile.edit_manifest(cache, lambda f: f.update(requires=["features_2", "features_3"])),
        UnsupportedVersionError,
        "requires features_3; upgrade",
    ),
}  # fmt: skip
COLUMNS = {
    "too few numbers": (column("feature:brain", [0] * 12), "column 'feature:brain' holds 12 values"),
    "too many scales": (column("feature:channels:scale", [1.0] * 40), "column 'feature:channels:scale' holds 40 values"),
    "a key in front of the sequence": (
        column("feature:attention_2:distance", [60000] * 66), "'attention_2': a key lies in front of the sequence",
    ),
    "a missing sidecar": (
        lambda cache: [path.unlink() for path in (cache / "sidecars").iterdir()] and None, "the sidecar '.*' is missing",
    ),
    "a flipped bit in a sidecar": (
        lambda cache: [hostile.flip(path, -1) for path in (cache / "sidecars").iterdir()] and None, "sidecar '.*' is damaged",
    ),
}  # fmt: skip


def read_everything(cache: Path) -> None:
    with open_reader(cache) as reader:
        for record in reader:
            assert record.distributions.features


def load_everything(cache: Path) -> None:
    config = LoaderConfig(seq_len=16, batch_rows=2, num_threads=0, features=tuple(NAMES))
    with open_reader(cache) as reader, Loader(reader, config) as loader:
        for batch in loader:
            assert batch.features


def test_the_cache_before_it_is_spoilt_is_sound(sound):
    read_everything(sound)
    load_everything(sound)
    assert verify_cache(sound).problems == []


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_that_cannot_be_is_refused_when_the_manifest_is_parsed(tmp_path, sound, name):
    spoil, error, words = CLAIMS[name]
    shutil.copytree(sound, tmp_path / "cache")
    spoil(tmp_path / "cache")
    with pytest.raises(error, match=words) as caught:
        open_reader(tmp_path / "cache")
    assert "000001.json" in str(caught.value)


@pytest.mark.parametrize("read", [read_everything, load_everything])
@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_or_a_sidecar_that_cannot_be_is_refused_by_every_reader(tmp_path, sound, name, read):
    spoil, words = COLUMNS[name]
    shutil.copytree(sound, tmp_path / "cache")
    spoil(tmp_path / "cache")
    with pytest.raises(CorruptCacheError, match=words):
        read(tmp_path / "cache")
    assert verify_cache(tmp_path / "cache").problems


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "has nothing as 'mean', expected float32"),
        ({"mean": np.zeros(11, np.float32), "scale": np.ones(12, np.float32)}, r"float32 of shape \(11,\)"),
        ({"mean": np.zeros(12, np.float64), "scale": np.ones(12, np.float32)}, "float64"),
        ({"mean": np.full(12, np.nan, np.float32), "scale": np.ones(12, np.float32)}, "'mean' is not finite"),
        ({"mean": np.zeros(12, np.float32), "scale": np.zeros(12, np.float32)}, "a scale is not above 0"),
    ],
)
def test_a_sidecar_that_does_not_hold_what_its_feature_needs_is_refused(arrays, words):
    feature = next(fit.info for fit in FITS if fit.info.name == "channels")
    with pytest.raises(CorruptCacheError, match=words):
        read_constants(feature, lambda name: arrays)
