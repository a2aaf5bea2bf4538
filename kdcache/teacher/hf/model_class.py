"""Which of transformers' classes a checkpoint's language model is loaded with."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText


def language_model_class(config: Any) -> Any:
    """AutoModelForCausalLM, or the class for models with eyes where only that one knows the configuration."""
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in kind._model_mapping:
            return kind
    return AutoModelForCausalLM  # code of the checkpoint's own, or an error that says what is known


def class_of_checkpoint(name: str, revision: str | None = None, **options: Any) -> Any:
    """As `language_model_class`, for a folder or hub id; its errors are left to whatever loads the model."""
    trusted = options.get("trust_remote_code", False)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trusted)
    except Exception:  # the loader's own words are better
        return AutoModelForCausalLM
    return language_model_class(config)
