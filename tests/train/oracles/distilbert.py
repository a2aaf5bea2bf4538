"""Prints what DistilBERT's own training step gives on a toy: the numbers of `test_triple_loss.py`.

    python tests/train/oracles/distilbert.py REPOSITORY

REPOSITORY is a clone of huggingface/transformers-research-projects (numbers made at fccd0cd, distillation/distiller.py), whose
step is run with causal labels, as for DistilGPT2.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch

LENGTHS = (5, 4)
WIDTH = 6


def toy() -> dict[str, torch.Tensor]:
    """Numbers that anybody can make again: sines of squares. Two sequences in rows of six slots."""

    def sines(*shape: int, step: float) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return 1.5 * torch.sin(step * torch.arange(1, count + 1, dtype=torch.float64) ** 2).reshape(shape)

    return {
        "student_states": sines(2, WIDTH, 4, step=0.7),
        "teacher_states": sines(2, WIDTH, 4, step=1.3),
        "student_head": sines(9, 4, step=2.1),
        "teacher_head": sines(9, 4, step=0.9),
        "ids": (torch.arange(2 * WIDTH).reshape(2, WIDTH) * 5 + 3) % 9,
    }


def positions() -> torch.Tensor:
    """(2, width) the positions that have a target: all but each sequence's last."""
    return torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None] - 1


def distiller(repository: Path):
    """Their class; what it imports for reading data and logging is left out."""
    path = "distillation/distiller.py"
    text = subprocess.run(["git", "-C", repository, "show", f"HEAD:{path}"], capture_output=True, check=True).stdout
    for name in ("transformers", "grouped_batch_sampler", "lm_seqs_dataset", "utils", "psutil", "torch.utils.tensorboard"):
        sys.modules[name] = MagicMock()
    module = types.ModuleType("distiller")
    exec(compile(text, path, "exec"), module.__dict__)
    return module.Distiller


def run(repository: Path) -> dict[str, float]:
    numbers = toy()
    states, head = numbers["student_states"].requires_grad_(), numbers["student_head"].requires_grad_()

    def model(states: torch.Tensor, head: torch.Tensor):
        return lambda **_: {"logits": states @ head.T, "hidden_states": [states]}

    found = {}
    this = types.SimpleNamespace(
        mlm=False, student=model(states, head), teacher=model(numbers["teacher_states"], numbers["teacher_head"]),
        params=types.SimpleNamespace(restrict_ce_to_mask=False), temperature=2.0, alpha_ce=5.0, alpha_mlm=0.0, alpha_clm=2.0,
        alpha_mse=0.0, alpha_cos=1.0, ce_loss_fct=torch.nn.KLDivLoss(reduction="batchmean"), total_loss_epoch=0.0,
        lm_loss_fct=torch.nn.CrossEntropyLoss(ignore_index=-100), n_sequences_epoch=0,
        cosine_loss_fct=torch.nn.CosineEmbeddingLoss(reduction="mean"), optimize=lambda loss: found.update(loss=loss),
    )  # fmt: skip
    labels = torch.where(torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None], numbers["ids"], -100)
    distiller(repository).step(this, numbers["ids"], positions(), labels)
    loss = found["loss"]
    loss.backward()
    return {
        "kl": this.last_loss_ce, "cross_entropy": this.last_loss_clm, "cosine": this.last_loss_cos, "loss": loss.item(),
        "states_gradient": states.grad.norm().item(), "head_gradient": head.grad.norm().item(),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1])), indent=1))
