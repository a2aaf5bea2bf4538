"""The loader's batches as torch tensors, for a plain loop or inside torch's DataLoader.

Shape letters: B rows, T positions per row, P supervised positions, K entries per position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from kdcache.errors import StateError
from kdcache.loader.batch import ARRAYS, NUMBERS, OPTIONAL_ARRAYS, Batch
from kdcache.loader.loader import Loader


@dataclass(frozen=True, slots=True, eq=False)
class TorchBatch:
    """`kdcache.loader.batch.Batch` as tensors: same names, shapes and dtypes, the same memory.

    Attributes:
        state: the loader's state behind this batch, None from `to_torch`: what to save where batches pass through worker
            processes or somebody's queue, so that the loader itself is ahead of the training.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor
    cu_seqlens_G1: Tensor
    labels_BT: Tensor
    rows_P: Tensor
    token_ids_PK: Tensor
    logprobs_PK: Tensor
    tail_mass_P: Tensor
    weights_P: Tensor
    num_exact_P: Tensor | None
    log_z_PC: Tensor | None
    entropy_P: Tensor | None
    max_seqlen: int
    num_sequences: int
    num_masked: int
    state: dict[str, Any] | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TorchBatch:
        """The batch on a device; int32 stays int32, so cast labels there, not before the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TorchBatch:
        """The batch in pinned host memory; DataLoader calls this for `pin_memory=True`."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> TorchBatch:
        return replace(self, **_tensors(self, function))


def to_torch(batch: Batch, state: dict[str, Any] | None = None) -> TorchBatch:
    """The batch as tensors that share its arrays' memory."""
    numbers = {name: getattr(batch, name) for name in NUMBERS}
    return TorchBatch(**_tensors(batch, torch.from_numpy), **numbers, state=state)


def _tensors(batch: Batch | TorchBatch, function: Callable[[Any], Tensor]) -> dict[str, Any]:
    values = {name: getattr(batch, name) for name in (*ARRAYS, *OPTIONAL_ARRAYS)}
    return {name: None if value is None else function(value) for name, value in values.items()}


class TorchLoader(IterableDataset[TorchBatch]):
    """A Loader that gives TorchBatches: iterate over it, or hand it to `DataLoader(batch_size=None)`.

    With `num_workers=0` it behaves as the Loader. Of n worker processes each takes every n-th batch, and DataLoader asks them
    in turns, so the order is the same. The workers read with copies of the loader while this one stays: save `batch.state`
    instead of `state_dict()`, and call `set_epoch` before each epoch (persistent workers go on by themselves). Threads
    (`num_threads`) cost less than workers: a batch does not have to pass from process to process.
    """

    def __init__(self, loader: Loader) -> None:
        super().__init__()
        self.loader = loader
        self._is_mid_epoch = False

    def __iter__(self) -> Iterator[TorchBatch]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None and self._is_mid_epoch:
            # Workers are ahead by different numbers of batches: going on would repeat some and lose others.
            raise StateError("a loop over persistent workers was left before the epoch's end; make a new DataLoader to go on")
        self._is_mid_epoch = worker is not None
        for batch in self.loader.iterate(first=first, step=step):
            yield to_torch(batch, self.loader.state_dict())
        self._is_mid_epoch = False

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """The loader's state, see Loader.state_dict; not that of worker processes."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where a state says; before worker processes are started."""
        self.loader.load_state_dict(state)

    def set_epoch(self, epoch: int) -> None:
        """Stand at the start of an epoch, see Loader.set_epoch."""
        self.loader.set_epoch(epoch)

    def close(self) -> None:
        """End a running iteration and its threads."""
        self.loader.close()
