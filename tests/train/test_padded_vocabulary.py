"""Teacher and student with the same tokenizer and different padding: what no token uses is left out, counted, and no obstacle.

The tiny teacher has 520 ids, its tokenizer 512. Shape letters: P supervised positions, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from adapter_cases import OPTIONS, first_batches, make_student
from test_student_heads import own_logits
from train_caches import train_config, write_cache
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache.cli.main import main
from kdcache.config.train import LossConfig
from kdcache.errors import MismatchError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.soft_targets import SoftTargets
from kdcache.loader.loader import Loader
from kdcache.loss.padding import entries_within
from kdcache.train.adapters import StudentLoss
from kdcache.train.runs.run_folder import read_metrics
from kdcache.train.trainer import train

TOKENS = 512


def pretrained(folder: Path, tokenizer: Path, vocab_size: int) -> dict[str, Any]:
    """A folder of a student with weights, as a config names it."""
    make_student(vocab_size=vocab_size).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return {"model": str(folder), "init": "pretrained"}


def test_entries_that_are_no_tokens_become_mass_of_the_tail() -> None:
    ids_PK = torch.tensor([[3, 9, 7], [9, 1, 8]])
    logprobs_PK = torch.tensor([[0.5, 0.2, 0.1], [0.4, 0.3, 0.2]]).log()
    tail_P = torch.tensor([0.2, 0.5])
    within = entries_within(SoftTargets.of(ids_PK, logprobs_PK, tail_P, entries="exact", vocab_size=10), 8)
    assert within.teacher.token_ids_PK.tolist() == [[3, -1, 7], [-1, 1, -1]]
    assert within.teacher.vocab_size == 8
    torch.testing.assert_close(within.left_out_P, torch.tensor([0.2, 0.6]))
    torch.testing.assert_close(within.teacher.tail_mass_P, torch.tensor([0.4, 1.0]))
    # In the second row only the first entry is exact: the tail's mass holds what the estimates stand for.
    within = entries_within(SoftTargets.of(ids_PK, logprobs_PK, tail_P, entries="mixed", num_exact_P=torch.tensor([3, 1])), 8)
    torch.testing.assert_close(within.left_out_P, torch.tensor([0.2, 0.6]))
    torch.testing.assert_close(within.teacher.tail_mass_P, torch.tensor([0.4, 0.9]))


@pytest.mark.parametrize("tail", ["bucket", "drop", "renormalize"])
def test_the_loss_of_a_smaller_student_is_that_over_the_tokens(full_cache: Path, tail: str) -> None:
    """In words of torch alone: the teacher's 520 ids are in the cache, 8 of them are no tokens."""
    model, (batch,) = make_student(vocab_size=TOKENS), first_batches(full_cache, OPTIONS, 1)
    ids_PK, p_PK = batch.teacher.token_ids_PK.long(), batch.teacher.logprobs_PK.exp()
    teacher_PV = torch.zeros(len(ids_PK), 520).scatter(1, ids_PK, p_PK)
    log_q_PV = own_logits(model, batch).log_softmax(dim=-1)
    p_PV = teacher_PV[:, :TOKENS]
    if tail == "renormalize":
        p_PV = p_PV / p_PV.sum(dim=1, keepdim=True)
    wanted_P = (p_PV * (p_PV.log() - log_q_PV)).sum(dim=1)
    with Loader(str(full_cache), OPTIONS) as loader:
        found = StudentLoss(model, loader, LossConfig(tail=tail))(model, batch)
    torch.testing.assert_close(found, wanted_P.mean(), rtol=1e-4, atol=1e-6)


SELECTIONS = {
    "threshold": SelectionInfo(kind="threshold", params={"tau": 0.02, "seed": 1}),
    "sampled": SelectionInfo(kind="sampled", params={"num_draws": 40, "seed": 1}),
}


@pytest.mark.parametrize(("kind", "size"), [("top_k", 512), ("top_k", 544), ("threshold", 515), ("sampled", 512)])
def test_pretrained_pairs_of_either_padding_train_and_are_evaluated(
    tiny_model_dir: Path, heldout: Path, tmp_path: Path, size: int, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen: dict[str, Any] = {"selection": SELECTIONS[kind]} if kind in SELECTIONS else {"k": 520}
    cache = write_cache(tmp_path / "cache", tiny_model_dir, num_sequences=4, **chosen)
    loss = {"tail": "drop" if kind in SELECTIONS else "bucket"}
    student = pretrained(tmp_path / "student", tiny_model_dir, size)
    config = train_config(cache, tiny_model_dir, tmp_path / "run", student=student, loss=loss, steps=2)
    (tmp_path / "train.json").write_bytes(msgspec.json.encode(config))
    assert main(["train", str(tmp_path / "train.json")]) == 0
    assert ("ids that the student lacks" in capsys.readouterr().out) == (size < 520)
    masses = [line["padding_mass"] for line in read_metrics(tmp_path / "run") if "padding_mass" in line]
    assert len(masses) == (2 if size < 520 else 0)
    assert all(0 < mass < 0.1 for mass in masses)
    if kind != "top_k":
        return
    arguments = ("--teacher", str(tiny_model_dir), "--data", str(heldout), "--out", str(tmp_path / "out"))
    assert main(["evaluate", *arguments, "--student", f"kd={tmp_path / 'run'}", "--max-tokens", "60"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["inputs"]["vocabulary"] == min(size, 520)
    assert 0 < results["models"]["kd"]["kl"]["value"] < 20


def test_a_student_without_a_row_for_a_token_is_refused_and_the_advice_works(
    small_cache: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    def run(student: dict[str, Any]) -> None:
        train(train_config(small_cache, tiny_model_dir, tmp_path / "run", student=student, steps=1), show_progress=False)

    student = pretrained(tmp_path / "student", tiny_model_dir, 500)
    with pytest.raises(MismatchError, match=r"vocabulary of 500 .* 512 token ids .* resize_token_embeddings\(520\)"):
        run(student)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    model.resize_token_embeddings(520)
    model.save_pretrained(tmp_path / "student")
    run(student)

    other = {"model": str(tiny_model_dir), "overrides": {"vocab_size": 500}}
    with pytest.raises(MismatchError, match=r"set student.overrides.vocab_size to 520"):
        run(other)
    (tmp_path / "run").rename(tmp_path / "first")
    run(other | {"overrides": {"vocab_size": 520}})
