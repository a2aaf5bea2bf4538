"""A run's loss, of a batch's hidden states: what the trainer and the adapters have in common.

Shape letters: B rows, T tokens per row, P supervised positions, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcache.config.train import LossConfig
from kdcache.half_precision import is_emulated
from kdcache.loader._torch import TorchBatch
from kdcache.loader.batches.batch import NO_TARGET
from kdcache.loss.chunks import Head
from kdcache.loss.fused import PLAIN_HEAD, fused_sparse_kd_loss
from kdcache.loss.padding import EntriesWithin, entries_within
from kdcache.train.entries import PLAIN, EntryMeaning


@dataclass(frozen=True, slots=True)
class RowLoss:
    """The sparse loss fused with the output projection, as configured, for entries of one meaning.

    Attributes:
        config: what is minimised.
        meaning: of the batches' entries.
        scaled: what the model does with the projection's product, see `logits_head`.
    """

    config: LossConfig
    meaning: EntryMeaning = PLAIN
    scaled: Head = PLAIN_HEAD

    def weights_P(self, batch: TorchBatch) -> Tensor:
        """(P,) what each position counts in a mean.

        A sequence's last position has a teacher but no label: it must not count in a mean of cross-entropies alone.
        """
        if self.config.alpha == 0:
            return batch.weights_P * (_labels_P(batch) != NO_TARGET)
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
            hidden_BTH: what the output projection reads, at every place of the batch.
            head: the output projection; its weight must be whole.
            batch: on hidden's device.
            dtype: of the matrix products; a float32 weight stays as it is where the CPU only emulates this dtype.
            reduction: `mean`, over the batch's positions by weight, or `sum`.
        """
        # Under autocast a norm's output is float32, as its weight; but the projection is most of a small student's work.
        if head.weight.dtype == torch.float32 and is_emulated(dtype, hidden_BTH.device.type):
            dtype = torch.float32
        hidden_PH = hidden_BTH.flatten(0, -2).index_select(0, batch.flat_positions_P).to(dtype)
        teacher, of_teacher = (None, None, None), {}
        if self.config.alpha > 0:
            teacher, of_teacher = self._teacher(batch, len(head.weight)), self._teacher_options(batch)
        return fused_sparse_kd_loss(
            hidden_PH,
            head.weight.to(dtype),
            *teacher,
            bias=None if head.bias is None else head.bias.to(dtype),
            head=self._head(len(head.weight)),
            target_ids_P=_labels_P(batch),
            weights_P=self.weights_P(batch),
            alpha=self.config.alpha,
            reduction=reduction,
            backend=self.config.backend,
            chunk_size=self.config.chunk_positions,
            **of_teacher,
        )

    def _head(self, num_rows: int) -> Head:
        """Without the rows of the projection that stand for no id of the cache's vocabulary, unless they are to be trained."""
        known = self.meaning.vocab_size
        is_padded = known is not None and known < num_rows and not self.config.train_padding
        return replace(self.scaled, float32_logits=self.config.float32_logits, vocab_size=known if is_padded else None)

    def padding_mass(self, batch: TorchBatch, num_rows: int) -> float | None:
        """The mean mass of entries whose ids the student does not have, see `entries_within`; None where it has all."""
        if self.meaning.vocab_size is None or self.meaning.vocab_size <= num_rows:
            return None
        left_out_P = self._within(batch, num_rows).left_out_P
        return float(left_out_P.mean()) if len(left_out_P) else 0.0

    def _teacher(self, batch: TorchBatch, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, logprobs and tail; without the entries of ids that the student does not have, see `check_against_cache`."""
        if self.meaning.vocab_size is None or self.meaning.vocab_size <= num_rows:
            return batch.token_ids_PK, batch.logprobs_PK, batch.tail_mass_P
        within = self._within(batch, num_rows)
        return within.token_ids_PK, batch.logprobs_PK, within.tail_mass_P

    def _within(self, batch: TorchBatch, num_rows: int) -> EntriesWithin:
        teacher = (batch.token_ids_PK, batch.logprobs_PK, batch.tail_mass_P)
        return entries_within(num_rows, *teacher, num_exact_P=batch.num_exact_P)

    def _teacher_options(self, batch: TorchBatch) -> dict[str, Any]:
        log_z_PC, column = batch.log_z_PC, self.meaning.log_z_column
        return {
            "divergence": self.meaning.divergence,
            "tail": self.config.tail,
            "temperature": self.config.temperature,
            "log_z_P": None if log_z_PC is None or column is None else log_z_PC[:, column],
            "targets": self.meaning.targets,
            "num_exact_P": batch.num_exact_P,
        }


def _labels_P(batch: TorchBatch) -> Tensor:
    return batch.target_ids_BT.flatten()[batch.flat_positions_P]
