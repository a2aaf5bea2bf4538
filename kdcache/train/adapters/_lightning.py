"""Lightning: a data module whose batches come from a cache and whose state lies in Lightning's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import LightningDataModule

from kdcache.config.loader import LoaderConfig
from kdcache.errors import ConfigError
from kdcache.loader.caches import CacheLike
from kdcache.loader.loader import Loader
from kdcache.loader.torch_batches import TorchBatch
from kdcache.train.adapters.stream import BatchStream


class KDDataModule(LightningDataModule):
    """Training batches of a cache, for `lightning.Trainer.fit`.

    Give the Trainer `use_distributed_sampler=False`: the loader knows its rank. `max_epochs` counts rounds of `round_batches`
    batches, see BatchStream; say `max_steps=num_stream_batches(loader, epochs)` for exactly this many passes over the cache.

    Args:
        cache: as for a Loader. Opened by `setup`, and closed by `teardown` if it was opened here.
        options: what a batch of all ranks together holds.
        round_batches: batches in what Lightning calls an epoch; None for those of the loader's epoch 0.
    """

    def __init__(
        self,
        cache: CacheLike | Sequence[CacheLike],
        options: LoaderConfig = LoaderConfig(),  # noqa: B008 - frozen
        *,
        round_batches: int | None = None,
    ) -> None:
        super().__init__()
        self._cache, self._options, self._round_batches = cache, options, round_batches
        self._stream: BatchStream | None = None

    @property
    def stream(self) -> BatchStream:
        """The batches. Raises ConfigError before `setup`."""
        if self._stream is None:
            raise ConfigError("the data module has no batches before its setup: call `setup('fit')`, or `Trainer.fit` first")
        return self._stream

    def setup(self, stage: str) -> None:
        """Open the cache, for the rank of the trainer that this belongs to; rank 0 of 1 without one."""
        if stage == "fit" and self._stream is None:
            trainer = self.trainer
            rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
            loader = Loader(self._cache, self._options, rank=rank, world_size=world_size)
            self._stream = BatchStream(loader, round_batches=self._round_batches)

    def train_dataloader(self) -> BatchStream:
        """Lightning saves and restores the state of a loader with `state_dict` and `load_state_dict`, as this one."""
        return self.stream

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, TorchBatch):
            return batch.to(device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def teardown(self, stage: str) -> None:
        """Close what `setup` opened."""
        if stage == "fit" and self._stream is not None:
            self._stream.pause()
            self._stream.loader.close()
            self._stream = None
