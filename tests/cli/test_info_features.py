"""What `kdcache info` says of features and sidecars of every kind, and `kdcache verify` and `repair` of a damaged one."""

from __future__ import annotations

import numpy as np
from cache_making import make_identity, make_manifest
from feature_making import ALL_KINDS, fitted, make_feature_cache, record_with

from kdcache.cli.main import main
from kdcache.format import paths
from kdcache.format.sidecar import make_sidecar
from kdcache.store.writing.writer import CacheWriter


def test_each_feature_and_sidecar_has_a_line(tmp_path, capsys):
    fits = fitted(ALL_KINDS)
    make_feature_cache(tmp_path / "c", [record_with(1, fits)], fits)
    assert main(["info", str(tmp_path / "c")]) == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "layer 4 (the last, before the final norm), 12 x bfloat16" in lines["feature brain"]
    assert "after the final norm, 12 x int8" in lines["feature strided"]
    assert "one in 3" in lines["feature strided"]
    assert "at most 4 of a sequence" in lines["feature few"]
    assert "with a scale per channel (off by at most 1/254 of the channel's range" in lines["feature channels"]
    assert "(pca of 12, which drops 0." in lines["feature small"]
    assert "(random of 12)" in lines["feature mixed"]
    assert "attention of layer 2, 3 keys per head" in lines["feature attention_2"]
    assert "basis F32 5 x 12, center F32 12, variances F32 5, " in lines["sidecar pca:small"]
    assert "mean F32 12, scale F32 12" in lines["sidecar scale:channels"]


def test_a_damaged_sidecar_is_said_and_set_aside(tmp_path, capsys):
    sidecar = make_sidecar("output_projection", {"weight": np.ones((3, 2), np.float32)})
    CacheWriter.open(tmp_path / "c", make_manifest(0, make_identity()), sidecars=[sidecar])
    assert main(["verify", str(tmp_path / "c")]) == 0
    (tmp_path / "c" / paths.sidecar_name(sidecar.info.sha256)).write_bytes(b"x")
    assert main(["verify", str(tmp_path / "c")]) == 1
    assert "'output_projection'" in "".join(capsys.readouterr())
    assert main(["repair", str(tmp_path / "c")]) == 1
    assert "output_projection" in "".join(capsys.readouterr())
    assert main(["verify", str(tmp_path / "c")]) == 0
