"""A capture by a real model and its own tokenizer: the same promises as with the fake."""

import shutil

import pytest

import kdcache
from kdcache.capture.executors.run import run_capture
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.errors import MismatchError, TeacherError
from kdcache.store.verify import verify_cache

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path, tiny_model_dir):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "a.txt").write_text("".join(f"def line_{n}(x):\n    return x + {n}\n\n" for n in range(40)))
    return make_config(tmp_path)


def make_config(tmp_path, **teacher):
    fields = {
        "input": {"format": "txt", "paths": [str(tmp_path / "a.txt")], "window": {"size": 32, "overlap": 4}},
        "teacher": {"model": str(tmp_path / "model"), "backend": "transformers", "num_threads": 1} | teacher,
        "selection": {"k": 8},
        "out": str(tmp_path / "cache"),
    }
    return convert_config(fields, CaptureConfig)


def test_the_cache_of_a_real_model_is_sound_and_is_not_captured_again(tmp_path, config):
    summary = run_capture(config)
    report = verify_cache(tmp_path / "cache")
    assert report.problems == []
    assert report.num_positions == summary.manifest.total("num_positions") > 0
    assert summary.manifest.identity.teacher.engine == "transformers"
    assert "transformers" in summary.manifest.versions
    assert run_capture(config).num_units_captured == 0


def test_weights_that_have_changed_in_the_same_folder_are_noticed(tmp_path, config):
    import torch
    from transformers import AutoModelForCausalLM

    run_capture(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(MismatchError, match=r"holds another capture .*teacher\.weights_digest"):
        run_capture(config)
    with kdcache.open(tmp_path / "cache") as reader:
        assert reader.manifest.is_complete


def test_a_model_that_does_not_load_is_named_and_nothing_is_written(tmp_path, config):
    with pytest.raises(TeacherError, match="nowhere"):
        run_capture(make_config(tmp_path, model=str(tmp_path / "nowhere")))
    assert not (tmp_path / "cache").exists()
