"""One step of training: a batch's loss, which the trainer and the adapters have in common, its backward, and AdamW."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.config.train import LossConfig, OptimizerConfig, TrainConfig
from kdcache.errors import ConfigError
from kdcache.format.manifest import Manifest
from kdcache.format.soft_targets import SoftTargets
from kdcache.half_precision import is_emulated
from kdcache.kernels.divergences import Divergence, get_divergence
from kdcache.loader.batches.batch import NO_TARGET
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.chunks import Head
from kdcache.loss.fused import PLAIN_HEAD, Projection, fused_sparse_kd_loss
from kdcache.loss.padding import entries_within
from kdcache.loss.prepare import LossSettings
from kdcache.loss.selection_rules import reading_for
from kdcache.train.body import hidden_states, output_projection
from kdcache.train.packed import logits_head
from kdcache.train.terms.base import StudentStates
from kdcache.train.terms.engine import check_terms, sum_of_terms


def check_loss(config: LossConfig, manifest: Manifest) -> None:
    """Refuse, before anything is trained, a loss for which a cache is not enough.

    Raises:
        LossError: an unknown divergence or parameter, or a loss that would be wrong for the selection.
        ConfigError: a temperature for which the cache has no normalisers, or a term that lacks something in it.
    """
    check_terms(config.terms, manifest)
    divergence, selection = _divergence(config), manifest.identity.selection
    if config.alpha == 0:
        return
    reading_for(selection.kind, divergence, tail=config.tail, temperature=config.temperature)
    if config.temperature != 1 and config.temperature not in selection.temperatures:
        stored = ", ".join(map(str, sorted({1.0, *selection.temperatures})))
        raise ConfigError(
            f"loss.temperature is {config.temperature}, but the cache was captured for {stored}: another temperature cannot be "
            f"added afterwards; use one of these, or capture again with it in selection.temperatures"
        )


def _divergence(config: LossConfig) -> Divergence:
    return get_divergence(config.divergence, **config.divergence_options)


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """The sparse loss fused with the output projection, as configured.

    Attributes:
        config: what is minimised.
        scaled: what the model does with the projection's product, see `logits_head`.
    """

    config: LossConfig
    scaled: Head = PLAIN_HEAD

    def weights_P(self, batch: TorchBatch) -> Tensor:
        """(P,) what each position counts in a mean.

        A sequence's last position has a teacher but no target id: it must not count in a mean of cross entropies alone.
        """
        if self.config.alpha == 0:
            return batch.weights_P * (batch.target_ids_P != NO_TARGET)
        return batch.weights_P

    def __call__(
        self,
        hidden_BTH: Tensor,
        head: torch.nn.Linear,
        batch: TorchBatch,
        *,
        dtype: torch.dtype,
        reduction: str = "mean",
    ) -> Tensor:
        """A scalar in nats (for the KLs); [P, V] logits never exist whole.

        Args:
            hidden_BTH: what the output projection reads, at every slot of the batch.
            head: the output projection; its weight must be whole.
            batch: on hidden's device.
            dtype: of the matrix products; a float32 weight stays as it is where the CPU only emulates this dtype.
            reduction: `mean`, over the batch's positions by weight, or `sum`.
        """
        # Under autocast a norm's output is float32, as its weight; but the projection is most of a small student's work.
        if head.weight.dtype == torch.float32 and is_emulated(dtype, hidden_BTH.device.type):
            dtype = torch.float32
        config, num_ids = self.config, len(head.weight)
        projection = Projection(
            head.weight.to(dtype),
            None if head.bias is None else head.bias.to(dtype),
            self._head(batch.teacher, num_ids),
            config.chunk_positions,
        )
        hidden_PH = hidden_BTH.flatten(0, -2).index_select(0, batch.flat_positions_P).to(dtype)
        weights_P = self.weights_P(batch)
        loss = fused_sparse_kd_loss(
            hidden_PH,
            projection,
            entries_within(batch.teacher, num_ids).teacher if _has_padding(batch.teacher, num_ids) else batch.teacher,
            divergence=_divergence(config),
            alpha=config.alpha,
            temperature=config.temperature,
            target_ids=batch.target_ids_P,
            weights=weights_P,
            settings=LossSettings(tail=config.tail, reduction=reduction, backend=config.backend),
        )
        if not config.terms:
            return loss
        total = sum_of_terms(config.terms, StudentStates(hidden_PH, projection), batch, weights_P)
        return loss + (total if reduction == "sum" else total / weights_P.sum().clamp_min(torch.finfo(total.dtype).tiny))

    def padding_mass(self, batch: TorchBatch, num_ids: int) -> float | None:
        """The mean mass of entries whose ids the student does not have, see `entries_within`; None where it has all."""
        if not _has_padding(batch.teacher, num_ids):
            return None
        left_out_P = entries_within(batch.teacher, num_ids).left_out_P
        return float(left_out_P.mean()) if len(left_out_P) else 0.0

    def _head(self, teacher: SoftTargets[Tensor], num_ids: int) -> Head:
        """Without the projection's lines that stand for no id of the cache's vocabulary, unless they are to be trained."""
        known = teacher.vocab_size
        is_padded = known is not None and known < num_ids and not self.config.train_padding
        return replace(self.scaled, float32_logits=self.config.float32_logits, vocab_size=known if is_padded else None)


def _has_padding(teacher: SoftTargets[Tensor], num_ids: int) -> bool:
    """Whether the teacher has ids beyond the student's, see `check_against_cache`."""
    return teacher.vocab_size is not None and teacher.vocab_size > num_ids


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
