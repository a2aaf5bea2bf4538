"""One step of training: a batch's loss, which the trainer and the adapters have in common, its backward, and AdamW."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.config.train import LossConfig, OptimizerConfig, TrainConfig
from kdcache.format.manifest import Manifest
from kdcache.format.soft_targets import SoftTargets
from kdcache.half_precision import is_emulated
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.chunks import Head
from kdcache.loss.fused import PLAIN_HEAD, Projection
from kdcache.loss.padding import entries_within
from kdcache.train.body import hidden_states, output_projection
from kdcache.train.packed import logits_head
from kdcache.train.terms.base import StudentStates
from kdcache.train.terms.engine import LossTerms
from kdcache.train.terms.inner import Seen, complete, reading


def check_loss(config: LossConfig, manifest: Manifest) -> None:
    """Refuse, before anything is trained, a loss for which a cache is not enough.

    Raises:
        LossError: an unknown divergence or parameter, or a loss that would be wrong for the selection.
        ConfigError: a temperature for which the cache has no normalisers, or a term that lacks something in it.
    """
    LossTerms(config).check(manifest)


class BatchLoss:
    """The terms of a loss for a batch of a student's states, the sparse ones fused with the output projection.

    Args:
        config: what is minimised.
        scaled: what the model does with the projection's product, see `logits_head`.
    """

    def __init__(self, config: LossConfig, scaled: Head = PLAIN_HEAD) -> None:
        self.config, self.scaled, self.terms = config, scaled, LossTerms(config)

    def weights_P(self, batch: TorchBatch) -> Tensor:
        """(P,) what each position counts in a mean, see `LossTerms.weights_P`."""
        return self.terms.weights_P(batch)

    def __call__(
        self,
        hidden_BTH: Tensor,
        head: torch.nn.Linear,
        batch: TorchBatch,
        *,
        dtype: torch.dtype,
        inner: Seen | None = None,
        **how: Any,
    ) -> Tensor:
        """A scalar in nats (for the KLs); [P, V] logits never exist whole.

        Args:
            hidden_BTH: what the output projection reads, at every slot of the batch.
            head: the output projection; its weight must be whole.
            batch: on hidden's device.
            dtype: of the matrix products; a float32 weight stays as it is where the CPU only emulates this dtype.
            inner: what terms read of the student's layers, as `reading` gives it.
            how: scale, step and numbers by position, as `LossTerms.forward` takes them.
        """
        # Under autocast a norm's output is float32, as its weight; but the projection is most of a small student's work.
        if head.weight.dtype == torch.float32 and is_emulated(dtype, hidden_BTH.device.type):
            dtype = torch.float32
        num_ids = len(head.weight)
        projection = Projection(
            head.weight.to(dtype),
            None if head.bias is None else head.bias.to(dtype),
            self._head(batch.teacher, num_ids),
            self.config.chunk_positions,
        )
        student = StudentStates(
            hidden_BTH.flatten(0, -2).index_select(0, batch.flat_positions_P).to(dtype),
            projection,
            batch.flat_positions_P,
            complete(inner or Seen(), self.terms.reads, hidden_BTH),
        )
        if _has_padding(batch.teacher, num_ids):
            batch = replace(batch, teacher=entries_within(batch.teacher, num_ids).teacher)
        return self.terms(student, batch, **how)

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
    loss_of: BatchLoss | None = None,
    at: tuple[int, int] = (0, 1),
) -> tuple[float, float]:
    """One step: forward, loss, backward, clip, update.

    Args:
        model: in training mode; changed in place.
        optimizer: over its parameters; its learning rate is set.
        batch: on the model's device.
        config: dtype, loss and clipping.
        rate: learning rate of this step.
        loss_of: of the run, whose terms may have parameters of their own; None makes one.
        at: the step, and the number of steps, see `LossTerms.forward`.

    Returns:
        The loss in nats per supervised position, and the gradient's norm before clipping. Where one of them is not finite,
        nothing was changed.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(_TIMES, 1.0)
    loss = student_loss(model, batch, config, loss_of, at)
    loss.backward()
    largest = config.optimizer.grad_clip or float("inf")
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(learned, largest)
    found = float(loss.detach()), float(grad_norm)
    # A NaN in the gradient would be in every weight and both means for good.
    if all(map(math.isfinite, found)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return found


def student_loss(
    model: PreTrainedModel,
    batch: TorchBatch,
    config: TrainConfig,
    loss_of: BatchLoss | None = None,
    at: tuple[int, int] = (0, 1),
) -> torch.Tensor:
    """The loss of a packed batch, a scalar per supervised position (nats, for the KLs); [P, V] logits never exist whole.

    On every device the loss fused with the output projection: numba on a CPU, torch on a GPU, unless `backend` says otherwise.
    """
    loss_of = loss_of or BatchLoss(config.loss, logits_head(model))
    with (
        torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"),
        reading(model, loss_of.terms.reads) as inner,
    ):
        hidden_BTH = hidden_states(model, batch.input_ids_BT, batch.position_ids_BT)
    return loss_of(hidden_BTH, output_projection(model), batch, dtype=getattr(torch, config.dtype), inner=inner, at=at)


def make_optimizer(
    model: torch.nn.Module, config: OptimizerConfig, terms: torch.nn.Module | None = None, projector_lr: float = 1e-3
) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone, and none on what terms of the loss learn, which has a rate of its own."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    projectors = [] if terms is None else list(terms.parameters())
    if projectors:
        groups.append({"params": projectors, "weight_decay": 0.0, _TIMES: projector_lr / config.lr})
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


_TIMES = "times_rate"
"""Of a group of parameters: its learning rate as a multiple of the others'."""
