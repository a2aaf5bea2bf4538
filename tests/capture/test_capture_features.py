"""Hidden states of named layers, from the config to what is read back: within the bound, or refused in words beforehand."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from capture_cases import make_config, write_config

import kdcache
from kdcache.capture.estimate import estimate_capture
from kdcache.capture.executors.run import run_capture
from kdcache.cli.main import main
from kdcache.codec.features.columns import feature_fields
from kdcache.codec.features.vectors import bytes_per_vector
from kdcache.config.capture import CaptureConfig, FeatureConfig, TeacherConfig
from kdcache.config.load import convert_config
from kdcache.errors import CaptureError, ConfigError, MismatchError, TeacherError
from kdcache.format.feature_positions import num_vectors
from kdcache.store.verify import verify_cache
from kdcache.teacher.fake import FAKE_HIDDEN, FakeTeacher
from kdcache.teacher.features import HiddenShape, pooled, resolve_features, stated_shape

FEATURES = [
    {"layer": -1},
    {"layer": 2, "dtype": "int8"},
    {"layer": 0, "dtype": "int8", "pooling": "mean", "name": "start"},
    {"layer": 2, "pooling": "last"},
]
NAMES = ["hidden_last", "hidden_2", "start", "hidden_2_last"]


def config_with(tmp_path, features=FEATURES, **sections):
    config = make_config(tmp_path, **sections)
    return convert_config(
        json.loads(write_config(config, tmp_path / "c.yaml").read_text()) | {"features": features}, CaptureConfig
    )


def bound(expected_RH, dtype):
    """(R, H) the most that a stored number may be off."""
    if dtype == "float16":
        return np.maximum(np.abs(expected_RH) * 2.0**-11, 2.0**-25)
    return np.broadcast_to(np.abs(expected_RH).max(axis=-1, keepdims=True) / 254 * (1 + 1e-5), expected_RH.shape)


def test_features_of_a_capture_are_the_teachers_within_their_bounds(tmp_path, capsys):
    config = config_with(tmp_path)
    manifest = run_capture(config).manifest
    assert verify_cache(tmp_path / "cache").problems == []
    infos = {feature.name: feature for feature in manifest.identity.features}
    assert list(infos) == NAMES
    assert [feature.layer for feature in infos.values()] == [-1, 2, 0, 2]
    teacher = FakeTeacher(config.teacher)
    with kdcache.open(tmp_path / "cache") as cache:
        for record in (cache[n] for n in range(len(cache))):
            for name, info in infos.items():
                rows_NH = teacher.hidden_states(record.sequence, info.layer)[record.sequence.supervised_N].astype(np.float64)
                expected_RH = {"none": rows_NH, "mean": rows_NH.mean(axis=0)[None], "last": rows_NH[-1:]}[info.pooling]
                found_RH = record.distributions.features[name]
                assert found_RH.shape == expected_RH.shape
                assert (np.abs(found_RH - expected_RH) <= bound(expected_RH, info.dtype) + 1e-6).all()
    assert main(["info", str(tmp_path / "cache")]) == 0
    shown = capsys.readouterr().out
    assert (
        "feature hidden_last    the last layer after the final norm, 16 x float16 (off by at most |x| 2^-11), a vector" in shown
    )
    assert (
        "layer 0, 16 x int8 (off by at most 1/254 of a vector's largest magnitude), the mean of a sequence's positions" in shown
    )


def test_a_dry_run_says_what_each_feature_takes_and_adds_it_up(tmp_path, capsys):
    config = config_with(tmp_path)
    estimate, bare = estimate_capture(config), estimate_capture(config_with(tmp_path, []))
    assert [(e.feature.name, e.bytes_per_vector, e.per) for e in estimate.features] == [
        ("hidden_last", 32, "position"), ("hidden_2", 20, "position"),
        ("start", 20, "sequence"), ("hidden_2_last", 32, "sequence"),
    ]  # fmt: skip
    assert estimate.num_bytes == bare.num_bytes + sum(e.num_bytes for e in estimate.features)
    assert main(["capture", str(write_config(config, tmp_path / "c.yaml")), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "32 bytes per position" in shown
    assert "20 bytes per sequence" in shown
    assert "layer 0, 16 x int8, the mean of a sequence's positions" in shown
    assert not (tmp_path / "cache").exists()
    manifest = run_capture(config).manifest
    stored = sum(column for s in manifest.shards for name, column in s.column_bytes.items() if name.startswith("feature:"))
    assert sum(e.num_bytes for e in estimate.features) == pytest.approx(stored, rel=0.15)
    for feature in manifest.identity.features:
        num_rows = manifest.total("num_positions" if feature.pooling == "none" else "num_sequences")
        in_columns = sum(s.column_bytes[field.name] for s in manifest.shards for field in feature_fields([feature]))
        assert in_columns >= num_rows * bytes_per_vector(feature)
    assert estimate_capture(config, probe=True).num_bytes >= sum(e.num_bytes for e in estimate.features)


def test_going_on_with_other_features_is_refused_with_the_difference(tmp_path, monkeypatch):
    run_capture(config_with(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(FakeTeacher, "__init__", None)  # all is there: the teacher is not loaded
        assert run_capture(config_with(tmp_path)).num_units_captured == 0
    with pytest.raises(MismatchError, match=r"features\.[a-z_0-9]+\.dtype: 'int8' != 'float16'"):
        run_capture(config_with(tmp_path, [FEATURES[0], FEATURES[1] | {"dtype": "float16"}, *FEATURES[2:]]))
    with pytest.raises(MismatchError, match="features"):
        run_capture(config_with(tmp_path, []))


def test_a_dry_run_adds_the_sidecars_that_are_asked_for(tmp_path, capsys):
    config, bare = (config_with(tmp_path, [], sidecars=sidecars) for sidecars in (["output_projection"], []))
    found = estimate_capture(config)
    assert found.output_projection_bytes == 262 * 16 * 2  # of the fake teacher, at two bytes a number
    assert found.num_bytes == estimate_capture(bare).num_bytes + found.output_projection_bytes
    assert main(["capture", str(write_config(config, tmp_path / "c.yaml")), "--dry-run"]) == 0
    assert re.search(r"output_projection +about 8\.38 kB, once", capsys.readouterr().out)


def test_a_dry_run_counts_the_vectors_of_every_grid_and_what_is_kept_once(tmp_path, capsys):
    features = [
        {"layer": -1, "positions": "all", "dtype": "bfloat16"},
        {"layer": 2, "stride": 4, "offset": 1, "dtype": "int8", "scale": "channel"},
        {"layer": 3, "max_positions": 3, "projection": {"kind": "random", "size": 5}},
        {"layer": 1, "dtype": "int8", "projection": {"kind": "pca", "size": 6}},
        {"kind": "attention", "layer": 2, "top_keys": 2},
    ]
    config = config_with(tmp_path, features)
    whole = estimate_capture(config)
    estimate = {found.feature.name: found for found in whole.features}
    assert {name: (found.bytes_per_vector, found.sidecar_bytes) for name, found in estimate.items()} == {
        "hidden_last": (32, 0),
        "hidden_2": (20, 8 * 16),
        "hidden_3": (10, 0),
        "hidden_1": (10, 4 * (6 * 17 + 16)),
        "attention_2": (32, 0),
    }
    assert estimate["hidden_last"].num_vectors == whole.num_tokens
    assert estimate["hidden_2"].num_vectors == pytest.approx(whole.num_positions / 4, rel=0.2)
    assert estimate["hidden_3"].num_vectors <= 3 * whole.num_sequences
    assert main(["capture", str(write_config(config, tmp_path / "c.yaml")), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"hidden_2 +20 bytes per vector, \d\.\d per position, .* and 128 bytes once: .*one in 4", shown)
    assert "at most 3 of a sequence" in shown
    assert re.search(r"attention_2 +32 bytes per position", shown)


@pytest.mark.parametrize(
    ("features", "teacher", "sentence"),
    [
        ([{"layer": 5}], {}, r"'hidden_5' is of layer 5, but the teacher has layers 0 .* to 4 .*; -1 is after the final norm"),
        ([{"layer": -2}], {}, r"features\[0\]\.layer: expected a whole number >= -1, got -2"),
        ([{"layer": 1}, {"layer": 1, "dtype": "int8"}], {}, "two have the name 'hidden_1'"),
        ([{"layer": 1, "name": "a-b"}], {}, "'a-b', but a column's name has letters, digits and underscores only"),
        (
            [{"layer": 1, "dtype": "int4"}],
            {},
            r"features\[0\]\.dtype: expected one of 'float16', 'bfloat16', 'int8', got 'int4'",
        ),
        ([{"layer": 1, "pool": "mean"}], {}, r"features\[0\]\.pool: no such field; did you mean features\[0\]\.pooling\?"),
        ([{"layer": 1}], {"backend": "served", "server": {"url": "http://x/v1"}}, "a server gives no hidden states"),
        ([{"layer": 1}], {"backend": "vllm", "vllm": {"route": "public"}}, "public route gives no hidden states"),
        ([{"layer": 1}], {"backend": "vllm", "model": "no/such"}, r"config\.json of 'no/such' cannot be read before"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_spent(tmp_path, features, teacher, sentence):
    with pytest.raises(ConfigError, match=sentence):
        estimate_capture(config_with(tmp_path, features, teacher={"tokenizer": "fake", "fake": {}} | teacher))
    assert not (tmp_path / "cache").exists()


def test_a_layer_that_is_not_there_is_refused_by_a_capture_too(tmp_path):
    with pytest.raises(ConfigError, match=r"layers 0 .* to 4"):
        run_capture(config_with(tmp_path, [{"layer": 5}]))
    assert not (tmp_path / "cache").exists()


def test_states_that_do_not_fit_float16_are_said_by_name(tmp_path, monkeypatch):
    states = FakeTeacher.hidden_states
    monkeypatch.setattr(FakeTeacher, "hidden_states", lambda self, *given: states(self, *given) * np.float32(10_000))
    with pytest.raises(
        (CaptureError, TeacherError),
        match=r"a\.txt:1.*'hidden_last' has a value of .*float16 ends at 65504: use bfloat16 or int8",
    ):
        run_capture(config_with(tmp_path, [{"layer": -1}], run={"retries": 0}))
    run_capture(config_with(tmp_path, [{"layer": -1, "dtype": "int8"}], out=str(tmp_path / "other")))


def test_the_models_config_says_the_shape_also_where_its_names_are_others(tmp_path):
    def shape(fields, **options):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return stated_shape(TeacherConfig(model=str(tmp_path), engine_options=options))

    llama = {"hidden_size": 64, "num_hidden_layers": 2}
    assert shape(llama) == HiddenShape(2, 64)
    assert shape({"n_embd": 8, "n_layer": 3}) == HiddenShape(3, 8)
    assert shape({"hidden_size": 7, "text_config": llama}) == HiddenShape(2, 64)
    assert shape(llama, hf_overrides={"num_hidden_layers": 1}) == HiddenShape(1, 64)
    assert shape({}) is None


def test_a_sequence_without_supervised_positions_pools_to_zeros():
    for pooling in ("mean", "last"):
        np.testing.assert_array_equal(pooled(np.empty((0, 3), np.float32), pooling), np.zeros((1, 3), np.float32))
    (feature,) = resolve_features([FeatureConfig(layer=-1)], FAKE_HIDDEN)
    assert (feature.layer, feature.size, num_vectors(feature, np.ones(7, bool))) == (-1, 16, 7)


REAL = [{"layer": -1}, {"layer": 1, "dtype": "int8"}, {"layer": 0, "pooling": "mean"}]


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("transformers", marks=pytest.mark.slow),
        pytest.param("vllm", marks=[pytest.mark.slow, pytest.mark.vllm]),
    ],
)
def test_features_of_a_real_model_are_captured_verified_and_read_back_within_their_bounds(
    tmp_path, backend, tiny_model_dir, capsys
):
    pytest.importorskip(backend)
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    teacher = {"model": str(tiny_model_dir), "backend": backend, "dtype": "float32", "tokens_per_forward": 64}
    lines = [f"def line_{n}(x): return x + {n}" for n in range(9)]
    # Written anew: in the fake's config the vocabulary is the fake's.
    fields = json.loads(write_config(make_config(tmp_path, lines), tmp_path / "c.yaml").read_text())
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(fields | {"teacher": teacher, "features": REAL}))
    assert main(["capture", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "hidden_last    128 bytes per position" in shown
    assert "hidden_1       68 bytes per position" in shown
    assert "hidden_0_mean  128 bytes per sequence" in shown
    assert main(["capture", str(path)]) == 0
    assert main(["verify", str(tmp_path / "cache")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    with kdcache.open(tmp_path / "cache") as cache, torch.inference_mode():
        for record in (cache[n] for n in range(len(cache))):
            ids_1N = torch.from_numpy(record.sequence.input_ids_N.astype(np.int64))[None]
            states = [state[0].numpy() for state in model(input_ids=ids_1N, output_hidden_states=True).hidden_states]
            expected = {"hidden_last": states[2], "hidden_1": states[1], "hidden_0_mean": states[0].mean(axis=0)[None]}
            for name, dtype in (("hidden_last", "float16"), ("hidden_1", "int8"), ("hidden_0_mean", "float16")):
                found_RH = record.distributions.features[name]
                assert (np.abs(found_RH - expected[name]) <= bound(expected[name], dtype) + 1e-4).all()


def test_features_of_what_the_teacher_wrote_are_those_of_its_answers(tmp_path):
    config = config_with(tmp_path, FEATURES[:1], generate={"max_tokens": 5}, teacher={"fake": {"vocab_size": 400}})
    run_capture(config)
    teacher = FakeTeacher(config.teacher)
    with kdcache.open(tmp_path / "cache") as cache:
        for record in (cache[n] for n in range(len(cache))):
            rows_NH = teacher.hidden_states(record.sequence, -1)[record.sequence.supervised_N]
            found_NH = record.distributions.features["hidden_last"]
            assert 1 <= len(found_NH) <= 5
            assert (np.abs(found_NH - rows_NH) <= bound(rows_NH, "float16")).all()
