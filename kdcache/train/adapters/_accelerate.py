"""Accelerate's Accelerator: the part of the batches that is this process's, in its checkpoints.

The loader is NOT to go through `accelerator.prepare`: of a DataLoader over an iterable accelerate reads in the main process
alone and sends parts to the others (dispatch_batches), or takes every n-th batch on each rank and repeats some at the end
(even_batches). Here each rank reads its own rows of each batch, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from kdcache.config.loader import LoaderConfig
from kdcache.loader.caches import CacheLike
from kdcache.loader.loader import Loader
from kdcache.loader.torch_batches import TorchBatch
from kdcache.train.adapters.stream import BatchStream


class AcceleratedStream(BatchStream):
    """A BatchStream of this process's rows, on its device; `accelerator.save_state` saves its state, `load_state` restores it.

    Do not `prepare` it. Make it before `load_state`, as everything that is registered for checkpointing. A checkpoint may be
    loaded by another number of processes.

    Args:
        accelerator: of the training.
        cache: as for a Loader. Closed by `close`, if it was opened here.
        options: what a batch of all processes together holds.
        round_batches: see BatchStream.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        cache: CacheLike | Sequence[CacheLike],
        options: LoaderConfig = LoaderConfig(),  # noqa: B008 - frozen
        *,
        round_batches: int | None = None,
    ) -> None:
        loader = Loader(cache, options, rank=accelerator.process_index, world_size=accelerator.num_processes)
        self.device = accelerator.device
        super().__init__(loader, round_batches=round_batches, pin_memory=self.device.type == "cuda")
        accelerator.register_for_checkpointing(self)

    def __getitem__(self, index: int) -> TorchBatch:
        return super().__getitem__(index).to(self.device)

    def close(self) -> None:
        """End the threads that read ahead, and close the caches that were opened here."""
        self.pause()
        self.loader.close()
