"""Caches made by the tiny model itself, with the whole vocabulary as support or its top 16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def full_cache(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose support is the whole vocabulary: nothing of the teacher is lost but float32's rounding."""
    from train_caches import write_cache

    return write_cache(tmp_path_factory.mktemp("full") / "cache", tiny_model_dir, k=520, num_sequences=14)


@pytest.fixture(scope="session")
def small_cache(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the teacher's top 16."""
    from train_caches import write_cache

    return write_cache(tmp_path_factory.mktemp("small") / "cache", tiny_model_dir, k=16, num_sequences=14)


@pytest.fixture(scope="session")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short texts."""
    path = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    path.write_text("".join(json.dumps({"text": f"def function_{i}(x): return x + {i}\n"}) + "\n" for i in range(12)))
    return path
