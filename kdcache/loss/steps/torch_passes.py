"""The passes over a chunk of logits in plain torch, in place; what they are for: `kdcache.loss.steps.step`.

float64 logits are worked on in float64, everything else in float32: half precision has its gradient rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.loss.steps.torch_positions import widened

# Logits that are worked on at a time. On a CPU temporaries of this size stay in its cache, those of a chunk do not; on a device
# three float32 ones of a chunk of 4096 positions would be several times the chunk, and of this size they are 64 MiB each.
_CPU_LOGITS, _DEVICE_LOGITS = 1 << 18, 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class TorchPasses:
    """See `kdcache.loss.steps.step.Passes`."""

    logits_CV: Tensor
    ids_CK1: Tensor

    def lift(self, left: float) -> Tensor:
        vocab_size = self.logits_CV.shape[1]
        lifted_CK1 = self.logits_CV.gather(1, self.ids_CK1.long().clamp(0, vocab_size - 1))
        self.put(torch.full_like(lifted_CK1, left))
        lifted_CK1 = self._working(lifted_CK1).masked_fill(self.ids_CK1 < 0, -torch.inf)
        return lifted_CK1.masked_fill(self.ids_CK1 >= vocab_size, torch.nan)

    def put(self, values_CK1: Tensor) -> None:
        """Where an id is not in the vocabulary, the first one gets its own value once more, or column 0 what it has.

        So the logits need not be copied.
        """
        is_id_CK1 = (self.ids_CK1 >= 0) & (self.ids_CK1 < self.logits_CV.shape[1])
        first_C1, has_id_C1 = is_id_CK1.int().argmax(dim=1, keepdim=True), is_id_CK1.any(dim=1, keepdim=True)
        index_CK1 = torch.where(is_id_CK1, self.ids_CK1, torch.where(has_id_C1, self.ids_CK1.gather(1, first_C1), 0)).long()
        values_CK1 = values_CK1.to(self.logits_CV.dtype)
        spare_C1 = torch.where(has_id_C1, values_CK1.gather(1, first_C1), self.logits_CV[:, :1])
        self.logits_CV.scatter_(1, index_CK1, torch.where(is_id_CK1, values_CK1, spare_C1))

    def statistics(self, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for block_CV in self._blocks():
            z_CV = self._working(block_CV)
            top_C = z_CV.amax(dim=1)
            shift_C = torch.where(top_C == -torch.inf, 0.0, top_C)
            total_C = z_CV.sum(dim=1) / temperature
            z_CV = _divided(z_CV - shift_C[:, None], temperature)
            parts.append((top_C / temperature, torch.where(top_C == -torch.inf, 1.0, z_CV.exp_().sum(dim=1)), total_C))
        top_C, sum_C, total_C = (widened(torch.cat(column)) for column in zip(*parts, strict=True))
        return top_C, top_C + sum_C.log(), total_C

    def write(self, temperature: float, per_position: list[Tensor], *, with_target_ids: bool) -> None:
        columns, start = [column[:, None] for column in per_position], 0
        for block_CV in self._blocks():
            part = slice(start, start + len(block_CV))
            start += len(block_CV)
            top_C1, factor_C1, offset_C1, target_top_C1, target_factor_C1, is_read_C1 = (column[part] for column in columns)
            z_CV = self._working(block_CV)
            target_CV = _scaled_exp(z_CV.clone(), target_top_C1, target_factor_C1) if with_target_ids else None
            if z_CV.dtype == block_CV.dtype:
                z_CV = z_CV.clone()
            gradient_CV = _scaled_exp(_divided(z_CV, temperature), top_C1, factor_C1).add_(offset_C1.to(z_CV.dtype))
            if target_CV is not None:
                gradient_CV += target_CV
            block_CV.copy_(gradient_CV.masked_fill_(~is_read_C1, 0.0))

    def _blocks(self) -> Iterator[Tensor]:
        at_once = _CPU_LOGITS if self.logits_CV.device.type == "cpu" else _DEVICE_LOGITS
        return iter(self.logits_CV.split(max(1, at_once // self.logits_CV.shape[1])))

    @staticmethod
    def _working(values: Tensor) -> Tensor:
        return values if values.dtype == torch.float64 else values.float()


def _divided(z_CV: Tensor, temperature: float) -> Tensor:
    """Overwrites them."""
    return z_CV if temperature == 1 else z_CV.div_(temperature)


def _scaled_exp(z_CV: Tensor, top_C1: Tensor, factor_C1: Tensor) -> Tensor:
    """factor * exp(z - top), in place."""
    shift_C1 = torch.where(top_C1 == -torch.inf, 0.0, top_C1).to(z_CV.dtype)
    return z_CV.sub_(shift_C1).exp_().mul_(factor_C1.to(z_CV.dtype))
