"""The loader's batches as torch tensors, for a plain loop or inside torch's DataLoader."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from kdcache.errors import StateError
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.soft_targets import SoftTargets
from kdcache.loader.batches.batch import ARRAYS, OPTIONAL, SCALARS, Batch, brief
from kdcache.loader.cache import Cache
from kdcache.loader.loader import Loader


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TorchBatch:
    """`kdcache.loader.batches.batch.Batch` as tensors: same names, shapes and dtypes, the same memory.

    Attributes:
        state: the loader's state after this batch, None from `to_torch`: what to save where batches pass through worker
            processes or somebody's queue, so that the loader itself is ahead of the training.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor
    cu_seqlens_G1: Tensor
    target_ids_BT: Tensor
    flat_positions_P: Tensor
    teacher: SoftTargets[Tensor]
    weights_P: Tensor
    max_seqlen: int
    num_sequences: int
    num_masked: int
    state: dict[str, Any] | None = None
    features: dict[str, FeatureVectors[Tensor]] | None = None
    roles_P: Tensor | None = None
    sequence_indices_S: Tensor | None = None
    pairs: Tensor | None = None
    domains: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        return brief(self)

    @property
    def target_ids_P(self) -> Tensor:
        """(P,) the token that came after each of the positions, NO_TARGET after a sequence's last."""
        return self.target_ids_BT.flatten()[self.flat_positions_P]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TorchBatch:
        """The batch on a device; int32 stays int32, so cast target ids there, not before the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TorchBatch:
        """The batch in pinned host memory; DataLoader calls this for `pin_memory=True`."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> TorchBatch:
        return replace(self, **_tensors(self, function))


def to_torch(batch: Batch, state: dict[str, Any] | None = None) -> TorchBatch:
    """The batch as tensors that share its arrays' memory."""
    scalars = {name: getattr(batch, name) for name in SCALARS}
    tensors = _tensors(batch, torch.from_numpy)
    if batch.features is not None:
        tensors["features"] = {name: feature_tensors(vectors) for name, vectors in batch.features.items()}
    return TorchBatch(**tensors, **scalars, state=state)


def feature_tensors(vectors: FeatureVectors[NDArray[Any]]) -> FeatureVectors[Tensor]:
    """Feature vectors as tensors that share the arrays' memory; bfloat16 as torch's."""
    made = vectors.map(torch.from_numpy)
    return replace(made, values_FH=made.values_FH.view(torch.bfloat16)) if vectors.info.dtype == "bfloat16" else made


def _tensors(batch: Batch | TorchBatch, function: Callable[[Any], Tensor]) -> dict[str, Any]:
    made: dict[str, Any] = {name: function(getattr(batch, name)) for name in ARRAYS}
    made["teacher"] = batch.teacher.map(function)
    for name in OPTIONAL:
        array = getattr(batch, name)
        made[name] = None if array is None else function(array)
    if batch.features is not None:
        made["features"] = {name: vectors.map(function) for name, vectors in batch.features.items()}
    return made


def sidecar_tensors(cache: Cache, name: str) -> dict[str, Tensor]:
    """The arrays of one of a cache's sidecars as tensors, bfloat16 as torch's; raises as `Cache.sidecar`."""
    info = next((sidecar for sidecar in cache.manifest.sidecars if sidecar.name == name), None)
    arrays = cache.sidecar(name)
    dtypes = {} if info is None else {key: tensor.dtype for key, tensor in info.tensors.items()}
    # Copied: what was read is not to be written.
    tensors = {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}
    return {key: tensor.view(torch.bfloat16) if dtypes.get(key) == "BF16" else tensor for key, tensor in tensors.items()}


class TorchLoader(IterableDataset[TorchBatch]):
    """A Loader that gives TorchBatches: iterate over it, or hand it to `DataLoader(batch_size=None)`.

    With `num_workers=0` it behaves as the Loader. Of n worker processes each takes every n-th batch, and DataLoader asks them
    in turns, so the order is the same. The workers read with copies of the loader while this one stays: save `batch.state`
    instead of `state_dict()`, and call `set_epoch` before each epoch (persistent workers go on by themselves). Threads
    (`num_threads`) cost less than workers: a batch does not have to pass from process to process.

    torchdata's StatefulDataLoader saves and restores the position of each worker; it asks for the same number of
    them again, which `batch.state` does not.

    Args:
        loader: it stays the caller's; `close` closes it.
        pin_memory: give batches' large arrays pinned memory, used again batch after batch, for `to_device`. Not for workers.
    """

    def __init__(self, loader: Loader, *, pin_memory: bool = False) -> None:
        super().__init__()
        self.loader = loader
        self._is_mid_epoch = False
        self._resumed: _WorkerStart | None = None
        self._start: _WorkerStart | None = None
        if pin_memory:
            loader.use_buffers(allocate=_pinned)

    def __iter__(self) -> Iterator[TorchBatch]:
        worker = get_worker_info()
        if worker is None:
            for batch in self.loader:
                yield to_torch(batch, self.loader.state_dict())
            return
        if self._is_mid_epoch:
            # Workers are ahead by different numbers of batches: going on would repeat some and lose others.
            raise StateError("a loop over persistent workers was left before the epoch's end; make a new DataLoader to go on")
        self._is_mid_epoch = True
        start = self._resumed or _WorkerStart(self.loader.state_dict(), worker.id, worker.num_workers)
        self._resumed = None
        start.check_fits(worker.num_workers)
        self._start = start
        for batch in self.loader.iterate(first=start.first, step=worker.num_workers):
            self._start = self._start.after_another()
            yield to_torch(batch, self.loader.state_dict())
        self._is_mid_epoch = False

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """The loader's state, see Loader.state_dict; in a worker process, that worker's start."""
        worker = get_worker_info()
        if worker is None:
            return self.loader.state_dict()
        return asdict(self._start or _WorkerStart(self.loader.state_dict(), worker.id, worker.num_workers))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where a state says; before worker processes are started, or in one, that worker's start."""
        if set(state) == {"start", "first", "num_workers"}:
            self._resumed = _WorkerStart(**state)
            state = self._resumed.start
        self.loader.load_state_dict(state)

    def set_epoch(self, epoch: int) -> None:
        """Stand at the start of an epoch, see Loader.set_epoch."""
        self.loader.set_epoch(epoch)

    def close(self) -> None:
        """End a running iteration and its threads."""
        self.loader.close()


def to_device(batches: Iterable[TorchBatch], device: torch.device | str) -> Iterator[TorchBatch]:
    """The batches on a device, each copied while the one before it is worked on.

    On CUDA the copy runs on a stream of its own and is ahead by one batch, so the loader is too: save `batch.state`, not
    `state_dict()`. Copies overlap with work only where their memory is pinned (`TorchLoader(pin_memory=True)`). On other
    devices batches are copied one by one.

    Args:
        batches: of a TorchLoader.
        device: where to.
    """
    target = torch.device(device)
    if target.type != "cuda":
        for batch in batches:
            yield batch.to(target)
        return
    copies = torch.cuda.Stream(target)
    # Host batches are held until their copies are over: their memory must not be written again before that.
    held: deque[tuple[TorchBatch, TorchBatch, torch.Event]] = deque()
    try:
        for batch in batches:
            with torch.cuda.stream(copies):
                moved = batch.to(target, non_blocking=True)
                held.append((batch, moved, copies.record_event()))
            if len(held) > 1:
                yield _handed_over(held[0][1], held[0][2])
                held.popleft()[2].synchronize()
        if held:
            yield _handed_over(held[0][1], held[0][2])
    finally:
        copies.synchronize()


def _handed_over(batch: TorchBatch, done: torch.Event) -> TorchBatch:
    """The batch, for the current stream to use: it waits for the copy, and the memory is not given to others before its end."""
    current = torch.cuda.current_stream(batch.input_ids_BT.device)
    current.wait_event(done)
    _tensors(batch, lambda tensor: tensor.record_stream(current) or tensor)
    return batch


def _pinned(num_bytes: int) -> NDArray[np.uint8]:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()


@dataclass(frozen=True, slots=True)
class _WorkerStart:
    """Where one of several workers stands: `first` batches after a loader's state, and every num_workers-th."""

    start: dict[str, Any]
    first: int
    num_workers: int

    def after_another(self) -> _WorkerStart:
        return replace(self, first=self.first + self.num_workers)

    def check_fits(self, num_workers: int) -> None:
        if num_workers != self.num_workers:
            raise StateError(
                f"the state is that of one of {self.num_workers} workers, here are {num_workers}; use as many, or `batch.state`"
            )
