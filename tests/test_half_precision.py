"""Half precision where a CPU only emulates it: measured once, chosen against where the choice is ours, said where it is not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from kdcache import half_precision  # noqa: E402
from kdcache.config.teacher import TeacherConfig  # noqa: E402
from kdcache.teacher.vllm.options import stored_dtype  # noqa: E402


@pytest.fixture
def on_a_cpu_with(monkeypatch: pytest.MonkeyPatch):
    """Give what a CPU would measure."""

    def measure(**gains: float) -> None:
        half_precision._warn.cache_clear()
        monkeypatch.setattr(half_precision, "float32_gain", lambda dtype: gains[str(dtype).removeprefix("torch.")])

    return measure


def test_what_is_measured_is_the_time_of_products_and_leaves_the_threads_alone(monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    assert 0.01 < half_precision.float32_gain(torch.bfloat16) < 1000
    assert torch.get_num_threads() == threads
    seconds = {torch.bfloat16: 3e-3, torch.float16: 1e-4, torch.float32: 2e-4}
    monkeypatch.setattr(half_precision, "_seconds", seconds.get)
    half_precision.float32_gain.cache_clear()
    assert half_precision.float32_gain(torch.bfloat16) == pytest.approx(15)
    assert half_precision.is_emulated(torch.bfloat16)
    assert not half_precision.is_emulated(torch.bfloat16, "cuda")
    assert not half_precision.is_emulated(torch.float16)
    assert not half_precision.is_emulated(torch.float32)
    half_precision.float32_gain.cache_clear()


def test_one_warning_says_what_float32_would_gain(on_a_cpu_with, caplog: pytest.LogCaptureFixture):
    on_a_cpu_with(bfloat16=72.4, float16=1.2)
    for _ in range(2):
        half_precision.warn_if_emulated("bfloat16", "cpu")
    for dtype, device in (("bfloat16", "cuda"), ("float16", "cpu"), ("float32", "cpu"), ("", "cpu")):
        half_precision.warn_if_emulated(dtype, device)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "only emulates bfloat16: a matrix product of it takes 72 times as long as in float32" in message
    assert "`teacher.dtype: float32`" in message


def test_a_bfloat16_checkpoint_in_the_transformers_teacher_is_warned_of(
    on_a_cpu_with, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    if torch.cuda.is_available():
        pytest.skip("the model would be on a GPU")
    from kdcache.teacher.hf.load import load_checked

    on_a_cpu_with(bfloat16=50.0, float16=1.0)
    with caplog.at_level(logging.WARNING, logger="kdcache"):
        load_checked(TeacherConfig(model=str(tiny_model_dir), backend="transformers"))
        assert "emulates" not in caplog.text
        load_checked(TeacherConfig(model=str(tiny_model_dir), backend="transformers", dtype="bfloat16"))
    assert "only emulates bfloat16" in caplog.text


def test_the_dtype_of_a_checkpoint_is_found_before_vllm_starts():
    assert stored_dtype({"torch_dtype": "bfloat16"}) == "bfloat16"
    assert stored_dtype({"text_config": {"dtype": "torch.float16"}}) == "float16"
    assert stored_dtype({}) == ""
