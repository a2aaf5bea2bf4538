"""One step of training: packed forward, fused sparse loss, backward, AdamW.

Shape letters: B rows, T tokens per row, P supervised positions, K entries per position, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from kdcache.config.train import OptimizerConfig, TrainConfig
from kdcache.loader._torch import TorchBatch
from kdcache.loader.batch import IGNORED_LABEL
from kdcache.loss.fused import fused_sparse_kd_loss
from kdcache.train.entries import PLAIN, EntryMeaning
from kdcache.train.packed import hidden_states, output_projection


def optimize(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: TorchBatch,
    config: TrainConfig,
    rate: float,
    meaning: EntryMeaning = PLAIN,
) -> tuple[float, float]:
    """One step: forward, loss, backward, clip, update.

    Args:
        model: in training mode; changed in place.
        optimizer: over its parameters; its learning rate is set.
        batch: on the model's device.
        config: dtype, loss and clipping.
        rate: learning rate of this step.
        meaning: of the batch's entries.

    Returns:
        The loss in nats per supervised position, and the gradient's norm before clipping.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = student_loss(model, batch, config, meaning)
    loss.backward()
    largest = config.optimizer.grad_clip or float("inf")
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()), float(grad_norm)


def student_loss(model: PreTrainedModel, batch: TorchBatch, config: TrainConfig, meaning: EntryMeaning = PLAIN) -> torch.Tensor:
    """The loss of a packed batch, a scalar per supervised position (nats, for the KLs); [P, V] logits never exist whole.

    On every device the loss fused with the output projection: numba on a CPU, torch on a GPU, unless `backend` says otherwise.
    """
    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        hidden_BTH = hidden_states(model, batch.input_ids_BT, batch.position_ids_BT)
    # Under autocast a norm's output is float32, as its weight; but the projection is most of a small student's work.
    hidden_PH = hidden_BTH.flatten(0, 1).index_select(0, batch.rows_P).to(getattr(torch, config.dtype))
    head = output_projection(model)
    labels_P = batch.labels_BT.flatten()[batch.rows_P]
    teacher, weights_P, of_teacher = (batch.token_ids_PK, batch.logprobs_PK, batch.tail_mass_P), batch.weights_P, {}
    if config.loss.alpha == 0:
        # A sequence's last position has a teacher but no label: it must not count in a mean of cross-entropies.
        teacher, weights_P = (None, None, None), weights_P * (labels_P != IGNORED_LABEL)
    else:
        of_teacher = _teacher_options(batch, config, meaning)
    return fused_sparse_kd_loss(
        hidden_PH,
        head.weight.to(hidden_PH.dtype),
        *teacher,
        bias=None if head.bias is None else head.bias.to(hidden_PH.dtype),
        labels_P=labels_P,
        weights_P=weights_P,
        alpha=config.loss.alpha,
        backend=config.loss.backend,
        chunk_size=config.loss.positions_per_chunk,
        **of_teacher,
    )


def _teacher_options(batch: TorchBatch, config: TrainConfig, meaning: EntryMeaning) -> dict[str, Any]:
    log_z_PC, column = batch.log_z_PC, meaning.log_z_column
    return {
        "divergence": meaning.divergence,
        "tail": config.loss.tail,
        "temperature": config.loss.temperature,
        "log_z_P": None if log_z_PC is None or column is None else log_z_PC[:, column],
        "targets": meaning.targets,
        "num_exact_P": batch.num_exact_P,
    }


def make_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
