"""The mean over all positions of all ranks and accumulated batches, where each rank sees only its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def global_weight(weights_P: Tensor | Iterable[Tensor], *, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of the weights of all ranks: what `reduction="sum"` losses are divided by to be a mean over the whole batch.

    A collective where torch.distributed is initialised: every rank calls it, ranks without a position too.

    Args:
        weights_P: of this rank, of one batch or of each of those whose gradients are accumulated.
        group: the data-parallel ranks; None for all.

    Returns:
        A float64 scalar (float32 on devices without float64), the same on all ranks.
    """
    parts = [weights_P] if isinstance(weights_P, Tensor) else list(weights_P)
    dtype = torch.float32 if parts[0].device.type == "mps" else torch.float64
    total = torch.stack([part.detach().to(dtype).sum() for part in parts]).sum()
    if _is_parallel():
        dist.all_reduce(total, group=group)
    return total


def global_mean_scale(weights_P: Tensor | Iterable[Tensor], *, group: dist.ProcessGroup | None = None) -> Tensor:
    """What a rank multiplies its `reduction="sum"` loss with, so that gradients AVERAGED over ranks are those of the mean.

    DistributedDataParallel and FSDP average gradients over ranks. Were each rank's loss the mean over its own positions, a
    position on a rank with few of them would count more than one elsewhere, and the gradient would depend on the number of
    ranks. So: number of ranks / sum of all ranks' weights; 0 where no position counts at all.

    Args:
        weights_P: as for `global_weight`: of all batches that go into one optimiser step.
        group: the data-parallel ranks; None for all.
    """
    total = global_weight(weights_P, group=group)
    num_ranks = dist.get_world_size(group) if _is_parallel() else 1
    return torch.where(total > 0, num_ranks / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)


def _is_parallel() -> bool:
    return dist.is_available() and dist.is_initialized()
