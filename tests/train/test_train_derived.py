"""Students train from derived caches as from the captures that these stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from train_caches import load_teacher_model, train_config, write_cache

from kdcache.derive.config import DeriveConfig
from kdcache.derive.reduction.reduce import Reduction
from kdcache.derive.run import derive
from kdcache.format.manifest import SelectionInfo
from kdcache.train.trainer import train


def trained(cache: Path, teacher_dir: Path, out: Path, **loss: object) -> torch.Tensor:
    """All weights of a student after three steps, one behind the other."""
    result = train(train_config(cache, teacher_dir, out, steps=3, loss=loss), show_progress=False)
    return torch.cat([weights.reshape(-1) for weights in load_teacher_model(result.model).parameters()]).detach()


def test_a_reduced_cache_trains_the_student_that_a_smaller_capture_trains(tiny_model_dir: Path, tmp_path: Path):
    for k in (16, 4):
        write_cache(tmp_path / f"top{k}", tiny_model_dir, k=k, num_sequences=6)
    derive([tmp_path / "top16"], tmp_path / "derived", DeriveConfig(reduce=Reduction(top_k=4)))
    weights = {
        name: trained(tmp_path / name, tiny_model_dir, tmp_path / f"run-{name}") for name in ("top16", "top4", "derived")
    }
    torch.testing.assert_close(weights["derived"], weights["top4"], rtol=0, atol=1e-5)
    assert (weights["derived"] - weights["top16"]).abs().max() > 1e-3


def test_a_teacher_mixed_with_itself_trains_the_same_student(small_cache: Path, tiny_model_dir: Path, tmp_path: Path):
    derive([small_cache, small_cache], tmp_path / "mixed", DeriveConfig(mix=(0.5, 0.5)))
    weights = [
        trained(cache, tiny_model_dir, tmp_path / f"run{i}") for i, cache in enumerate([small_cache, tmp_path / "mixed"])
    ]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-4)


def test_a_mixture_of_random_caches_trains_with_the_loss_of_its_selection(tiny_model_dir: Path, tmp_path: Path):
    threshold = SelectionInfo(kind="threshold", params={"tau": 0.02, "seed": 0})
    random = [write_cache(tmp_path / name, tiny_model_dir, num_sequences=6, selection=threshold) for name in "ab"]
    options = DeriveConfig(mix=(0.5, 0.5), codec="packed", where_position="target_logprob < -1", reduce=Reduction(draws=255))
    derive(random, tmp_path / "drawn", options)
    assert trained(tmp_path / "drawn", tiny_model_dir, tmp_path / "run", tail="drop").isfinite().all()
