"""A loader's epochs as one endless stream of batches with an index, for trainers that count and skip batches themselves.

Packed epochs differ by a batch or two; most trainers ask for the length of an epoch once and believe in it for ever. So they
are given rounds of constant length instead, one after the other: nothing is lost or repeated at a round's end, since the
stream goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from kdcache.errors import ConfigError, StateError
from kdcache.loader.loader import Loader
from kdcache.loader.torch_batches import TorchBatch, TorchLoader


class BatchStream:
    """Batches by index: 0 is the first of the loader's epoch 0. Consecutive ones are read ahead by the loader's threads.

    Iterating gives the rest of the round in which the stream stands, and a whole one where it stands at a round's beginning;
    `len` is that of a round.

    Going to another index reads nothing on the way, but packed epochs have to be planned to know how many batches they have:
    those between the index and the nearest one that is known (the stream's beginning, a loaded state, where it has been),
    each once. Without packing and without max_batch_tokens the lengths of epochs are known, and nothing is planned.

    Args:
        loader: it stays the caller's.
        round_batches: batches in a round; None for those of the loader's epoch 0.
        pin_memory: see TorchLoader.
    """

    def __init__(self, loader: Loader, *, round_batches: int | None = None, pin_memory: bool = False) -> None:
        if round_batches is not None and round_batches < 1:
            raise ConfigError(f"round_batches is {round_batches}, but must be at least 1")
        self.loader = loader
        self.round_batches = round_batches or loader.num_batches(0)
        self.next_index = 0
        self._starts = {0: 0}
        """Of the epochs that are known, the index of their first batch."""
        self._batches = TorchLoader(loader, pin_memory=pin_memory)
        self._running: Iterator[TorchBatch] | None = None
        self._is_set = False

    def __len__(self) -> int:
        return self.round_batches

    def __iter__(self) -> Iterator[TorchBatch]:
        end = (self.next_index // self.round_batches + 1) * self.round_batches
        while self.next_index < end:
            yield self[self.next_index]

    def __getitem__(self, index: int) -> TorchBatch:
        """Batch `index` of the stream; the one after it is next."""
        if index != self.next_index or not self._is_set:
            self._go_to(index)
        batch = self._next()
        self.next_index += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """JSON: where the stream stands after the last batch given, the same on all ranks."""
        if not self._is_set:
            self._go_to(self.next_index)
        return {"next_index": self.next_index, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where a state says, for any number of ranks.

        Raises:
            StateError: not a state of a stream, or see Loader.load_state_dict.
        """
        if not isinstance(state, dict) or set(state) != {"next_index", "loader"}:
            raise StateError(f"not a state of a kdcache stream: {state!r}; expected a dict of 'next_index' and 'loader'")
        self.pause()
        self.loader.load_state_dict(state["loader"])
        self.next_index, self._is_set = int(state["next_index"]), True
        self._starts[self.loader.epoch] = self.next_index - state["loader"]["next_batch"]

    def pause(self) -> None:
        """End the threads that read ahead; the next batch starts them again."""
        running, self._running = self._running, None
        if running is not None:
            running.close()  # pyright: ignore[reportAttributeAccessIssue]

    def _next(self) -> TorchBatch:
        while True:
            if self._running is None:
                self._running = iter(self._batches)
            try:
                return next(self._running)
            except StopIteration:  # the loader's epoch ended; its next loop reads the one after it
                self._running = None

    def _go_to(self, index: int) -> None:
        if index < 0:
            raise IndexError(f"batch {index} of a stream that begins with 0")
        self.pause()
        epoch = self._epoch_of(index)
        start = {"epoch": epoch, "next_batch": index - self._starts[epoch]}
        self.loader.load_state_dict(self.loader.state_dict() | start)
        self.next_index, self._is_set = index, True

    def _epoch_of(self, index: int) -> int:
        """The epoch with this batch; what is learned of epochs on the way there is kept."""
        epoch = min(self._starts, key=lambda known: abs(self._starts[known] - index))
        while index < self._starts[epoch]:
            if epoch - 1 not in self._starts:
                self._starts[epoch - 1] = self._starts[epoch] - self.loader.num_batches(epoch - 1)
            epoch -= 1
        while index >= self._end(epoch):
            epoch += 1
        return epoch

    def _end(self, epoch: int) -> int:
        if epoch + 1 not in self._starts:
            self._starts[epoch + 1] = self._starts[epoch] + self.loader.num_batches(epoch)
        return self._starts[epoch + 1]


def num_stream_batches(loader: Loader, num_epochs: float) -> int:
    """Batches of the first epochs, and of the last one's part where the index is not whole."""
    whole = math.floor(num_epochs)
    num_batches = sum(loader.num_batches(epoch) for epoch in range(whole))
    return num_batches + math.ceil((num_epochs - whole) * loader.num_batches(whole) if num_epochs > whole else 0)
