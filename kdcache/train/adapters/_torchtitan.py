"""torchtitan's loader contract, without importing torchtitan.

Read off torchtitan at commit b5bcd76 (2026-08-21), `components/data/loader.py`, `components/data/collators.py`, `trainer.py`:
an endless iterable of ({"input": tokens, "positions": ...}, labels), labels already shifted and -100 where there is none, all
of them flat since 2026-08-19 and (rows, tokens) before; `state_dict` and `load_state_dict`, which its checkpointer calls on
every rank through torch.distributed.checkpoint; `close`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from kdcache.config.loader import LoaderConfig
from kdcache.errors import StateError
from kdcache.loader.caches import CacheLike
from kdcache.loader.loader import Loader
from kdcache.loader.torch_batches import TorchBatch
from kdcache.train.adapters.stream import BatchStream

_STATE = "kdcache"


class TitanDataLoader:
    """A torchtitan data loader over a cache, endless.

    torchtitan's own loader keeps a state under `dp_rank_<i>` for each rank and refuses another number of them. Here the state
    is the same on all ranks and lies under one name, so that a checkpoint may be resumed on another number of ranks.

    Args:
        cache: as for a Loader. Closed by `close`, if it was opened here.
        options: what a batch of all ranks together holds: `seq_len * batch_rows / dp_world_size` must be torchtitan's tokens
            per microbatch and rank.
        dp_rank, dp_world_size: as torchtitan gives them to `build`.
        is_flat: without a dimension for rows, as torchtitan has it since 2026-08-19.
        with_batch: put the whole batch into the dict, under `batch`, for a loss against the cache's entries; the trainer
            must take it out before the model is called, see README.md.
    """

    def __init__(
        self,
        cache: CacheLike | Sequence[CacheLike],
        options: LoaderConfig = LoaderConfig(),  # noqa: B008 - frozen
        *,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        is_flat: bool = True,
        with_batch: bool = False,
    ) -> None:
        self._stream = BatchStream(Loader(cache, options, rank=dp_rank, world_size=dp_world_size))
        self._is_flat, self._with_batch = is_flat, with_batch

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        while True:
            yield self._titan_batch(self._stream[self._stream.next_index])

    def state_dict(self) -> dict[str, Any]:
        """One string: a nested dict would be cut into as many entries of the checkpoint."""
        return {_STATE: json.dumps(self._stream.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a state says; an empty one is torchtitan's way to say that there is none.

        Raises:
            StateError: the state of another loader, cache or options.
        """
        if not state_dict:
            return
        if _STATE not in state_dict:
            raise StateError(f"not the state of a kdcache loader, but of one with {', '.join(sorted(state_dict))}")
        self._stream.load_state_dict(json.loads(state_dict[_STATE]))

    def close(self) -> None:
        """End the threads that read ahead, and close the caches that were opened here."""
        self._stream.pause()
        self._stream.loader.close()

    def _titan_batch(self, batch: TorchBatch) -> tuple[dict[str, Any], Tensor]:
        tensors = (batch.input_ids_BT.long(), batch.position_ids_BT.long(), batch.target_ids_BT.long())
        ids, positions, labels = (tensor.flatten() for tensor in tensors) if self._is_flat else tensors
        inputs: dict[str, Any] = {"input": ids, "positions": positions}
        if self._with_batch:
            inputs["batch"] = batch
        return inputs, labels
