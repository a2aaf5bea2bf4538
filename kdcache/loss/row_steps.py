"""One backend's way from some rows of logits to their losses and gradients; what the chunks and the whole logits share.

Shape letters: P positions (rows), C some rows, K entries per position (padded), V the student's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kdcache.kernels import get_backend
from kdcache.kernels.base import Objective
from kdcache.loss import arguments
from kdcache.loss.arguments import TargetTensors
from kdcache.loss.bucket_rows import BucketStep
from kdcache.loss.torch_passes import TorchPasses
from kdcache.loss.triton_passes import TritonPasses


class RowStep(Protocol):
    """Rows of logits to their losses and gradients; made for all P rows, called for C of them."""

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> tuple[Tensor, Tensor]:
        """(C,) float64 losses of rows start.. times their scales; the gradient of their sum, maybe in the logits' memory."""
        ...


def make_step(backend: str, targets: TargetTensors, scales_P: Tensor, objective: Objective, vocab_size: int) -> RowStep:
    """The step of a backend that `arguments.choose_backend` has chosen.

    Raises:
        LossError: as `kdcache.kernels.base.make_targets`; on a device, values are not looked at.
    """
    if backend == "numba":
        return _NumbaStep(arguments.to_kernel_targets(targets, vocab_size, scales_P), objective)
    arguments.check_values(targets, vocab_size)
    return BucketStep(TritonPasses if backend == "triton" else TorchPasses, targets, objective, scales_P)


@dataclass(frozen=True, slots=True, eq=False)
class _NumbaStep:
    targets: arguments.Targets
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
