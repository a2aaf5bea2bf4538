"""Which of an engine's settings belong to a teacher's identity: those that can move its numbers. Pure functions; no engine.

There are three kinds of settings. Those that change the model or its arithmetic are read from the running engine, whoever set
them. Those known to affect only amounts, speed or logging are left out. Everything else that the user sets is kept as it is,
since an unknown option may be of the first kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VLLM_OTHER_OPTIONS = frozenset(
    """
    gpu_memory_utilization kv_cache_memory_bytes max_model_len max_num_batched_tokens max_num_seqs max_num_active_seqs
    num_gpu_blocks_override swap_space cpu_offload_gb max_logprobs max_seq_len_to_capture cudagraph_capture_sizes
    enable_chunked_prefill max_num_partial_prefills max_long_partial_prefills long_prefill_token_threshold scheduling_policy
    async_scheduling scheduler_cls enable_prefix_caching prefix_caching_hash_algo num_scheduler_steps stream_interval
    distributed_executor_backend max_parallel_loading_workers ray_workers_use_nsight distributed_timeout_seconds
    worker_extension_cls worker_cls
    load_format download_dir ignore_patterns use_tqdm_on_load model_loader_extra_config safetensors_load_strategy hf_token
    trust_remote_code tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init served_model_name
    disable_log_stats disable_log_requests enable_log_requests collect_detailed_traces otlp_traces_endpoint
    show_hidden_metrics_for_version profiler_config enable_sleep_mode seed generation_config override_generation_config
    """.split()  # noqa: SIM905
)
"""Options of `vllm.LLM` that move no number of a prompt: memory, scheduling, loading, logging,
sampling. Another batch size rounds differently, as it does within one run."""

VLLM_READ_OPTIONS = frozenset(
    """
    dtype quantization revision enforce_eager kv_cache_dtype tensor_parallel_size pipeline_parallel_size
    enable_expert_parallel speculative_config enable_lora hf_overrides
    """.split()  # noqa: SIM905
)
"""Options whose outcome is read from the engine."""

TRANSFORMERS_OTHER_OPTIONS = frozenset(
    """
    attn_implementation device_map max_memory offload_folder offload_state_dict offload_buffers low_cpu_mem_usage cache_dir
    force_download local_files_only token proxies trust_remote_code use_safetensors weights_only
    """.split()  # noqa: SIM905
)
"""Options of `from_pretrained` that move no number, and the one whose outcome is read from the model."""

LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")
"""Kinds of rotary embedding whose factors vLLM chooses by the longest sequence that it is started for."""


def vllm_options(vllm_config: Any, options: Mapping[str, Any], *, device: str) -> dict[str, Any]:
    """The settings that move the numbers of a running engine.

    Args:
        vllm_config: the engine's `VllmConfig`; what another release does not have in it is left out.
        options: the user's `teacher.engine_options`.
        device: `cpu` or `cuda`.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    found = {
        "device": device,
        "head_dtype": _plain(getattr(model, "head_dtype", model.dtype)),
        "attention_backend": _plain(_at(vllm_config, "attention_config.backend")) or "auto",
        "kv_cache_dtype": _plain(_at(vllm_config, "cache_config.cache_dtype")),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "expert_parallel": bool(getattr(parallel, "enable_expert_parallel", False)),
        "enforce_eager": bool(model.enforce_eager),
        "compilation": _plain(_at(vllm_config, "compilation_config.mode")),
        "speculative": _speculative(getattr(vllm_config, "speculative_config", None)),
        "lora": getattr(vllm_config, "lora_config", None) is not None,
        "hf_overrides": _overrides(getattr(model, "hf_overrides", None)),
        "rope": rope_of(_at(model, "hf_text_config")),
    }
    kinds = _rope_kinds(found["rope"])
    if any(kind in LENGTH_DEPENDENT_ROPE for kind in kinds):
        found["max_model_len"] = model.max_model_len
    known = VLLM_OTHER_OPTIONS | VLLM_READ_OPTIONS
    return found | {name: value for name, value in options.items() if name not in known}


def transformers_options(model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that move the numbers of a loaded model of `transformers`; arguments as for `vllm_options`."""
    head = model.get_output_embeddings()
    found = {
        "attn_implementation": str(model.config._attn_implementation),
        "device": model.device.type,
        "head_dtype": _plain(head.weight.dtype if hasattr(head, "weight") else model.dtype),
        "rope": rope_of(model.config.get_text_config()),
    }
    return found | {name: value for name, value in options.items() if name not in TRANSFORMERS_OTHER_OPTIONS}


def rope_of(text_config: Any) -> dict[str, Any] | None:
    """The parameters of the rotary embedding, as new and old transformers name them; None if it has none."""
    found = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None)
    theta = getattr(text_config, "rope_theta", None)
    fields = {str(name): _jsonable(value) for name, value in dict(found or {}).items()}
    return (fields if theta is None else {"rope_theta": theta} | fields) or None


def _rope_kinds(rope: Mapping[str, Any] | None) -> list[Any]:
    """The kinds in all layers: some models have parameters per kind of layer."""
    groups = [rope or {}, *(value for value in (rope or {}).values() if isinstance(value, Mapping))]
    return [group.get("rope_type", group.get("type")) for group in groups]


def _speculative(config: Any) -> dict[str, Any] | None:
    if config is None:
        return None
    return {name: _jsonable(getattr(config, name, None)) for name in ("method", "model", "num_speculative_tokens")}


def _overrides(overrides: Any) -> dict[str, Any] | str:
    if isinstance(overrides, Mapping):
        return {str(name): _jsonable(value) for name, value in overrides.items()}
    return getattr(overrides, "__qualname__", "") if overrides else {}


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _plain(value: Any) -> Any:
    """The name of a dtype, an enum's member or a text."""
    if value is None:
        return None
    return str(getattr(value, "name", value)).removeprefix("torch.")


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _jsonable(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(child) for child in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else _plain(value)
