"""DPKD on a real capture of preference data: equal to both live models, counted in pairs, trained and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from train_caches import load_teacher_model, train_config

import kdcache
from kdcache.capture.executors.run import run_capture
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.config.loader import LoaderConfig
from kdcache.config.terms import TermConfig
from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError
from kdcache.loader.torch_batches import TorchLoader
from kdcache.loss.fused import Projection
from kdcache.train.adapters import StudentLoss
from kdcache.train.terms.base import StudentStates
from kdcache.train.terms.dpkd import DPKD
from kdcache.train.trainer import train


@pytest.fixture(scope="module")
def preferences(tiny_model_dir: Path, tmp_path_factory) -> Path:
    """Nine pairs and one answer alone, read by the tiny Llama through transformers."""
    folder = tmp_path_factory.mktemp("preferences")
    answers = [(n, f"def f{n}(x):\n    return x + {n}", f"def f{n}(x): pass  # {'no ' * (n % 4)}") for n in range(9)]
    items = [
        {"messages": [{"role": "user", "content": f"add {n}"}, {"role": "assistant", "content": text}], "prompt": n, "is": name}
        for n, chosen, rejected in answers
        for text, name in ((chosen, "chosen"), (rejected, "rejected"))
    ]
    items.append(items[0] | {"prompt": "alone"})
    (folder / "a.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    fields = {
        "input": {
            "format": "jsonl", "content": "messages", "paths": [str(folder / "a.jsonl")], "supervise": "assistant",
            "group_field": "prompt", "preference_field": "is", "window": {"size": 64, "policy": "truncate"},
        },
        "teacher": {"model": str(tiny_model_dir), "backend": "transformers", "dtype": "float32"},
        "selection": {"kind": "top_k", "k": 4}, "codec": {"id": "raw"}, "out": str(folder / "cache"),
    }  # fmt: skip
    run_capture(convert_config(fields, CaptureConfig))
    return folder / "cache"


def live_rows(batch) -> list[torch.Tensor]:
    """The ids of each sequence of a batch, in their order."""
    rows = zip(batch.input_ids_BT.long(), batch.segment_ids_BT, strict=True)
    return [ids_T[segments_T == segment] for ids_T, segments_T in rows for segment in segments_T.unique() if segment > 0]


def live_means(model, batch) -> torch.Tensor:
    """(S,) mean logprob of each answer's tokens, sequence by sequence."""
    targets = zip(batch.target_ids_BT.long(), batch.segment_ids_BT, strict=True)
    targets = [ids_T[segments_T == segment] for ids_T, segments_T in targets for segment in segments_T.unique() if segment > 0]
    means = []
    for ids_N, targets_N in zip(live_rows(batch), targets, strict=True):
        logprobs_NV = model(input_ids=ids_N[None]).logits[0].log_softmax(dim=1)
        has_target = targets_N >= 0
        means.append(logprobs_NV.gather(1, targets_N.clamp_min(0)[:, None])[:, 0][has_target].mean())
    return torch.stack(means)


def test_equals_both_live_models(preferences: Path, tiny_model_dir: Path) -> None:
    teacher = load_teacher_model(tiny_model_dir)
    torch.manual_seed(0)
    student = load_teacher_model(tiny_model_dir)
    with torch.no_grad():
        student.lm_head.weight.add_(0.05 * torch.randn_like(student.lm_head.weight))
    config = LoaderConfig(seq_len=128, batch_rows=4, pairs=True, with_target_logprobs=True)
    with kdcache.Loader(preferences, config) as loader:
        batch = next(iter(TorchLoader(loader)))
    term = DPKD(beta=0.5)
    term.check(loader.caches[0].manifest)
    with torch.no_grad():
        lq_S, lp_S = live_means(student, batch), live_means(teacher, batch)
    chosen, rejected = batch.pairs.T
    margins = (lq_S[chosen] - lq_S[rejected]) - (lp_S[chosen] - lp_S[rejected])
    right = -torch.nn.functional.logsigmoid(0.5 * margins).sum()
    hidden_BTH = student.model(input_ids=batch.input_ids_BT.long(), position_ids=batch.position_ids_BT.long(), use_cache=False)[
        0
    ]
    states = StudentStates(hidden_BTH.flatten(0, 1)[batch.flat_positions_P], Projection(student.lm_head.weight))
    found = term(states, batch, batch.weights_P)
    assert found.item() == pytest.approx(right.item(), rel=2e-5)
    assert term.count(batch, batch.weights_P).item() == len(batch.pairs) > 0
    assert term.measures() == {"pairs": len(batch.pairs), "unpaired": batch.num_sequences - 2 * len(batch.pairs)}


def test_a_training_counts_pairs_and_says_what_had_no_partner(preferences: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    terms = [{"term": "dpkd", "options": {"beta": 1.0}}, {"term": "cross_entropy", "weight": 0.0}]
    sections = {"loss": {"terms": terms}, "loader": {"seq_len": 128, "batch_rows": 2}, "steps": 6}
    whole = train(train_config(preferences, tiny_model_dir, tmp_path / "whole", **sections), show_progress=False)
    lines = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 6
    first = [step["terms"] for step in steps]
    assert sum(step["dpkd.pairs"] for step in first) > 9
    assert sum(step["dpkd.unpaired"] for step in first) >= 1
    assert steps[-1]["loss"] < steps[0]["loss"]
    train(train_config(preferences, tiny_model_dir, tmp_path / "cut", **sections | {"steps": 6}), show_progress=False)
    again = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert [line["loss"] for line in again if "loss" in line] == [line["loss"] for line in steps]


def test_a_cache_without_groups_is_refused(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = train_config(small_cache, tiny_model_dir, tmp_path, loss={"terms": [{"term": "dpkd"}]})
    with pytest.raises(ConfigError, match="does not say which answers belong to one prompt; capture it again"):
        train(config, show_progress=False)
    with pytest.raises(ValueError, match="beta is 0, but must be above 0"):
        DPKD(beta=0)


def test_an_adapter_whose_loader_has_no_pairs_is_told_how_to_make_it(preferences: Path, tiny_model_dir: Path) -> None:
    loss, student = LossConfig(terms=(TermConfig(term="dpkd"),)), load_teacher_model(tiny_model_dir)
    with (
        kdcache.Loader(preferences, LoaderConfig(seq_len=128, batch_rows=2)) as loader,
        pytest.raises(ConfigError, match=r"loader.pairs is False, and True, which is needed, gives other batches; make"),
    ):
        StudentLoss(student, loader, loss)
    with kdcache.Loader(preferences, LoaderConfig(seq_len=128, batch_rows=2, pairs=True)) as loader:
        loss_of = StudentLoss(student, loader, loss)
        batch = next(iter(TorchLoader(loader)))
        loss_of(student, batch).backward()
        assert loss_of.report()["dpkd.pairs"] == len(batch.pairs)
