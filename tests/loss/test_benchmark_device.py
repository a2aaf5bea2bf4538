"""benchmarks/device.py, and what the benchmarks say of a GPU: its seconds, its groups, its targets."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import device as measuring

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MIB = 2**20


def test_on_a_cpu_seconds_are_the_processs_and_the_peak_is_what_a_call_took():
    cpu = measuring.Device("cpu")
    assert cpu.unit == "CPU"
    assert cpu.name
    assert 0 < cpu.clock(lambda: sum(range(100_000))) < 10
    assert 240 * MIB < cpu.peak_memory(lambda: torch.ones(64 * MIB)) < 300 * MIB


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_auto_takes_the_cpu():
    assert measuring.chosen("auto").kind == "cpu"
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        measuring.chosen("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_seconds_are_the_devices_and_the_peak_is_the_allocators():
    gpu = measuring.Device("cuda")
    assert gpu.peak_memory(lambda: torch.ones(64 * MIB, device="cuda")) == 256 * MIB
    large = torch.ones(8192, 8192, device="cuda")
    assert gpu.clock(lambda: large @ large) > gpu.clock(lambda: large[:64, :64] @ large[:64, :64])


def test_a_report_says_whose_seconds_it_has_and_earlier_ones_stay_as_they_are():
    loss, train_step = importlib.import_module("loss"), importlib.import_module("train_step")
    for program, name in ((loss, "loss"), (train_step, "train_step")):
        kept = BENCHMARKS / "results" / name
        assert program.report(json.loads(kept.with_suffix(".json").read_text())) == kept.with_suffix(".md").read_text()
    variants = {n: {"gpu_s": 0.5, "ratio": 1.2, "ratios": [1.2]} for n in loss.groups_of("cuda")["ours"] | {loss.BOUND: None}}
    part = {"case": "152k-4096-bfloat16-gpu", "group": "ours", "rows": 8192, "hidden": 4096, "vocab": 151_936, "rounds": 5}
    part |= {"dtype": "bfloat16", "cpu": "NVIDIA H100", "torch": "2", "threads": 1, "load_before": 0.1, "variants": variants}
    text = loss.report([part])
    assert "| variant | GPU s |" in text
    assert "NVIDIA H100" in text
    assert "fused, auto 1.20, NOT met, fused, triton 1.20, NOT met" in text
