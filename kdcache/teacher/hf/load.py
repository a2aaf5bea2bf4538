"""Loading a model of `transformers`: with which class, and with an attention that does what its config asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from kdcache.config.capture import TeacherConfig
from kdcache.errors import ConfigError, TeacherError
from kdcache.half_precision import warn_if_emulated
from kdcache.shown import first_line
from kdcache.teacher.checkpoint import why_not_loaded
from kdcache.teacher.hf.attention import EAGER, must_be_eager, use_eager

FIELD = "teacher.engine_options.attn_implementation"


def load_checked(config: TeacherConfig) -> PreTrainedModel:
    """Load the model in evaluation mode, with an attention that does what its config asks.

    Raises:
        ConfigError: a setting that only vLLM has, or an attention that was named and ignores part of the config.
        TeacherError: the model does not load.
    """
    refuse_vllm_settings(config)
    model = _load(config, config.engine_options)
    named = config.engine_options.get("attn_implementation") is not None
    if must_be_eager(model, named=named, field=FIELD) and not use_eager(model):
        del model
        model = _load(config, config.engine_options | {"attn_implementation": EAGER})
    return model


def _load(config: TeacherConfig, options: dict[str, Any]) -> PreTrainedModel:
    try:
        with _quiet_progress():
            options = {"trust_remote_code": False} | options  # otherwise transformers asks on the terminal
            kind = class_of_checkpoint(config.model, config.revision, **options)
            loaded: Any = kind.from_pretrained(
                config.model, revision=config.revision, dtype=config.dtype, output_loading_info=True, **options
            )
            model, info = loaded
    except Exception as error:  # whatever a checkpoint, its remote code or the hub client can raise
        reason = why_not_loaded(config.model, first_line(error))
        raise TeacherError(f"the model {config.model!r} does not load with transformers: {reason}") from error
    problems = [*info["missing_keys"], *info["mismatched_keys"]]
    # transformers fills missing weights with random numbers and continues: the cache would be noise.
    if problems:
        names = ", ".join(sorted(map(str, problems))[:3])
        raise TeacherError(f"the checkpoint {config.model!r} does not fit its config: missing or of another shape: {names}")
    if "device_map" not in config.engine_options and torch.cuda.is_available():
        model = model.to("cuda")
    warn_if_emulated(str(model.dtype).removeprefix("torch."), model.device.type)
    return model.eval()


@contextmanager
def _quiet_progress() -> Iterator[None]:
    """Hide transformers' bar "Loading weights": showing progress is up to the caller."""
    was_enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers.utils.logging.enable_progress_bar()


def refuse_vllm_settings(config: TeacherConfig) -> None:
    """Raise ConfigError for a setting that only vLLM has."""
    if config.vllm.tensor_parallel_size != 1:
        raise ConfigError(
            f"teacher.vllm.tensor_parallel_size is {config.vllm.tensor_parallel_size}, but the transformers teacher "
            "knows 1 only"
        )
    if config.adapter is not None:
        raise ConfigError(
            f"teacher.adapter is {config.adapter!r}, but the transformers teacher cannot apply one; merge it into its model "
            "and name the merged folder as teacher.model, or use teacher.backend vllm"
        )
    if config.quantization is not None:
        raise ConfigError(
            f"teacher.quantization is {config.quantization!r}, but the transformers teacher takes what the checkpoint says; "
            "set it to null or use teacher.backend vllm"
        )


def language_model_class(config: Any) -> Any:
    """AutoModelForCausalLM, or the class for models that also see, if only that one knows the configuration."""
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in kind._model_mapping:
            return kind
    return AutoModelForCausalLM  # the checkpoint's own code, or an error that lists what is known


def class_of_checkpoint(name: str, revision: str | None = None, **options: Any) -> Any:
    """The same for a folder or hub id; errors are left to whatever loads the model."""
    trusted = options.get("trust_remote_code", False)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trusted)
    except Exception:  # the loader has better words
        return AutoModelForCausalLM
    return language_model_class(config)
