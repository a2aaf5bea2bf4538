"""The passes over a chunk of logits in plain torch, in place; what they are for: `kdcache.loss.bucket_rows`.

Shape letters: C rows, L lifted ids per row, V the student's vocabulary.

float64 logits are worked on in float64, everything else in float32: half precision has its gradient rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.loss.torch_rows import widened

# Logits that are worked on at a time. On a CPU temporaries of this size stay in its cache, those of a chunk do not; on a device
# three float32 ones of a chunk of 4096 rows would be several times the chunk, and of this size they are 64 MiB each.
_CPU_LOGITS, _DEVICE_LOGITS = 1 << 18, 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class TorchPasses:
    """See `kdcache.loss.bucket_rows.Passes`."""

    logits_CV: Tensor
    ids_CL: Tensor

    def lift(self, left: float) -> Tensor:
        vocab_size = self.logits_CV.shape[1]
        lifted_CL = self.logits_CV.gather(1, self.ids_CL.long().clamp(0, vocab_size - 1))
        self.put(torch.full_like(lifted_CL, left))
        lifted_CL = self._working(lifted_CL).masked_fill(self.ids_CL < 0, -torch.inf)
        return lifted_CL.masked_fill(self.ids_CL >= vocab_size, torch.nan)

    def put(self, values_CL: Tensor) -> None:
        """Where there is no id of the vocabulary, the row's first one gets its own value once more, or column 0 what it has.

        So the row need not be copied.
        """
        is_id_CL = (self.ids_CL >= 0) & (self.ids_CL < self.logits_CV.shape[1])
        first_C1, has_id_C1 = is_id_CL.int().argmax(dim=1, keepdim=True), is_id_CL.any(dim=1, keepdim=True)
        place_CL = torch.where(is_id_CL, self.ids_CL, torch.where(has_id_C1, self.ids_CL.gather(1, first_C1), 0)).long()
        values_CL = values_CL.to(self.logits_CV.dtype)
        spare_C1 = torch.where(has_id_C1, values_CL.gather(1, first_C1), self.logits_CV[:, :1])
        self.logits_CV.scatter_(1, place_CL, torch.where(is_id_CL, values_CL, spare_C1))

    def statistics(self, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for block_BV in self._blocks():
            z_BV = self._working(block_BV)
            top_B = z_BV.amax(dim=1)
            shift_B = torch.where(top_B == -torch.inf, 0.0, top_B)
            total_B = z_BV.sum(dim=1) / temperature
            z_BV = _divided(z_BV - shift_B[:, None], temperature)
            parts.append((top_B / temperature, torch.where(top_B == -torch.inf, 1.0, z_BV.exp_().sum(dim=1)), total_B))
        top_C, sum_C, total_C = (widened(torch.cat(column)) for column in zip(*parts, strict=True))
        return top_C, top_C + sum_C.log(), total_C

    def write(self, temperature: float, per_row: list[Tensor], *, with_labels: bool) -> None:
        columns, start = [column[:, None] for column in per_row], 0
        for block_BV in self._blocks():
            part = slice(start, start + len(block_BV))
            start += len(block_BV)
            top_B1, factor_B1, offset_B1, label_top_B1, label_factor_B1, is_read_B1 = (column[part] for column in columns)
            z_BV = self._working(block_BV)
            label_BV = _scaled_exp(z_BV.clone(), label_top_B1, label_factor_B1) if with_labels else None
            if z_BV.dtype == block_BV.dtype:
                z_BV = z_BV.clone()
            gradient_BV = _scaled_exp(_divided(z_BV, temperature), top_B1, factor_B1).add_(offset_B1.to(z_BV.dtype))
            if label_BV is not None:
                gradient_BV += label_BV
            block_BV.copy_(gradient_BV.masked_fill_(~is_read_B1, 0.0))

    def _blocks(self) -> Iterator[Tensor]:
        at_once = _CPU_LOGITS if self.logits_CV.device.type == "cpu" else _DEVICE_LOGITS
        return iter(self.logits_CV.split(max(1, at_once // self.logits_CV.shape[1])))

    @staticmethod
    def _working(values: Tensor) -> Tensor:
        return values if values.dtype == torch.float64 else values.float()


def _divided(z_BV: Tensor, temperature: float) -> Tensor:
    """In place."""
    return z_BV if temperature == 1 else z_BV.div_(temperature)


def _scaled_exp(z_BV: Tensor, top_B1: Tensor, factor_B1: Tensor) -> Tensor:
    """factor * exp(z - top), in place."""
    shift_B1 = torch.where(top_B1 == -torch.inf, 0.0, top_B1).to(z_BV.dtype)
    return z_BV.sub_(shift_B1).exp_().mul_(factor_B1.to(z_BV.dtype))
