"""A config file gives a config, or one sentence that names the field, its value and what it may be."""

from pathlib import Path

import pytest

from kdcache.config.capture import CaptureConfig, TeacherConfig
from kdcache.config.describe import type_at
from kdcache.config.load import config_to_builtins, convert_config, load_config
from kdcache.config.renamed import RENAMED
from kdcache.config.train import TrainConfig
from kdcache.errors import ConfigError

GOOD = """
input: {format: txt, paths: [a.txt]}
teacher: {model: m, backend: fake}
out: out
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), CaptureConfig, overrides)
    return str(caught.value)


def test_a_file_becomes_a_config_with_defaults(tmp_path):
    config = load_config(write(tmp_path, GOOD), CaptureConfig)
    assert config.input.paths == ("a.txt",)
    assert (config.selection.kind, config.selection.params, config.codec_id) == ("threshold", {"tau": 0.04}, "archive")
    assert convert_config(config_to_builtins(config), CaptureConfig) == config


def test_overrides_are_yaml_and_make_sections(tmp_path):
    overrides = [
        "selection.k=8",
        "teacher.backend=vllm",
        "input.paths=[b.txt, c.txt]",
        "input.window.size=16",
        "input.limit=null",
        "teacher.vllm.gpu_memory_utilization=5e-1",
        "teacher.engine_options.enforce_eager=true",
    ]
    config = load_config(write(tmp_path, GOOD), CaptureConfig, overrides)
    assert (config.selection.kind, config.selection.params, config.codec_id) == ("top_k", {"k": 8}, "packed")
    assert config.input.paths == ("b.txt", "c.txt")
    assert config.input.window.size == 16
    assert config.input.limit is None
    assert config.teacher.vllm.gpu_memory_utilization == 0.5
    assert config.teacher.engine_options == {"enforce_eager": True}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("selection: {topk: 3}", "selection.topk: no such field"),
        ("selecton: {k: 3}", "selecton: no such field; did you mean selection?"),
        ("selection: {k: lots}", "selection.k: expected a whole number or null, got 'lots'"),
        ("selection: {kind: threshold, k: 3}", "selection: k=3 given, but kind 'threshold' takes tau; set the kind that"),
        ("selection: {tau: 0.1, k: 3}", "selection: tau=0.1 and k=3 given, but kind 'auto' takes the parameters of one kind;"),
        ("selection: {k: 0}", "selection.k: expected a whole number >= 1, got 0"),
        ("selection: {k: 2.5}", "selection.k: expected a whole number or null, got 2.5"),
        ("run: {executor: slurm}", "run.executor: expected one of 'local', 'ray', got 'slurm'"),
        ("selection:", "selection: expected a section (a mapping), got null"),
        ("codec: [raw]", "codec: expected a section (a mapping), got ['raw']"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_it_may_be(tmp_path, change, sentence):
    message = refusal(tmp_path, GOOD + change)
    assert sentence in message
    assert message.startswith(str(tmp_path / "c.yaml") + ": ")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("selection.kk=3", "selection.kk: no such field; did you mean selection.k?"),
        ("input.windw.size=3", "input.windw: no such field; did you mean input.window?"),
        ("input.limit.x=3", "input.limit is a value and not a section"),
        ("input.window=3", "input.window is a section"),
        ("selection.k", "expected section.field=value, as in input.limit=100"),
        ("=3", "expected section.field=value, as in input.limit=100"),
        ("selection.k=[", "selection.k:1: not YAML"),
        ("input.window.overlap=5000", "input.window: overlap is 5000, but must be smaller than size, 1024"),
        ("input.paths=a.txt", "input.paths: expected a list, got 'a.txt'"),
        ("input.paths=[1]", "input.paths[0]: expected text, got 1"),
        ("teacher.engine_options={a: [1]}", "teacher.engine_options[...]: expected"),
        ("input.streaming=true", "neither `dataset` nor `streaming`"),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, sentence):
    assert sentence in refusal(tmp_path, GOOD, override)


@pytest.mark.parametrize(
    ("old", "path", "now"),
    [
        ("output: {path: x, unit_items: 3}", "output.path", "out"),
        ("output: {unit_items: 3}", "output.unit_items", "shards.unit_items"),
        ("run: {skip_poison: true}", "run.skip_poison", "run.skip_failing"),
        ("run: {remote: {options: {anon: true}}}", "run.remote.options.anon", "remote.options.anon"),
    ],
)
def test_a_key_under_its_old_name_is_answered_with_the_new_one(tmp_path, old, path, now):
    assert f"{path}: no such field; it is now {now}" in refusal(tmp_path, GOOD + old)
    assert f"{path}: no such field; it is now {now}" in refusal(tmp_path, GOOD, f"{path}=3")


def test_a_missing_field_is_named(tmp_path):
    assert "teacher.model: missing, but required" in refusal(tmp_path, GOOD.replace("model: m, ", ""))
    assert "out: missing, but required" in refusal(tmp_path, GOOD.replace("out: out", ""))


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    message = refusal(tmp_path, GOOD + "selection:\n  k: 3\n  k: 4\n")
    assert "c.yaml:7" in message
    assert "'k' is given twice" in message


def test_files_that_hold_no_mapping_are_refused_in_a_sentence(tmp_path):
    assert "the file is empty" in refusal(tmp_path, "")
    assert "the file holds ['a']" in refusal(tmp_path, "- a")
    assert "c.yaml:1: not YAML" in refusal(tmp_path, "a: [")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "nowhere.yaml", CaptureConfig)
    with pytest.raises(ConfigError, match="a directory; expected a YAML file"):
        load_config(tmp_path, CaptureConfig)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: byte 0 is not UTF-8 text"):
        load_config(tmp_path / "binary.yaml", CaptureConfig)


def test_yaml_that_would_run_code_is_refused(tmp_path):
    assert "not YAML" in refusal(tmp_path, "input: !!python/object/apply:os.getcwd []")


@pytest.mark.parametrize("name", ["token", "hf_token"])
def test_a_secret_among_the_engines_options_is_refused_before_it_is_written_anywhere(name):
    with pytest.raises(ValueError, match="set HF_TOKEN in the environment"):
        TeacherConfig(model="some/model", engine_options={name: "hf_secret"})


def test_every_key_with_a_new_name_leads_to_a_field_that_exists():
    roots = [CaptureConfig, TrainConfig]
    for old, now in RENAMED.items():
        path = now.partition(":")[0].split(".")
        assert any(type_at(root, path) is not None for root in roots), now
        assert all(type_at(root, old.split(".")) is None for root in roots), old
