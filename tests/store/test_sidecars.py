"""Sidecars: files of arrays by digest, listed in the manifest, checked on every read."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from cache_making import make_identity, make_manifest, make_record
from feature_making import UNFITTED, fitted, make_feature_cache, record_with

from kdcache.errors import ConfigError, CorruptCacheError, FormatError
from kdcache.format import paths
from kdcache.format.manifest import manifest_from_json, manifest_to_json
from kdcache.format.sidecar import make_sidecar, parse_sidecar
from kdcache.loader.cache import open_cache
from kdcache.store.repair import repair_cache
from kdcache.store.verify import verify_cache
from kdcache.store.writing.writer import CacheWriter

ARRAYS = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "bias": np.arange(3, dtype=np.float64),
    "flags": np.array([True, False, True]),
    "half": np.arange(5, dtype=np.uint16),
    "nothing": np.zeros((0, 4), np.int32),
    "one": np.float32(3.5).reshape(()),
}


def started(path: Path) -> CacheWriter:
    return CacheWriter.open(path, make_manifest(1, make_identity("packed")))


def finished(path: Path) -> CacheWriter:
    writer = started(path)
    writer.write_unit(0, [make_record(1)])
    writer.fold()
    return writer


def test_arrays_come_back_and_any_tool_opens_the_file(tmp_path):
    writer = finished(tmp_path / "c")
    info = writer.add_sidecar("output_projection", ARRAYS, bfloat16=["half"])
    assert info.tensors["half"].dtype == "BF16"
    assert verify_cache(tmp_path / "c").problems == []
    with open_cache(tmp_path / "c") as cache:
        assert [sidecar.name for sidecar in cache.manifest.sidecars] == ["output_projection"]
        found = cache.sidecar("output_projection")
        assert cache.manifest.total("num_sequences") == 1
        with pytest.raises(ConfigError, match="has no sidecar 'pca:x'; it has output_projection"):
            cache.sidecar("pca:x")
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    from kdcache.loader.torch_batches import sidecar_tensors

    theirs = safetensors.load_file(tmp_path / "c" / paths.sidecar_name(info.sha256))
    with open_cache(tmp_path / "c") as cache:
        ours = sidecar_tensors(cache, "output_projection")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor)


def test_what_any_tool_writes_is_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    ours = make_sidecar("x", {name: ARRAYS[name] for name in ("weight", "bias", "flags")})
    theirs = safetensors.save({name: ARRAYS[name] for name in ours.info.tensors}, metadata={"by": "another tool"})
    found = parse_sidecar(theirs, ours.info, "here")
    np.testing.assert_array_equal(found["weight"], ARRAYS["weight"])


def test_the_same_sidecar_twice_is_one_and_another_of_its_name_is_refused(tmp_path):
    writer = finished(tmp_path)
    first = writer.add_sidecar("activation_statistics", {"x": np.zeros(3)})
    num_manifests = len(list((tmp_path / "manifests").iterdir()))
    assert started(tmp_path).add_sidecar("activation_statistics", {"x": np.zeros(3)}) == first
    assert len(list((tmp_path / "manifests").iterdir())) == num_manifests
    with pytest.raises(FormatError, match="sidecars are not changed: give it another name"):
        writer.add_sidecar("activation_statistics", {"x": np.ones(3)})
    second = writer.add_sidecar("activation_statistics", {"x": np.ones(3)}, replaces=True)
    assert [s.sha256 for s in writer.manifest.sidecars] == [second.sha256]
    assert verify_cache(tmp_path).problems == []
    # A reader of an older snapshot still finds its own.
    assert len(list((tmp_path / "sidecars").iterdir())) == 2


def test_sidecars_are_kept_by_folds_and_added_before_or_after(tmp_path):
    writer = CacheWriter.open(tmp_path, make_manifest(2, make_identity("packed")), sidecars=[make_sidecar("a", ARRAYS)])
    writer.write_unit(0, [make_record(1)])
    writer.add_sidecar("b", {"x": np.ones(2, np.float32)})
    writer.write_unit(1, [make_record(2)])
    manifest = writer.fold()
    assert [sidecar.name for sidecar in manifest.sidecars] == ["a", "b"]
    assert manifest.is_complete
    assert verify_cache(tmp_path).problems == []


@pytest.mark.parametrize("how", ["missing", "flipped", "truncated"])
def test_a_damaged_sidecar_is_one_sentence(tmp_path, how):
    writer = finished(tmp_path)
    path = tmp_path / paths.sidecar_name(writer.add_sidecar("output_projection", ARRAYS).sha256)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.unlink()
    if how != "missing":
        path.write_bytes(data if how == "flipped" else data[:-5])
    sentence = "missing" if how == "missing" else "damaged"
    with open_cache(tmp_path) as cache:
        assert len(cache[0].distributions.token_ids_E)
        with pytest.raises(CorruptCacheError, match=rf"'output_projection' .*{sentence}.*a copy of the cache"):
            cache.sidecar("output_projection")
    (problem,) = verify_cache(tmp_path).problems
    assert "output_projection" in problem


def test_a_repair_takes_a_damaged_sidecar_out_unless_features_need_it(tmp_path):
    writer = finished(tmp_path / "c")
    for name in ("output_projection", "activation_statistics"):
        info = writer.add_sidecar(name, {name: np.ones(4)})
    (tmp_path / "c" / paths.sidecar_name(info.sha256)).write_bytes(b"")
    repair = repair_cache(tmp_path / "c")
    assert [damage.name for damage in repair.damage] == [paths.sidecar_name(info.sha256)]
    assert [sidecar.name for sidecar in repair.manifest.sidecars] == ["output_projection"]
    assert verify_cache(tmp_path / "c").problems == []
    assert repair_cache(tmp_path / "c").damage == ()
    assert writer.add_sidecar(info.name, {info.name: np.ones(4)}) == info  # the same capture puts it back
    fits = fitted([UNFITTED["channels"]])
    manifest = make_feature_cache(tmp_path / "f", [record_with(1, fits)], fits)
    (tmp_path / "f" / paths.sidecar_name(manifest.sidecars[0].sha256)).unlink()
    with pytest.raises(CorruptCacheError, match=r"'scale:channels' is missing.*All else is repaired"):
        repair_cache(tmp_path / "f")
    with open_cache(tmp_path / "f") as cache, pytest.raises(CorruptCacheError, match="'scale:channels' is missing"):
        cache[0]
    assert any("'scale:channels' is missing" in problem for problem in verify_cache(tmp_path / "f").problems)


def forged(header: bytes, numbers: bytes = b"\0" * 16) -> bytes:
    return len(header).to_bytes(8, "little") + header + numbers


HOSTILE = {
    "no header": b"\0\0",
    "a header without end": (2**62).to_bytes(8, "little") + b"{}",
    "not JSON": forged(b"[1,"),
    "not an object": forged(b"[1]"),
    "a tensor outside": forged(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}'),
    "a tensor before": forged(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[-8,8]}}'),
    "a size that is not its own": forged(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}'),
    "another shape": forged(b'{"x":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'),
    "another dtype": forged(b'{"x":{"dtype":"I32","shape":[4],"data_offsets":[0,16]}}'),
    "nothing": forged(b"{}"),
    "one more": forged(
        b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"y":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_with_the_right_digest_is_refused(name):
    info = make_sidecar("x", {"x": np.zeros(4, np.float32)}).info
    with pytest.raises(CorruptCacheError, match=r"^here: "):
        parse_sidecar(HOSTILE[name], info, "here")


def with_claims(**changes: object) -> bytes:
    manifest = make_manifest(1, make_identity("packed"))
    info = make_sidecar("x", {"x": np.zeros(4, np.float32)}).info
    return manifest_to_json(msgspec.structs.replace(manifest, sidecars=(msgspec.structs.replace(info, **changes),)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "../x"}, r"a sidecar has the name '\.\./x'"),
        ({"sha256": "0" * 63}, "SHA-256"),
        ({"num_bytes": -1}, "num_bytes of sidecar 'x' is -1"),
        ({"num_bytes": 3}, "the bytes of the tensors of sidecar 'x' is 16"),
    ],
)
def test_claims_out_of_range_are_refused_when_the_manifest_is_parsed(changes, sentence):
    with pytest.raises(CorruptCacheError, match=sentence):
        manifest_from_json(with_claims(**changes), where="here")
    assert manifest_from_json(with_claims(), where="here").sidecars


def test_arrays_that_no_tool_would_know_are_refused():
    with pytest.raises(FormatError, match="tensor 'x' of a sidecar is complex128"):
        make_sidecar("x", {"x": np.zeros(2, np.complex128)})
    with pytest.raises(FormatError, match="a sidecar has the name 'a b'"):
        make_sidecar("a b", {})
