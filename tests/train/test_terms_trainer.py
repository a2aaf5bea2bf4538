"""Terms in our own trainer: what is written, and that a run with projectors goes on to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("transformers")

import term_cases
from safetensors.torch import load_file
from train_caches import train_config

from kdcache import extensions
from kdcache.config.train import TrainConfig
from kdcache.errors import StateError
from kdcache.train.runs.run_folder import read_metrics
from kdcache.train.trainer import train

TERMS: list[dict[str, Any]] = [
    {"term": "divergence"},
    {"term": "cross_entropy", "weight": {"schedule": "linear", "start": 1.0, "end": 0.5}},
    {"term": "codes", "weight": 0.5, "balance": "equal"},
]


@pytest.fixture(autouse=True)
def codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extensions.OWN, "losses", dict(extensions.OWN["losses"]))
    term_cases.register()


def config_with(cache: Path, teacher: Path, out: Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {"loss": {"terms": TERMS, "projector_lr": 3e-3}} | changes
    return train_config(cache, teacher, out, **fields)


def lines_of(config: TrainConfig) -> list[dict[str, Any]]:
    return [line for line in read_metrics(config.out) if "loss" in line]


def test_metrics_have_each_terms_value_and_weight(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = config_with(small_cache, tiny_model_dir, tmp_path / "run")
    train(config, show_progress=False)
    lines = lines_of(config)
    assert [line["terms"]["cross_entropy.weight"] for line in lines] == pytest.approx([1 - 0.5 * step / 7 for step in range(8)])
    for line in lines:
        terms = line["terms"]
        assert terms["codes.largest"] > terms["codes"] > 0
        assert terms["codes.weight"] == pytest.approx(0.5 * terms["divergence"] / terms["codes"])
        total = terms["divergence"] + terms["cross_entropy.weight"] * terms["cross_entropy"]
        assert line["loss"] == pytest.approx(total + terms["codes.weight"] * terms["codes"], rel=1e-5)


def test_the_finished_model_has_no_projector(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    result = train(config_with(small_cache, tiny_model_dir, tmp_path / "run"), show_progress=False)
    assert not any("projector" in name for name in load_file(result.model / "model.safetensors"))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert list(load_file(checkpoint / "terms.safetensors")) == ["terms.codes.projector"]
    digests = json.loads((checkpoint / "digests.json").read_text())["files"]
    assert "terms.safetensors" in digests
    (checkpoint / "terms.safetensors").unlink()
    with pytest.raises(StateError, match=r"terms\.safetensors is missing"):
        train(config_with(small_cache, tiny_model_dir, tmp_path / "run"), show_progress=False)


KILLED = """
import json, os, signal, sys
import term_cases
from kdcache.config.load import convert_config
from kdcache.config.train import TrainConfig
from kdcache.train import trainer

term_cases.register()
fields, num_steps = json.load(sys.stdin)
original = trainer.learning_rate

def deadly(step, *rest):
    if step == num_steps:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(step, *rest)

trainer.learning_rate = deadly
trainer.train(convert_config(fields, TrainConfig), show_progress=False)
"""


@pytest.mark.slow
def test_a_killed_run_with_a_projector_goes_on_to_the_bit(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    whole = config_with(small_cache, tiny_model_dir, tmp_path / "whole")
    killed = msgspec.structs.replace(whole, out=str(tmp_path / "killed"))
    task = json.dumps([msgspec.to_builtins(killed), 5])
    done = subprocess.run(
        [sys.executable, "-c", KILLED], input=task, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    assert done.returncode == -9, done.stderr
    assert train(killed, show_progress=False).num_resumed == 3
    train(whole, show_progress=False)
    assert lines_of(killed) == lines_of(whole)
    for name in ("terms.safetensors", "model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(Path(c.out) / "checkpoints" / "step-00000008" / name) for c in (killed, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_projectors_learn_at_their_own_rate(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    def learned(out: str, rate: float) -> torch.Tensor:
        config = config_with(small_cache, tiny_model_dir, tmp_path / out, steps=1, loss={"terms": TERMS, "projector_lr": rate})
        train(config, show_progress=False)
        return load_file(tmp_path / out / "checkpoints" / "step-00000001" / "terms.safetensors")["terms.codes.projector"]

    still, slow, fast = learned("still", 1e-30), learned("slow", 1e-3), learned("fast", 3e-3)
    torch.testing.assert_close((fast - still) / 3, slow - still, rtol=1e-3, atol=1e-6)
    assert (slow - still).abs().max() > 1e-6
