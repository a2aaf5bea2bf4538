"""What of vLLM is looked for, and that no number decides: pure, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kdcache.teacher.vllm.signatures import Call, fault_of_parameters, faults_of, version_note


@pytest.mark.parametrize("version", ["0.24.0", "0.32.0", "0.28.1+cpu", "0.33.0rc1", "0.33.1.dev3+g4ba787ec9"])
def test_nothing_is_said_of_releases_that_were_proven(version: str):
    assert version_note(version) is None


@pytest.mark.parametrize("version", ["0.99.0", "1.0", "0.34.0rc1", "0.23.9", "0.1.dev17+gabc", "dev"])
def test_of_any_other_one_line_says_which_was_proven_last(version: str):
    assert version_note(version) == f"kdcache was last proven with vLLM 0.33, and this is {version}"


class Engine:
    """Each method is as a release could have it."""

    def same(self, prompts: Any, params: Any = None, *, lora_request: Any = None, use_tqdm: bool = True, more: int = 0) -> None:
        """Takes more than is given."""

    def renamed(self, prompts: Any, params: Any = None, *, lora: Any = None) -> None:
        """Another name for a keyword."""

    def demanding(self, prompts: Any, params: Any, added: Any, *, lora_request: Any = None, use_tqdm: bool = True) -> None:
        """Wants one more."""


def test_what_an_engine_lacks_or_takes_otherwise_is_named():
    llm, call = SimpleNamespace(engine=Engine(), number=3), Call(2, ("lora_request", "use_tqdm"))
    assert faults_of(llm, {"engine.same": call, "number": None}) == []
    missing, renamed, demanding = faults_of(llm, {"engine.gone.deeper": None, "engine.renamed": call, "engine.demanding": call})
    assert missing == "LLM has no engine.gone.deeper"
    assert renamed.startswith("LLM.engine.renamed takes (prompts: ")
    assert "added" in demanding


def test_sampling_parameters_that_are_gone_are_named():
    def sampling_params(max_tokens: int = 16, temperature: float = 1.0) -> None:
        """Of a release without a field."""

    assert fault_of_parameters(sampling_params, ("max_tokens", "extra_args")) == "sampling_params has no extra_args"
    assert fault_of_parameters(sampling_params, ("max_tokens",)) is None
