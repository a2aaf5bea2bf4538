"""The options that vLLM's engine is started with. Pure functions; no vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.config.capture import TeacherConfig
from kdcache.errors import ConfigError
from kdcache.teacher.vllm.layers import LAYERS

POSITIONS_PER_REQUEST_STEP = 1024
"""The most positions of one sequence in one step: vLLM makes float32 logprobs [positions, vocab] for them, in memory that its
profiling run has not seen. Steps stay full, with parts of more sequences."""

CPU_CACHE_FLOOR = 64 * 2**20
CPU_CACHE_UNKNOWN = 4 * 2**30
CPU_BLOCK_TOKENS = 128
CPU_MAX_SEQUENCES = 256

CPU_CHUNK_BYTES = 16 * 2**20
CPU_CHUNK_POSITIONS = 64
"""On a CPU the logits of a chunk should stay in the last-level cache, but fewer positions than this
slow the projection down: at a vocabulary of 152k, chunks of 64 positions were 1.3 times as fast as
chunks of 512."""


LAYERED_WORKER = "kdcache.teacher.vllm.layered_worker.LayeredWorker"
"""Its module imports vLLM, and vLLM imports it."""

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM can make room for."""


def engine_options(
    config: TeacherConfig,
    model_fields: Mapping[str, Any],
    *,
    is_cpu: bool,
    extension: str | None = None,
    rank: int | None = None,
    layers: Sequence[int] = (),
) -> dict[str, Any]:
    """The keyword arguments of `vllm.LLM`; the user's engine_options have the last word.

    Args:
        config: what the user asks for.
        model_fields: the model's config.json; empty if it could not be read.
        is_cpu: whether the engine will run on CPUs.
        extension: the class that selects inside the engine's worker; None to use vLLM's own prompt logprobs.
        rank: of the adapter, at most 512; None without one.
        layers: whose states a model that is compiled is to hand out.

    Raises:
        ConfigError: the user's engine_options ask for data parallelism, which a capture does itself.
    """
    _refuse_data_parallel(config)
    options: dict[str, Any] = {
        "revision": config.revision,
        "dtype": _dtype(config.dtype, model_fields),
        "quantization": config.quantization,
        "tensor_parallel_size": config.vllm.tensor_parallel_size,
        "gpu_memory_utilization": config.vllm.gpu_memory_utilization,
        "max_num_batched_tokens": config.tokens_per_forward,
        "enable_chunked_prefill": True,
        # -1: as many as the vocabulary has. The engine starts before k is known.
        "max_logprobs": -1,
        # Normalised over the whole vocabulary, before temperature and sampling filters.
        "logprobs_mode": "raw_logprobs",
        # Cached positions are not computed, so they would have no logprobs.
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
        "enforce_eager": is_cpu,
        "seed": 0,
    }
    if rank is not None:
        options |= {"enable_lora": True, "max_lora_rank": next(room for room in ADAPTER_RANKS if room >= rank)}
    max_positions: Any = config.engine_options.get("max_model_len") or _text_fields(model_fields).get("max_position_embeddings")
    if extension is not None:
        options["worker_extension_cls"] = extension
    elif max_positions is not None:
        options["long_prefill_token_threshold"] = min(POSITIONS_PER_REQUEST_STEP, int(max_positions))
    if is_cpu and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        options["kv_cache_memory_bytes"] = cpu_cache_bytes(model_fields, config.tokens_per_forward, max_positions)
    options |= config.engine_options
    if layers:
        further: Any = config.engine_options.get("additional_config") or {}
        options |= {"worker_cls": LAYERED_WORKER, "additional_config": {**further, LAYERS: list(layers)}}
    return options


def _refuse_data_parallel(config: TeacherConfig) -> None:
    name = next((name for name in config.engine_options if name.startswith("data_parallel")), None)
    if name is not None and config.engine_options[name] not in (None, 1):
        raise ConfigError(
            f"teacher.engine_options.{name} is {config.engine_options[name]!r}, but each process of a capture has one engine; "
            "spread the capture over more of them with run.executor ray, or with --rank and --world-size"
        )


def chunk_positions(config: TeacherConfig, vocab_size: int, *, is_cpu: bool) -> int:
    """How many positions' logits the worker makes at once."""
    if not is_cpu:
        return config.chunk_positions
    return min(config.chunk_positions, max(CPU_CHUNK_POSITIONS, CPU_CHUNK_BYTES // (2 * vocab_size)))


def cpu_cache_bytes(model_fields: Mapping[str, Any], tokens_per_forward: int, max_positions: Any) -> int:
    """Bytes of key-value cache on a CPU, where vLLM would take nine tenths of the memory.

    Enough for what is in flight, in float32: two steps of tokens, one sequence of full length and a started block of each
    sequence. At most a quarter of the machine's memory, unless one sequence needs more.
    """
    bytes_per_token = kv_bytes_per_token(model_fields)
    quarter = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    if bytes_per_token is None or max_positions is None:
        return min(CPU_CACHE_UNKNOWN, quarter)
    longest = int(max_positions) + CPU_BLOCK_TOKENS
    in_flight = 2 * tokens_per_forward + longest + CPU_MAX_SEQUENCES * CPU_BLOCK_TOKENS
    return max(CPU_CACHE_FLOOR, min(in_flight * bytes_per_token, quarter), longest * bytes_per_token)


def kv_bytes_per_token(model_fields: Mapping[str, Any]) -> int | None:
    """Bytes of a token's float32 keys and values in all layers, an upper bound; None if the config does not say."""
    fields = _text_fields(model_fields)
    try:
        heads = fields.get("num_key_value_heads") or fields["num_attention_heads"]
        head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        return 2 * 4 * fields["num_hidden_layers"] * heads * head_dim
    except (KeyError, TypeError):
        return None


def _dtype(asked: str, model_fields: Mapping[str, Any]) -> str:
    """Our `auto` takes the checkpoint's dtype, as with transformers; vLLM's turns a float32 checkpoint into bfloat16."""
    return "float32" if asked == "auto" and stored_dtype(model_fields) == "float32" else asked


def stored_dtype(model_fields: Mapping[str, Any]) -> str:
    """The dtype of a checkpoint's weights by its config.json; empty if that does not say."""
    found = (fields.get(name) for fields in (model_fields, _text_fields(model_fields)) for name in ("dtype", "torch_dtype"))
    return str(next(filter(None, found), "")).removeprefix("torch.")


def _text_fields(model_fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the part that reads, of a model that also sees or hears."""
    return model_fields.get("text_config") or model_fields
