"""One backend's way from some positions' logits to their losses and gradients; what the chunks and the whole logits share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kdcache.kernels import get_backend
from kdcache.kernels.base import Objective, Targets
from kdcache.loss.bucket_rows import BucketStep
from kdcache.loss.prepare import Prepared, check_values, to_kernel_targets
from kdcache.loss.torch_passes import TorchPasses
from kdcache.loss.triton_passes import TritonPasses


class RowStep(Protocol):
    """Rows of logits to their losses and gradients; made for all P rows, called for C of them."""

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> tuple[Tensor, Tensor]:
        """(C,) float64 losses of rows start.. times their scales; the gradient of their sum, maybe in the logits' memory."""
        ...


def make_step(ready: Prepared, vocab_size: int) -> RowStep:
    """The step of the backend that was chosen.

    Raises:
        LossError: as `kdcache.kernels.base.make_targets`; on a device, values are not looked at.
    """
    if ready.backend == "numba":
        return _NumbaStep(to_kernel_targets(ready, vocab_size), ready.objective)
    check_values(ready, vocab_size)
    return BucketStep(TritonPasses if ready.backend == "triton" else TorchPasses, ready)


@dataclass(frozen=True, slots=True, eq=False)
class _NumbaStep:
    targets: Targets
    objective: Objective

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> tuple[Tensor, Tensor]:
        part, losses_C = self.targets.rows(start, start + len(logits_CV)), np.empty(len(logits_CV))
        kernels = get_backend("numba")
        run = kernels.row_losses_and_gradients if want_gradient else kernels.row_losses
        run(kernel_view(logits_CV), part, self.objective, losses_C, torch.get_num_threads())
        return torch.from_numpy(losses_C * part.weights_P), logits_CV


def kernel_view(logits_PV: Tensor) -> np.ndarray:
    """The same memory as the kernels take it: float32, or the bits of bfloat16 as uint16."""
    return (logits_PV.view(torch.uint16) if logits_PV.dtype == torch.bfloat16 else logits_PV).numpy()
