"""The passes over a chunk of logits as Triton kernels; what they are for: `kdcache.loss.steps.step`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Triton 3.10 is to change what it does where this is left open, and 3.9 warns of it.
_COMPILED = {"enable_fp_fusion": True}


@dataclass(frozen=True, slots=True, eq=False)
class TritonPasses:
    """See `kdcache.loss.steps.step.Passes`; logits in float32, bfloat16 or float16, C-contiguous."""

    logits_CV: Tensor
    ids_CK1: Tensor

    def lift(self, left: float) -> Tensor:
        kernels = _kernels()
        lifted_CK1 = torch.empty(self.ids_CK1.shape, dtype=torch.float32, device=self.ids_CK1.device)
        kernels.lift[(len(lifted_CK1),)](
            self.logits_CV, self.logits_CV.stride(0), self.ids_CK1, lifted_CK1, left, **self._sizes()
        )
        return lifted_CK1

    def put(self, values_CK1: Tensor) -> None:
        _kernels().put[(len(values_CK1),)](
            self.logits_CV, self.logits_CV.stride(0), self.ids_CK1, values_CK1.float().contiguous(), **self._sizes()
        )

    def statistics(self, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        kernels, num_positions = _kernels(), len(self.logits_CV)
        outputs = [torch.empty(num_positions, dtype=torch.float32, device=self.ids_CK1.device) for _ in range(3)]
        kernels.tail_statistics[(num_positions,)](
            self.logits_CV, self.logits_CV.stride(0), 1 / temperature, *outputs, self.logits_CV.shape[1], **self._block()
        )
        top_C, sum_C, total_C = (output.double() for output in outputs)
        return top_C, top_C + sum_C.log(), total_C

    def write(self, temperature: float, per_position: list[Tensor], *, with_target_ids: bool) -> None:
        kernels = _kernels()
        kernels.write_gradient[(len(self.logits_CV),)](
            self.logits_CV,
            self.logits_CV.stride(0),
            1 / temperature,
            *[column.float().contiguous() for column in per_position],
            self.logits_CV.shape[1],
            WITH_TARGET_IDS=with_target_ids,
            **self._block(),
        )

    def _sizes(self) -> dict[str, Any]:
        num_ids = self.ids_CK1.shape[1]
        sizes = {"V": self.logits_CV.shape[1], "NUM_IDS": num_ids, "BLOCK_IDS": 1 << (num_ids - 1).bit_length()}
        return sizes | _COMPILED

    def _block(self) -> dict[str, Any]:
        kernels = _kernels()
        return {"BLOCK": kernels.BLOCK_SIZE, "num_warps": kernels.NUM_WARPS} | _COMPILED


def _kernels() -> Any:
    from kdcache.kernels import triton_kernels

    return triton_kernels
