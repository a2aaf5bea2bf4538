"""A tiny student and loader for the tests of the adapters, and the plain loop that they are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kdcache.config.loader import LoaderConfig
from kdcache.config.train import LossConfig
from kdcache.loader.loader import Loader
from kdcache.loader.torch_batches import TorchBatch, to_torch
from kdcache.train.adapters import StudentLoss

OPTIONS = LoaderConfig(seq_len=64, batch_rows=2, num_threads=1, seed=3)
FOUR_ROWS = LoaderConfig(seq_len=64, batch_rows=4, num_threads=1, seed=3)
LR = 5e-3

ONE_LAYER: dict[str, Any] = {
    "vocab_size": 520,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def make_student(**changes: Any) -> PreTrainedModel:
    """One layer, always the same weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(ONE_LAYER | changes))).train()


def first_batches(cache: Path, options: LoaderConfig, num_batches: int) -> list[TorchBatch]:
    """Of the stream over all epochs, one rank."""
    batches: list[TorchBatch] = []
    with Loader(cache, options) as loader:
        while len(batches) < num_batches:
            batches += [to_torch(batch) for batch in loader]
    return batches[:num_batches]


def plain_losses(
    cache: Path, options: LoaderConfig, num_steps: int, *, accumulated: int = 1, loss: LossConfig | None = None
) -> list[float]:
    """Losses of a plain loop in one process: AdamW without decay, no clipping, constant rate; each step's mean over all
    positions of its batches."""
    model = make_student()
    batches, losses = first_batches(cache, options, num_steps * accumulated), []
    with Loader(cache, options) as loader:
        loss_of = StudentLoss(model, loader, loss or LossConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for step in range(num_steps):
        of_step = batches[step * accumulated : (step + 1) * accumulated]
        scale, total, loss_of.at = loss_of.scale(of_step), 0.0, (step, num_steps)
        for batch in of_step:
            part = loss_of(model, batch, scale)
            part.backward()
            total += float(part.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses
