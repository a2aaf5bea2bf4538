"""Fixtures that every room shares. Imports nothing heavy: some tests look at what a fresh interpreter loads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before any test imports a library that reads them: no hub is asked, no forked tokenizer warns, no usage report is sent.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and its tokenizer; see tests/tiny_model.py. Not to be written into."""
    pytest.importorskip("transformers")
    from tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("teacher") / "tiny-llama")
