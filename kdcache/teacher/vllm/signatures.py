"""The names of vLLM that kdcache hooks and uses: checked when an engine starts, and in sources by `tools/check_vllm.py`.

A release's version decides nothing. These names, and the proof on eight tokens, decide whether
selection happens in the engine's worker. Pure functions; no vLLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

FIRST_PROVEN, LAST_PROVEN = (0, 24), (0, 33)
"""The first and last release that the worker route was proven with; see README.md for how."""

HOOKS_V1 = {"_get_prompt_logprobs_dict": ("hidden_states", "num_scheduled_tokens")}
"""The methods of the V1 runner that are wrapped, with exactly these parameters."""
RUNNER_V1 = ("requests", "query_start_loc", "input_batch")
REQUEST_V1 = ("CachedRequestState", ("sampling_params", "num_computed_tokens", "num_prompt_tokens"))
"""A class, and what is read of its objects. Not checked when an engine starts: the proof reads all of it."""

HOOKS_V2 = {
    "compute_prompt_logprobs": (
        "logits_fn", "hidden_states", "input_batch", "all_token_ids", "num_computed_tokens", "prompt_lens",
    ),
    "add_request": ("req_id", "req_idx", "sampling_params"),
    "remove_request": ("req_id",),
}  # fmt: skip
"""The methods of the V2 runner's `prompt_logprobs_worker` that are wrapped."""
BATCH_V2 = (
    "InputBatch",
    ("req_ids", "num_computed_prefill_tokens_np", "num_scheduled_tokens", "idx_mapping_np", "query_start_loc_np"),
)


class Call(NamedTuple):
    """How a method is called: with this many positional arguments, and these keywords."""

    num_positional: int
    keywords: tuple[str, ...] = ()


PUBLIC_PARTS: Mapping[str, Call | None] = {
    "generate": Call(2, ("lora_request", "use_tqdm")),
    "llm_engine.engine_core.shutdown": Call(0),
    "llm_engine.model_config.get_hidden_size": Call(0),
    "llm_engine.model_config.get_total_num_hidden_layers": Call(0),
    "llm_engine.model_config.get_vocab_size": Call(0),
    "llm_engine.vllm_config.model_config.enforce_eager": None,
    "llm_engine.vllm_config.parallel_config.tensor_parallel_size": None,
    "llm_engine.vllm_config.parallel_config.pipeline_parallel_size": None,
}
"""What every capture uses of a `vllm.LLM`, also beyond its documented interface; None: it is only read."""

WORKER_PARTS: Mapping[str, Call | None] = {"collective_rpc": Call(1, ("args",))}
ADAPTER_PARTS: Mapping[str, Call | None] = {"llm_engine.add_lora": Call(1)}
WRITING_PARTS: Mapping[str, Call | None] = {
    "enqueue": Call(2, ("lora_request", "use_tqdm")),
    "llm_engine.has_unfinished_requests": Call(0),
    "llm_engine.step": Call(0),
    "llm_engine.vllm_config.scheduler_config.long_prefill_token_threshold": None,
    "llm_engine.vllm_config.scheduler_config.max_num_batched_tokens": None,
}

PUBLIC_SAMPLING = ("prompt_logprobs", "logprobs", "max_tokens", "temperature", "flat_logprobs", "detokenize")
WORKER_SAMPLING = ("max_tokens", "temperature", "detokenize", "skip_reading_prefix_cache", "extra_args")
"""The fields of `vllm.SamplingParams` that the requests of each route set."""

WORKER_OPTIONS = ("worker_extension_cls",)
"""What the worker route needs of `vllm.EngineArgs`; both routes need the others of `options.engine_options`."""


def version_note(version: str) -> str | None:
    """What to say of a release that the worker route was never proven with; None for the others."""
    parts = version.split("+")[0].split(".")[:2]
    release = tuple(int(part) for part in parts if part.isdigit())
    if FIRST_PROVEN <= release <= LAST_PROVEN:
        return None
    return f"kdcache was last proven with vLLM {LAST_PROVEN[0]}.{LAST_PROVEN[1]}, and this is {version}"


def faults_of(owner: Any, parts: Mapping[str, Call | None]) -> list[str]:
    """Which parts an object lacks, or takes other arguments for, each in words."""
    faults = (_fault_of(owner, path, call) for path, call in parts.items())
    return [fault for fault in faults if fault is not None]


def fault_of_hook(owner: Any, name: str, parameters: tuple[str, ...]) -> str | None:
    """What is wrong with a method that we wrap, if anything: it must have these parameters and no others."""
    method = getattr(owner, name, None)
    if method is None:
        return f"{type(owner).__name__} has no {name}"
    found = tuple(inspect.signature(method).parameters)
    return None if found == parameters else f"{type(owner).__name__}.{name} takes ({', '.join(found)})"


def lack_of(owner: str, names: Iterable[str], wanted: Iterable[str]) -> str | None:
    """`OWNER has no A, B`; None where it has them all."""
    missing = sorted(set(wanted) - set(names))
    return f"{owner} has no {', '.join(missing)}" if missing else None


def fault_of_parameters(function: Callable[..., Any], wanted: Iterable[str]) -> str | None:
    """Which of our keywords a function, or the constructor of a class, does not take, if any."""
    return lack_of(getattr(function, "__name__", str(function)), inspect.signature(function).parameters, wanted)


def _fault_of(owner: Any, path: str, call: Call | None) -> str | None:
    value = owner
    for name in path.split("."):
        if not hasattr(value, name):
            return f"LLM has no {path}"
        value = getattr(value, name)
    try:
        signature = inspect.signature(value) if call is not None else None
    except (TypeError, ValueError):  # it has no signature; the call will tell
        signature = None
    return None if call is None or signature is None or fits(signature, call) else f"LLM.{path} takes {signature}"


def fits(signature: inspect.Signature, call: Call) -> bool:
    """Whether a method, without its self, takes this call."""
    try:
        signature.bind(*[None] * call.num_positional, **dict.fromkeys(call.keywords))
    except TypeError:
        return False
    return True
