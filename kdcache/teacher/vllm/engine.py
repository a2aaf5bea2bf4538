"""Start and end vLLM's offline engine without side effects on the process, and read what it says of its model."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.config.capture import TeacherConfig
from kdcache.errors import TeacherError
from kdcache.format.manifest import TeacherIdentity
from kdcache.shown import first_line, get_logger
from kdcache.teacher.checkpoint import folder_digest, resolved_revision, short_name, weights_digest
from kdcache.teacher.engine_identity import vllm_options
from kdcache.teacher.features import HiddenShape, shape_of_fields
from kdcache.teacher.vllm.signatures import ADAPTER_PARTS, PUBLIC_PARTS, PUBLIC_SAMPLING, fault_of_parameters, faults_of

# vLLM and torch read these when they are imported. By default vLLM prints about forty lines per engine, and still twenty at
# WARNING, none of them about the user's input; what ends a capture is raised. Some come before it sets up its loggers.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform
    from vllm.transformers_utils.config import get_config

if TYPE_CHECKING:
    from vllm import LLM

log = get_logger(__name__)


def runs_on_cpu() -> bool:
    """Whether this vLLM computes on CPUs."""
    return bool(current_platform.is_cpu())


def model_fields(config: TeacherConfig) -> dict[str, Any]:
    """The model's config.json, also of a hub id; empty if it cannot be read, which the engine will report."""
    try:
        return get_config(config.model, trust_remote_code=config.trusts_remote_code, revision=config.revision).to_dict()
    except Exception as error:
        log.debug("%s: %s", config.model, first_line(error))
        return {}


def start_engine(model: str, options: dict[str, Any]) -> LLM:
    """Start an engine with these keyword arguments of `vllm.LLM`; on a CPU in this process.

    Raises:
        TeacherError: the model does not load.
    """
    try:
        with _our_process():
            llm = vllm.LLM(model=model, **options)
    except Exception as error:  # whatever a checkpoint, the hub client or the engine can raise
        clean_up()
        raise TeacherError(f"the model {model!r} does not load with vLLM: {reason_of(error)}") from error
    if problem := unusable(llm):
        raise TeacherError(f"{problem}; install another release, or use teacher.backend transformers")
    return llm


def unusable(llm: Any) -> str | None:
    """Why kdcache cannot use an engine of this release at all; None if it can."""
    lack = fault_of_parameters(vllm.SamplingParams, PUBLIC_SAMPLING)
    faults = [lack] if lack else faults_of(llm, PUBLIC_PARTS)
    return f"kdcache cannot use vLLM {vllm.__version__}: {'; '.join(faults)}" if faults else None


@contextmanager
def _our_process() -> Iterator[None]:
    """Restore the environment (LD_PRELOAD for one) and torch's thread setter after an engine has started.

    On a CPU the engine runs in this process, unless the user's environment says otherwise: a worker process would be bound to
    all cores but one, and would need a guarded main module.
    """
    environment, set_num_threads = dict(os.environ), torch.set_num_threads
    if runs_on_cpu():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        with warnings.catch_warnings(), _llvmlite_inspectable():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads = set_num_threads
        os.environ.clear()
        os.environ.update(environment)


@contextmanager
def _llvmlite_inspectable() -> Iterator[None]:
    """Let vLLM start in a process that has loaded numba.

    On a CPU, vLLM 0.32 calls `vars()` on everything in every loaded module. llvmlite's handle of its library answers any
    attribute with a C function, `__dict__` too, and the start fails with "'_lib_fn_wrapper' object has no attribute".
    """
    table = getattr(getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None), "_fntab", None)
    if not isinstance(table, dict):
        yield
        return
    table["__dict__"] = {}
    try:
        yield
    finally:
        del table["__dict__"]


def load_adapter(llm: LLM, adapter: str) -> LoRARequest:
    """Have an engine load the adapter in a folder before any request needs it. Gives what requests carry.

    Raises:
        TeacherError: it does not load.
    """
    request = LoRARequest("teacher.adapter", 1, str(Path(adapter).resolve()))
    try:
        if faults := faults_of(llm, ADAPTER_PARTS):
            raise ValueError(faults[0])
        if not llm.llm_engine.add_lora(request):
            raise ValueError("the engine rejects it")
    except Exception as error:
        raise TeacherError(f"the adapter {adapter!r} does not load with vLLM: {reason_of(error)}") from error
    return request


def stop_engine(llm: LLM) -> None:
    """Shut an engine down. Drop every reference to it afterwards, then call `clean_up`."""
    llm.llm_engine.engine_core.shutdown()


def clean_up() -> None:
    """Release memory and process groups, so that another engine can start in this process."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cleanup_dist_env_and_memory()


def reason_of(error: Exception) -> str:
    """The telling sentence of an error; pydantic hides it between a heading and a dump of the input."""
    text = str(error)
    if "validation error" in text.partition("\n")[0] and "Value error, " in text:
        text = text.partition("Value error, ")[2].partition(" [type=")[0]
    else:
        text = first_line(error)
    return text.partition(". ")[0]


def hidden_shape_of(llm: LLM) -> HiddenShape:
    """The inner states that the engine's model has."""
    model_config = llm.llm_engine.model_config
    num_layers, size = model_config.get_total_num_hidden_layers(), model_config.get_hidden_size()
    stated = shape_of_fields(model_config.hf_text_config.to_dict())
    if stated is None or (stated.num_layers, stated.size) != (num_layers, size):
        return HiddenShape(num_layers, size)
    return stated


def is_eager(llm: LLM) -> bool:
    """Whether the engine runs the model's layers one by one, neither compiled nor in CUDA graphs."""
    return bool(llm.llm_engine.vllm_config.model_config.enforce_eager)


def num_tensor_ranks(llm: LLM) -> int:
    """How many ranks share each layer."""
    return int(llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size)


def identity_of(config: TeacherConfig, llm: LLM) -> TeacherIdentity:
    """The identity of the engine's model.

    context_length is one less than the engine's, which generates a token after each sequence. The route is not part of it: both
    normalise the same logits in float32.
    """
    model_config = llm.llm_engine.model_config
    loaded = getattr(model_config.hf_config, "_commit_hash", None)
    options = vllm_options(llm.llm_engine.vllm_config, config.engine_options, device="cpu" if runs_on_cpu() else "cuda")
    if config.adapter is not None:
        options["adapter"] = folder_digest(config.adapter)
    return TeacherIdentity(
        model=short_name(config.model),
        revision=resolved_revision(config.model, config.revision, loaded),
        weights_digest=weights_digest(config.model, config.adapter),
        architecture=str((model_config.hf_config.architectures or ["unknown"])[0]),
        vocab_size=model_config.get_vocab_size(),
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=model_config.quantization,
        engine="vllm",
        engine_version=vllm.__version__,
        engine_options=options,
        context_length=model_config.max_model_len - 1,
    )
