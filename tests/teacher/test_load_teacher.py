from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kdcache.config.capture import TeacherConfig
from kdcache.errors import ConfigError, MissingDependencyError
from kdcache.teacher import BACKENDS, find_backend, load_teacher, load_tokenizer
from kdcache.teacher.vllm.options import cpu_cache_bytes, engine_options, kv_bytes_per_token

LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "dtype": "float32"}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_naming_a_backend_loads_nothing_else():
    code = """
import sys
from kdcache.config.capture import TeacherConfig
import kdcache.teacher
assert "numpy" not in sys.modules
kdcache.teacher.load_teacher(TeacherConfig(model="fake", backend="fake"))
kdcache.teacher.load_tokenizer("fake")
print([name for name in ("torch", "transformers", "vllm", "pyarrow", "numba") if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


def test_a_backend_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdcache.extras.find_spec", lambda name: None)
    for backend in ("vllm", "transformers"):
        with pytest.raises(MissingDependencyError, match=rf"teacher.backend '{backend}' .* pip install 'kdcache\[{backend}\]'"):
            load_teacher(TeacherConfig(model="x", backend=backend))
    with pytest.raises(MissingDependencyError, match=r"the tokenizer 'x' .* 'kdcache\[transformers\]'"):
        load_tokenizer("x")


def test_a_backend_is_what_the_table_names_and_another_is_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"teacher\.backend is 'vlm'; expected one of auto, vllm, transformers, served, fake"):
        find_backend("vlm")
    monkeypatch.setitem(BACKENDS, "toy", "kdcache.teacher.fake:FakeBackend")
    toy = TeacherConfig(model="x", backend="toy")
    assert load_teacher(toy).identity.model == "x"
    assert find_backend("toy").tokenizer_name(toy) == "fake"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_auto_takes_transformers_where_vllm_does_not_import_and_says_so(tiny_model_dir: Path, tmp_path: Path):
    # A vLLM that is installed but built for another machine.
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    code = f"""
import logging, sys
sys.path.insert(0, {str(tmp_path)!r})
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from kdcache.config.capture import TeacherConfig
from kdcache.teacher import load_teacher
print(load_teacher(TeacherConfig(model={str(tiny_model_dir)!r})).identity.engine)
"""
    out = run_python(code)
    assert "using transformers, as teacher.backend 'auto': vllm is installed but does not import: operator torchvision" in out
    assert out.strip().endswith("\ntransformers")


def config(**changes: object) -> TeacherConfig:
    return TeacherConfig(**({"model": "m", "tokens_per_forward": 1000} | changes))  # pyright: ignore[reportArgumentType]


def test_auto_dtype_is_the_checkpoints_with_vllm_too():
    assert engine_options(config(), LLAMA, is_cpu=False)["dtype"] == "float32"
    assert engine_options(config(), {"text_config": {"torch_dtype": "float32"}}, is_cpu=False)["dtype"] == "float32"
    assert engine_options(config(), LLAMA | {"dtype": "bfloat16"}, is_cpu=False)["dtype"] == "auto"
    assert engine_options(config(dtype="float16"), LLAMA, is_cpu=False)["dtype"] == "float16"


def test_the_users_engine_options_have_the_last_word():
    options = engine_options(config(engine_options={"enforce_eager": False, "max_num_seqs": 3}), {}, is_cpu=True)
    assert (options["enforce_eager"], options["max_num_seqs"]) == (False, 3)


def test_the_cpu_cache_holds_a_whole_sequence_and_what_is_in_flight(monkeypatch: pytest.MonkeyPatch):
    assert kv_bytes_per_token(LLAMA) == 2 * 4 * 2 * 2 * 16
    assert kv_bytes_per_token({}) is None
    assert cpu_cache_bytes(LLAMA, 1000, 256) == 64 * 2**20
    assert cpu_cache_bytes(LLAMA, 1_000_000, 256) > 2 * 1_000_000 * 512
    assert cpu_cache_bytes(LLAMA | {"num_hidden_layers": 10**6}, 1, 256) >= 256 * 256 * 10**6
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert "kv_cache_memory_bytes" not in engine_options(config(), LLAMA, is_cpu=True)


def test_several_engines_in_one_capture_are_asked_for_elsewhere():
    with pytest.raises(ConfigError, match=r"engine_options\.data_parallel_size is 2, .* run\.executor ray, or with --rank"):
        engine_options(config(engine_options={"data_parallel_size": 2}), LLAMA, is_cpu=False)
    engine_options(config(engine_options={"data_parallel_size": 1}), LLAMA, is_cpu=False)


def test_there_is_room_for_an_adapters_rank():
    assert "enable_lora" not in engine_options(config(), LLAMA, is_cpu=False)
    for rank, room in ((1, 1), (4, 8), (8, 8), (300, 320), (512, 512)):
        options = engine_options(config(), LLAMA, is_cpu=False, rank=rank)
        assert (options["enable_lora"], options["max_lora_rank"]) == (True, room)
