"""The exact KL of a captured cache is that of the live teacher: a real tiny Llama, read by transformers and by vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dpkd_term import live_rows
from train_caches import load_teacher_model, train_config

import kdcache
from kdcache.capture.executors.run import run_capture
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.config.loader import LoaderConfig
from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError
from kdcache.loader.torch_batches import TorchLoader, sidecar_tensors
from kdcache.train.step import BatchLoss
from kdcache.train.terms.setting import set_up_terms
from kdcache.train.trainer import train

TEXTS = ["def f(x):\n    return x + 1", "import heapq\nclass A:\n    pass", "for i in range(10): print(i)"] * 4
LAST = {"layer": -1}


def capture(folder: Path, model: Path, feature: dict[str, Any] = LAST, backend: str = "transformers", **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    fields = {
        "input": {"format": "jsonl", "paths": [str(folder / "a.jsonl")], "window": {"size": 32}},
        "teacher": {"model": str(model), "backend": backend, "dtype": "float32"},
        "selection": {"kind": "top_k", "k": 4}, "features": [feature], "sidecars": ["output_projection"],
        "out": str(folder / "cache"),
    }  # fmt: skip
    run_capture(convert_config(fields | sections, CaptureConfig))
    return folder / "cache"


def student_of(tiny_model_dir: Path) -> Any:
    """The teacher, moved a little."""
    torch.manual_seed(0)
    student = load_teacher_model(tiny_model_dir)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
    return student


def found_and_right(cache: Path, tiny_model_dir: Path, terms: list[dict[str, Any]]) -> tuple[float, float, float]:
    """The term over a batch, the KL with both live models, and with the live teacher's states rounded as they are stored."""
    student, teacher = student_of(tiny_model_dir), load_teacher_model(tiny_model_dir)
    with kdcache.Loader(cache, LoaderConfig(seq_len=64, batch_rows=4, features=("hidden_last",))) as loader:
        loss_of = BatchLoss(convert_config({"terms": [*terms, {"term": "cross_entropy", "weight": 0.0}]}, LossConfig))
        set_up_terms(loss_of.terms, student, loader.caches, seed=0)
        batch = next(iter(TorchLoader(loader)))
        stored = batch.features["hidden_last"]
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids_BT.long(), "position_ids": batch.position_ids_BT.long(), "use_cache": False}
        hidden_BTH = student.model(**inputs).last_hidden_state
        loss = loss_of(hidden_BTH, student.lm_head, batch, dtype=torch.float32)
    losses = []
    with torch.no_grad():
        for name in ("live", "stored"):
            teacher_PV = torch.cat([teacher(input_ids=ids[None]).logits[0] for ids in live_rows(batch)]).double()
            if name == "stored":
                teacher_PV = stored.reconstructed().double() @ teacher.lm_head.weight.double().T
            student_PV = torch.cat([student(input_ids=ids[None]).logits[0] for ids in live_rows(batch)]).double()
            vocab = loader.caches[0].manifest.identity.teacher.vocab_size
            log_p_PV, log_q_PV = (z_PV[:, :vocab].log_softmax(dim=1) for z_PV in (teacher_PV, student_PV))
            losses.append(float((log_p_PV.exp() * (log_p_PV - log_q_PV)).sum(dim=1).mean()))
    return loss.item(), losses[0], losses[1]


@pytest.mark.parametrize(
    ("feature", "bound"),
    [
        (LAST, 1e-3),
        (LAST | {"dtype": "int8", "scale": "channel"}, 0.05),
        (LAST | {"projection": {"kind": "pca", "size": 48}}, 0.6),
    ],
    ids=["float16", "int8", "pca"],
)
def test_exact_kl_is_the_live_teachers(tmp_path: Path, tiny_model_dir: Path, feature: dict[str, Any], bound: float) -> None:
    """Equal to rounding to what the stored states say; near the live one as far as they are."""
    cache = capture(tmp_path, tiny_model_dir, feature)
    found, live, stored = found_and_right(cache, tiny_model_dir, [{"term": "exact_kl"}])
    assert found == pytest.approx(stored, rel=2e-5)
    assert found == pytest.approx(live, rel=bound)


def test_entries_and_states_prove_each_other(tmp_path: Path, tiny_model_dir: Path) -> None:
    """What is made of a state again is what the record says of its position: neither is one off."""
    cache = capture(tmp_path, tiny_model_dir)
    with kdcache.Loader(cache, LoaderConfig(seq_len=64, batch_rows=4, features=("hidden_last",))) as loader:
        batch = next(iter(TorchLoader(loader)))
        weight_VH = sidecar_tensors(loader.caches[0], "output_projection")["weight"]
    logprobs_PV = (batch.features["hidden_last"].float32() @ weight_VH.float().T).log_softmax(dim=1)
    again_PK = logprobs_PV.gather(1, batch.teacher.token_ids_PK.long())
    torch.testing.assert_close(again_PK, batch.teacher.logprobs_PK, rtol=0, atol=0.02)


@pytest.mark.slow
def test_exact_kl_through_vllm(tmp_path: Path, tiny_model_dir: Path) -> None:
    pytest.importorskip("vllm")
    cache = capture(tmp_path, tiny_model_dir, backend="vllm")
    found, live, _ = found_and_right(cache, tiny_model_dir, [{"term": "exact_kl"}])
    assert found == pytest.approx(live, rel=1e-3)


def test_both_terms_train(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Through the trainer: a student of one of the teacher's two layers, in which both spaces are one at the start."""
    cache = capture(tmp_path / "capture", tiny_model_dir)
    steps = {}
    for name in ("exact_kl", "dual_space"):
        sections = {
            "student": {"model": str(tiny_model_dir), "init": "from_teacher", "layers": {"keep": [0]}},
            "loss": {"terms": [{"term": name}, {"term": "cross_entropy", "weight": 0.0}]}, "optimizer": {"lr": 1e-3},
        }  # fmt: skip
        result = train(train_config(cache, tiny_model_dir, tmp_path / name, **sections), show_progress=False)
        lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
        steps[name] = [line for line in lines if "loss" in line]
        assert steps[name][-1]["loss"] < 0.8 * steps[name][0]["loss"]
    first = steps["dual_space"][0]["terms"]
    assert first["dual_space.agreement"] == 1
    for part in ("to_student", "to_teacher"):  # the student's projection is the teacher's, and both maps the identity
        assert first[f"dual_space.{part}"] == pytest.approx(steps["exact_kl"][0]["loss"], rel=1e-4)
    assert [path.name for path in (result.out / "model").glob("*.safetensors")] == ["model.safetensors"]


def test_a_cache_without_the_projection_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    cache = capture(tmp_path / "capture", tiny_model_dir, sidecars=[])
    config = train_config(cache, tiny_model_dir, tmp_path / "out", loss={"terms": [{"term": "exact_kl"}]})
    with pytest.raises(ConfigError, match="needs the sidecar 'output_projection'"):
        train(config, show_progress=False)
