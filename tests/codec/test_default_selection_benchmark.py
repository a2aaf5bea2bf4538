"""benchmarks/default_selection.py runs, and its sharpened teacher is as sharp as it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytest.importorskip("torch")

import default_selection
from rate_teachers import Teacher


def test_every_codec_has_its_bytes_and_rates(tmp_path: Path) -> None:
    default_selection.main(["--quick", "--out", str(tmp_path)])
    (found,) = json.loads((tmp_path / "default_selection.json").read_text())["teachers"]
    for row in found["selections"]:
        assert row["bytes"]["archive"] < row["bytes"]["quantized"] < row["bytes"]["packed"]
        assert all(rate > 0 for of_codec in row["rates"].values() for rate in of_codec.values())


def test_a_sharpened_teacher_gives_as_many_different_ids_as_asked_for() -> None:
    logits_TV = np.random.default_rng(0).normal(0, 2, (16, 300)).astype(np.float32)
    teacher = Teacher("noise", 300, np.zeros((1, 16), np.int32), lambda _: default_selection._normalised(logits_TV))
    p_TV = np.exp(default_selection.sharpened(teacher).logprobs_TV(0).astype(np.float64))
    rng = np.random.default_rng(1)
    distinct = [len(np.unique(rng.choice(300, default_selection.DRAWS, p=p / p.sum()))) for p in p_TV for _ in range(50)]
    assert np.mean(distinct) == pytest.approx(default_selection.DISTINCT, abs=0.3)
