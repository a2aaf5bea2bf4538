"""What a capture makes once, before its first unit: fits of features and sidecars, the same for all workers and resumes."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from capture_cases import make_config, write_config

import kdcache
from kdcache.capture import once
from kdcache.capture.executors.run import run_capture
from kdcache.cli.main import main
from kdcache.codec.features.projection import project_features
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.errors import ConfigError
from kdcache.format.feature_positions import feature_positions
from kdcache.format.output_projection import OutputProjection
from kdcache.store.files import fs
from kdcache.store.states_proof import prove_states
from kdcache.store.verify import verify_cache
from kdcache.teacher.fake import FakeTeacher

FEATURES = [
    {"layer": -1, "projection": {"kind": "pca", "size": 4}, "dtype": "int8", "scale": "channel"},
    {"layer": 2, "dtype": "int8", "scale": "channel", "positions": "all", "stride": 2},
    {"layer": 3, "kind": "queries", "projection": {"kind": "random", "size": 6}, "dtype": "bfloat16"},
    {"layer": 1, "kind": "attention", "top_keys": 3},
]


def config_in(folder: Path, **changes):
    """Into folder/cache; the input is the same for all folders next to it, so that shards are comparable byte for byte."""
    folder.mkdir(exist_ok=True)
    return make_config(folder.parent, **{"features": FEATURES, "out": str(folder / "cache")} | changes)


def contents(cache: Path) -> dict[str, bytes]:
    """Shards and sidecars, whose names are digests of their content."""
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for d in ("data", "sidecars") for p in (cache / d).iterdir()}


def test_what_is_stored_is_the_projection_of_what_the_teacher_gives(tmp_path):
    config = config_in(tmp_path)
    manifest = run_capture(config).manifest
    assert verify_cache(tmp_path / "cache").problems == []
    assert {sidecar.name for sidecar in manifest.sidecars} == {"pca:hidden_last", "scale:hidden_last", "scale:hidden_2"}
    pca, _, queries, _ = manifest.identity.features
    assert pca.projection is not None
    assert 0 < (pca.projection.dropped or 0) < 1
    teacher = FakeTeacher(config.teacher)
    with kdcache.open(tmp_path / "cache") as cache:
        constants = cache.reader.constants()
        for record in (cache[n] for n in range(len(cache))):
            sequence, found = record.sequence, record.distributions.features
            whole = {
                "hidden_last": teacher.hidden_states(sequence, -1)[feature_positions(pca, sequence.supervised_N)],
                "queries_3": teacher.head_states(sequence, "queries", 3).reshape(-1, 16)[sequence.supervised_N],
            }
            kept = project_features([pca, queries], constants, whole)
            scales = constants["hidden_last"].scale_H
            assert scales is not None
            assert (np.abs(found["hidden_last"] - kept["hidden_last"]) <= scales / 100).all()
            np.testing.assert_allclose(found["queries_3"], kept["queries_3"], rtol=2**-7)
            strided = teacher.hidden_states(sequence, 2)[::2]
            assert found["hidden_2"].shape == strided.shape
            assert np.abs(found["hidden_2"] - strided).max() < 0.1
            maps_hPN = teacher.attention(sequence, 1)[:, sequence.supervised_N]
            assert found["attention_1"].shape == (maps_hPN.shape[1], 4 * 3)
            np.testing.assert_allclose(found["attention_1"][:, 0], maps_hPN[0].max(axis=-1), rtol=2**-10)


def test_ranks_and_resumes_take_the_fit_of_whoever_was_first(tmp_path, monkeypatch):
    run_capture(config_in(tmp_path / "one"))
    for rank in (2, 0, 1):
        run_capture(config_in(tmp_path / "ranks", run={"rank": rank, "world_size": 3}))
    assert contents(tmp_path / "one" / "cache") == contents(tmp_path / "ranks" / "cache")
    # A worker whose sample differs in its last bits, and who was not first.
    config = config_in(tmp_path / "late")
    shutil.copytree(tmp_path / "one" / "cache" / "manifests", tmp_path / "late" / "cache" / "manifests")
    shutil.copytree(tmp_path / "one" / "cache" / "sidecars", tmp_path / "late" / "cache" / "sidecars")
    for manifest in sorted((tmp_path / "late" / "cache" / "manifests").iterdir())[1:]:
        manifest.unlink()
    monkeypatch.setattr(once, "fitted_features", None)  # not asked: a manifest is there
    run_capture(config)
    assert contents(tmp_path / "late" / "cache") == contents(tmp_path / "one" / "cache")


def test_two_that_fit_at_once_store_by_one_fit(tmp_path, monkeypatch):
    """The other worker starts the cache while this one is fitting, with another fit."""
    config, fit = config_in(tmp_path), once.fitted_features

    def slower(*given):
        mine = fit(*given)
        with monkeypatch.context() as patch:
            patch.setattr(once, "SAMPLE_VECTORS", 40)  # another sample: another fit
            patch.setattr(once, "fitted_features", fit)
            run_capture(config_in(tmp_path, run={"rank": 1, "world_size": 2}))
        return mine

    monkeypatch.setattr(once, "fitted_features", slower)
    run_capture(config_in(tmp_path, run={"rank": 0, "world_size": 2}))
    report = verify_cache(tmp_path / "cache")
    assert report.problems == []
    assert report.manifest.is_complete
    teacher = FakeTeacher(config.teacher)
    with kdcache.open(tmp_path / "cache") as cache:
        for record in (cache[n] for n in range(len(cache))):
            expected = teacher.hidden_states(record.sequence, 2)[::2]
            assert np.abs(record.distributions.features["hidden_2"] - expected).max() < 0.2


def in_a_fork(config, reached) -> int:
    """Capture in a process that dies when `reached` says so; its exit status."""
    child = os.fork()
    if child == 0:
        fs.reached = reached
        try:
            run_capture(config)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_anywhere_before_the_first_unit_changes_nothing(tmp_path):
    run_capture(config_in(tmp_path / "whole"))
    expected = contents(tmp_path / "whole" / "cache")
    points: list[str] = []
    harmless = fs.reached
    fs.reached = points.append
    try:
        run_capture(config_in(tmp_path / "points"))
    finally:
        fs.reached = harmless
    last = points.index("journal published")
    chosen = [at for at in range(last) if points[at] in ("sidecar published", "linked", "renamed", "temp file synced")]
    for number, at in enumerate(chosen[:12]):
        left = Counter({"steps": at})

        def reached(_name, left=left):
            left["steps"] -= 1
            if left["steps"] < 0:
                os._exit(9)

        config = config_in(tmp_path / f"killed{number}")
        assert in_a_fork(config, reached) == 9
        run_capture(config)
        assert contents(tmp_path / f"killed{number}" / "cache") == expected


def test_sidecars_that_cannot_be_had_are_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match=r"the fake teacher gives no output_projection; use teacher\.backend transformers"):
        run_capture(config_in(tmp_path, sidecars=["output_projection"]))
    with pytest.raises(ConfigError, match=r"sidecars: one is named twice"):
        config_in(tmp_path, sidecars=["output_projection", "output_projection"])
    served = {"backend": "served", "model": "x", "server": {"url": "http://x/v1"}}
    with pytest.raises(ConfigError, match=r"sidecars: a server gives no weights"):
        convert_config(
            {"input": {"format": "lines", "paths": ["a"]}, "teacher": served, "out": "x", "sidecars": ["output_projection"]},
            CaptureConfig,
        )
    assert not (tmp_path / "cache" / "manifests").exists()


def test_features_that_need_more_text_than_there_is_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'hidden_last_mean' needs more than 8 vectors, its projection\.size"):
        run_capture(make_config(tmp_path, ["a", "b"], features=[
            {"layer": -1, "pooling": "mean", "projection": {"kind": "pca", "size": 8}}
        ]))  # fmt: skip


@pytest.fixture
def real_config(tmp_path, tiny_model_dir):
    pytest.importorskip("transformers")

    def make(**changes):
        lines = [f"def line_{n}(x): return x + {n}" for n in range(12)]
        config = make_config(tmp_path, lines, **{"features": [{"layer": -1}]} | changes)
        path = write_config(config, tmp_path / "c.yaml")
        import json

        fields = json.loads(path.read_text())
        fields["teacher"] = {"model": str(tiny_model_dir), "backend": "transformers", "dtype": "float32"}
        path.write_text(json.dumps(fields))
        return path

    return make


@pytest.mark.parametrize(
    "feature", [{}, {"dtype": "bfloat16"}, {"dtype": "int8"}, {"dtype": "int8", "scale": "channel"}, {"stride": 2}]
)
def test_states_and_projection_make_the_entries_again_at_their_own_positions_only(tmp_path, real_config, capsys, feature):
    changes = {"features": [{"layer": -1, **feature}], "sidecars": ["output_projection"]}
    path = real_config(selection={"kind": "threshold", "tau": 0.05, "k": None}, codec={"id": "archive"}, **changes)
    assert main(["capture", str(path)]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "cache")]) == 0
    assert "states  hidden_last through the output projection gives logprobs" in capsys.readouterr().out
    with kdcache.open(tmp_path / "cache") as cache:
        proof = prove_states(cache.reader)
        assert proof is not None
        assert proof.problem is None
        assert proof.difference < proof.allowed < 0.2
        assert proof.moved > 10 * proof.difference
        # The states of the position before, as a teacher that is off by one would give them.
        whole = type(cache.reader).__getitem__

        def late(self, index):
            record = whole(self, index)
            features = {name: np.roll(values, 1, axis=0) for name, values in record.distributions.features.items()}
            return replace(record, distributions=replace(record.distributions, features=features))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(cache.reader), "__getitem__", late)
            off = prove_states(cache.reader)
        assert off is not None
        assert "they do not belong to them" in (off.problem or "")


def test_sidecars_of_a_real_model_come_with_the_cache_or_later(tmp_path, real_config):
    assert main(["capture", str(real_config(sidecars=["output_projection"]))]) == 0
    with kdcache.open(tmp_path / "cache") as cache:
        assert [sidecar.name for sidecar in cache.manifest.sidecars] == ["output_projection"]
        projection = OutputProjection.from_arrays(cache.sidecar("output_projection"))
        assert projection.weight_VH.shape == (520, 64)
        assert projection.norm is not None
        for record in (cache[n] for n in range(len(cache))):
            logits_PV = projection.logits(record.distributions.features["hidden_last"]).astype(np.float64)
            logprobs_PV = logits_PV - np.log(np.exp(logits_PV).sum(axis=-1, keepdims=True))
            ids_PK, stored_PK = record.distributions.padded()
            found_PK = np.take_along_axis(logprobs_PV, ids_PK, axis=-1)
            np.testing.assert_allclose(found_PK, stored_PK, atol=0.02)  # states are float16
    shards = contents(tmp_path / "cache")
    # Asked for later: the teacher is loaded again, nothing is captured again.
    assert main(["capture", str(real_config(sidecars=["output_projection", "activation_statistics"]))]) == 0
    with kdcache.open(tmp_path / "cache") as cache:
        statistics = cache.sidecar("activation_statistics")
        assert int(statistics["num_sequences"][0]) == 12
        assert statistics["block_influence"].shape == (2,)
    assert {name for name in contents(tmp_path / "cache") if name not in shards} == {
        f"sidecars/{p.name}" for p in (tmp_path / "cache" / "sidecars").iterdir() if f"sidecars/{p.name}" not in shards
    }
    assert verify_cache(tmp_path / "cache").problems == []
