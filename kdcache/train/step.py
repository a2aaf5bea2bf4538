"""One step of training: packed forward, fused sparse loss, backward, AdamW."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from kdcache.config.train import OptimizerConfig, TrainConfig
from kdcache.loader.torch_batches import TorchBatch
from kdcache.train.batch_loss import BatchLoss
from kdcache.train.body import hidden_states, output_projection
from kdcache.train.packed import logits_head


def optimize(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: TorchBatch,
    config: TrainConfig,
    rate: float,
) -> tuple[float, float]:
    """One step: forward, loss, backward, clip, update.

    Args:
        model: in training mode; changed in place.
        optimizer: over its parameters; its learning rate is set.
        batch: on the model's device.
        config: dtype, loss and clipping.
        rate: learning rate of this step.

    Returns:
        The loss in nats per supervised position, and the gradient's norm before clipping. Where one of them is not finite,
        nothing was changed.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = student_loss(model, batch, config)
    loss.backward()
    largest = config.optimizer.grad_clip or float("inf")
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    found = float(loss.detach()), float(grad_norm)
    # A NaN in the gradient would be in every weight and both means for good.
    if all(map(math.isfinite, found)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return found


def student_loss(model: PreTrainedModel, batch: TorchBatch, config: TrainConfig) -> torch.Tensor:
    """The loss of a packed batch, a scalar per supervised position (nats, for the KLs); [P, V] logits never exist whole.

    On every device the loss fused with the output projection: numba on a CPU, torch on a GPU, unless `backend` says otherwise.
    """
    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        hidden_BTH = hidden_states(model, batch.input_ids_BT, batch.position_ids_BT)
    loss = BatchLoss(config.loss, logits_head(model))
    return loss(hidden_BTH, output_projection(model), batch, dtype=getattr(torch, config.dtype))


def make_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
