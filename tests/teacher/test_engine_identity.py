from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kdcache.teacher.engine_identity import rope_of, vllm_options


def vllm_config(**model: Any) -> Any:
    """The least that every vLLM has."""
    fields = {"dtype": "float32", "enforce_eager": False, "max_model_len": 100, "hf_text_config": SimpleNamespace()} | model
    return SimpleNamespace(
        model_config=SimpleNamespace(**fields),
        parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1),
    )


def test_an_option_that_is_not_known_here_is_kept_and_one_known_to_be_harmless_is_not():
    found = vllm_options(vllm_config(), {"brand_new": "x", "max_num_seqs": 3, "disable_log_stats": True}, device="cuda")
    assert found["brand_new"] == "x"
    assert "max_num_seqs" not in found
    assert "disable_log_stats" not in found
    assert found["tensor_parallel_size"] == 2


def test_the_longest_sequence_counts_where_the_rotary_embedding_depends_on_it():
    def found(rope: dict[str, Any]) -> dict[str, Any]:
        config = vllm_config(hf_text_config=SimpleNamespace(rope_parameters=rope))
        return vllm_options(config, {}, device="cuda")

    assert "max_model_len" not in found({"rope_type": "default", "rope_theta": 1e4})
    assert "max_model_len" not in found({"rope_type": "yarn", "factor": 4.0})
    assert found({"rope_type": "longrope", "long_factor": (1.0, 2.0)})["max_model_len"] == 100
    assert (
        found({"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}})["max_model_len"]
        == 100
    )


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        ({}, None),
        ({"rope_theta": 1e4}, {"rope_theta": 1e4}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_theta": 1e4, "type": "linear", "factor": 2},
        ),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"rope_theta": 5.0, "rope_type": "default"}),
    ],
)
def test_rotary_parameters_are_found_under_old_and_new_names(config: dict[str, Any], rope: dict[str, Any] | None):
    assert rope_of(SimpleNamespace(**config)) == rope


def test_a_draft_model_is_named():
    config = vllm_config()
    config.speculative_config = SimpleNamespace(method="ngram", model=None, num_speculative_tokens=4)
    assert vllm_options(config, {}, device="cpu")["speculative"] == {
        "method": "ngram",
        "model": None,
        "num_speculative_tokens": 4,
    }
