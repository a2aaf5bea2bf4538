"""What a reader of an object store fetches before it is asked for, and how much room that takes; from the index alone.

Shape letters: S sequences of the cache, D record batches, W sequences of a window.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.errors import ConfigError
from kdcache.format.manifest import ShardInfo
from kdcache.store.files.location import RemotePath
from kdcache.store.remote.block_cache import SLACK
from kdcache.store.remote.remote_read import RemoteShards

TEXT_BYTES_PER_TOKEN = 4.125
"""Of a sequence's token ids and mask; the rest of a shard goes by positions."""
MAX_OPEN = 256
MIN_OPEN = 4


class LookAhead:
    """The windows of one reader.

    Args:
        root: of the cache.
        shards: of the snapshot, by unit.
        index: (S,) rows, see `INDEX_SCHEMA`.
    """

    def __init__(self, root: RemotePath, shards: dict[int, ShardInfo], index: pa.Table) -> None:
        self.shards = RemoteShards(root, shards)
        self._config = root.config
        columns = {name: index.column(name).to_numpy() for name in ("unit", "record_batch", "num_positions", "num_tokens")}
        self._starts_D = batch_starts(columns["unit"], columns["record_batch"])
        self._unit_D = columns["unit"][self._starts_D]
        self._number_D = columns["record_batch"][self._starts_D]
        self._bytes_D = batch_bytes(self._starts_D, columns, shards)

    @property
    def capacity(self) -> int:
        """Bytes of record batches that can be counted on being kept."""
        blocks = self.shards.blocks.capacity
        return blocks if self._config.block_dir is None else blocks - 2 * (blocks // SLACK)

    @property
    def most_open(self) -> int:
        """Record batches that a reader should keep open: views of maps, or as much memory as `memory_bytes`."""
        if self._config.block_dir is not None or not len(self._bytes_D):
            return MAX_OPEN
        return int(np.clip(self._config.memory_bytes // max(1, self._bytes_D.max()), MIN_OPEN, MAX_OPEN))

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Fetch the record batches of these sequences, in this order, as far as there is room for them."""
        batches_W = self._batches(numbers)
        fits_W = np.cumsum(self._bytes_D[batches_W]) <= self.capacity
        self.shards.prefetch([(int(self._unit_D[d]), int(self._number_D[d])) for d in batches_W[fits_W]])

    def window_bytes(self, numbers: Iterable[int]) -> int:
        """Bytes of the record batches that hold these sequences, within some percent."""
        return int(self._bytes_D[self._batches(numbers)].sum())

    def reserve(self, num_bytes: int) -> None:
        """Raise ConfigError unless so many bytes can be kept."""
        if num_bytes <= self.capacity:
            return
        field = "memory_bytes" if self._config.block_dir is None else "block_bytes"
        needed = num_bytes if self._config.block_dir is None else -(-num_bytes * SLACK // (SLACK - 2))
        elsewhere = ", or remote.block_dir to a local folder with so much room" if self._config.block_dir is None else ""
        raise ConfigError(
            f"remote.{field} is {self.shards.blocks.capacity}, but what is read ahead from {self.shards.root} at a time takes "
            f"{num_bytes} bytes: set remote.{field} to {needed} or more{elsewhere}, or read less ahead (loader.order local, "
            "loader.local_shards, loader.prefetch_batches)"
        )

    def _batches(self, numbers: Iterable[int]) -> NDArray[np.int64]:
        """The distinct record batches of some sequences, in the order in which they are needed."""
        sequences_W = np.fromiter(numbers, np.int64)
        batches_W = np.searchsorted(self._starts_D, sequences_W, side="right") - 1
        _, firsts = np.unique(batches_W, return_index=True)
        return batches_W[np.sort(firsts)]


def batch_starts(unit_S: NDArray[np.uint32], batch_S: NDArray[np.uint32]) -> NDArray[np.int64]:
    """(D,) the first sequence of each record batch; the index has them in order."""
    if not len(unit_S):
        return np.zeros(0, np.int64)
    changes = (np.diff(unit_S.astype(np.int64)) != 0) | (np.diff(batch_S.astype(np.int64)) != 0)
    return np.append(0, np.flatnonzero(changes) + 1).astype(np.int64)


def batch_bytes(
    starts_D: NDArray[np.int64], columns: dict[str, NDArray[np.uint32]], shards: dict[int, ShardInfo]
) -> NDArray[np.int64]:
    """(D,) bytes of each record batch, estimated: a shard's bytes are shared out by tokens and positions."""
    if not len(starts_D):
        return np.zeros(0, np.int64)
    sums = {n: np.add.reduceat(columns[n].astype(np.int64), starts_D) for n in ("num_tokens", "num_positions")}
    unit_D = columns["unit"][starts_D]
    per_position_D, per_token_D = np.zeros(len(unit_D)), np.zeros(len(unit_D))
    firsts = np.append(0, np.flatnonzero(np.diff(unit_D.astype(np.int64))) + 1)
    for first, last in zip(firsts, np.append(firsts[1:], len(unit_D)), strict=True):
        shard = shards.get(int(unit_D[first]))
        if shard is None:
            continue  # an index that names no shard of ours is told when it is read
        text = shard.num_tokens * TEXT_BYTES_PER_TOKEN
        has_positions = shard.num_positions > 0 and shard.num_bytes > text
        per_token_D[first:last] = TEXT_BYTES_PER_TOKEN if has_positions else shard.num_bytes / max(1, shard.num_tokens)
        per_position_D[first:last] = (shard.num_bytes - text) / shard.num_positions if has_positions else 0.0
    return np.ceil(sums["num_tokens"] * per_token_D + sums["num_positions"] * per_position_D).astype(np.int64)
