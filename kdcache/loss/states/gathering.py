"""Vectors of all data-parallel ranks: losses that compare sequences must not depend on how many ranks share them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """What every rank has, in the order of the ranks.

    Attributes:
        tensors: each of those given, of all ranks one after another; gradients flow to this rank's own lines alone.
        num_own: lines of this rank.
    """

    tensors: tuple[Tensor, ...]
    num_own: int

    @property
    def num_all(self) -> int:
        """Lines of all ranks."""
        return len(self.tensors[0])

    def share(self, loss: Tensor) -> Tensor:
        """This rank's part of a sum: added up over ranks its value and its gradient are those of num_all * loss.

        Args:
            loss: the same number on all ranks, computed from `tensors`.
        """
        return self.num_own * loss.detach() + self.num_all * (loss - loss.detach())


def gathered(*tensors: Tensor, group: dist.ProcessGroup | None = None) -> Gathered:
    """The tensors of all ranks; the given ones where torch.distributed is not in use.

    A collective: every rank calls it, ranks without a sequence too. The backward pass is none.

    Args:
        tensors: each with one line per sequence, the same number in all; other ranks' may have another.
        group: the data-parallel ranks; None for all.
    """
    num_own = len(tensors[0])
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return Gathered(tensors, num_own)
    own = torch.tensor(num_own, device=tensors[0].device)
    counts = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    sizes = [int(count) for count in counts]
    return Gathered(tuple(_all(tensor, sizes, group) for tensor in tensors), num_own)


def _all(tensor: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    kept = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    kept[dist.get_rank(group)] = tensor
    return torch.cat(kept)
