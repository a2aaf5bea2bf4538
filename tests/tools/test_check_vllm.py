from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import check_vllm
import pytest

RUNNER = """
class Base:
    def _get_prompt_logprobs_dict(self, hidden_states, {second}): ...

class GPUModelRunner(Base):
    requests: dict
    def __init__(self):
        self.query_start_loc, self.input_batch = 1, 2
"""

LLM = """
class Mixin:
    def collective_rpc(self, method, timeout=None, args=(), kwargs=None): ...

class LLM(Mixin):
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True): ...
"""


def make_tree(root: Path, second: str) -> Path:
    for path, text in {"v1/worker/gpu_model_runner.py": RUNNER.replace("{second}", second), "entrypoints/llm.py": LLM}.items():
        (root / "vllm" / path).parent.mkdir(parents=True)
        (root / "vllm" / path).write_text(text)
    (root / "vllm" / "_version.py").write_text("__version__ = version = '0.99.0'\n")
    return root


def test_each_use_that_a_tree_does_not_satisfy_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert check_vllm.main([str(make_tree(tmp_path, "scheduler_output"))]) == 1
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("vLLM 0.99.0; kdcache was last proven with 0.")
    results = dict(line.split(": ", 1) for line in lines if not line.startswith(("every capture", "public", "selection")))
    assert results["V1 runner"] == "CachedRequestState: CachedRequestState has no " + (
        "num_computed_tokens, num_prompt_tokens, sampling_params"
    )
    assert "V1 runner: hook: GPUModelRunner._get_prompt_logprobs_dict takes (hidden_states, scheduler_output)" in lines
    assert "V1 runner: attributes: ok" in lines
    assert "selection in the worker: vllm.LLM: ok" in lines
    (calls,) = [line for line in lines if line.startswith("every capture: vllm.LLM: ")]
    assert "LLM.generate takes (prompts, sampling_params=None, *, use_tqdm=None)" in calls


def test_a_hook_that_a_base_class_has_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    check_vllm.main([str(make_tree(tmp_path, "num_scheduled_tokens") / "vllm")])
    assert "V1 runner: hook: ok" in capsys.readouterr().out


def test_a_folder_without_vllm_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert check_vllm.main([str(tmp_path)]) == 2
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_vllm_that_is_installed_satisfies_all_of_them(capsys: pytest.CaptureFixture[str]):
    spec = find_spec("vllm")
    assert spec is not None
    assert check_vllm.main([str(Path(str(spec.origin)).parent)]) == 0, capsys.readouterr().out
