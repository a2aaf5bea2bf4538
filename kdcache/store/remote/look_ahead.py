"""What a reader of an object store fetches before it is asked for, and how much room that takes; from the index alone."""

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
"""Of a sequence's token ids and mask; the rest of a shard is proportional to its positions."""
MAX_OPEN = 256
MIN_OPEN = 4


class LookAhead:
    """Fetches the record batches that one reader reads next.

    Args:
        root: of the cache.
        shards: of the snapshot, by unit.
        index: one line per sequence, see `INDEX_SCHEMA`.
    """

    def __init__(self, root: RemotePath, shards: dict[int, ShardInfo], index: pa.Table) -> None:
        self.shards, self._infos = RemoteShards(root, shards), shards
        self._config = root.config
        columns = {name: index.column(name).to_numpy() for name in ("unit", "record_batch", "num_positions", "num_tokens")}
        self._starts = batch_starts(columns["unit"], columns["record_batch"])
        self._units = columns["unit"][self._starts]
        self._batches_in_shard = columns["record_batch"][self._starts]
        self._bytes = batch_bytes(self._starts, columns, shards)

    @property
    def block_dir(self) -> str | None:
        """The folder in which what was read is kept; None where it is kept in memory."""
        return self._config.block_dir

    @property
    def capacity(self) -> int:
        """Bytes of record batches that can be counted on being kept."""
        blocks = self.shards.blocks.capacity
        return blocks if self._config.block_dir is None else blocks - 2 * (blocks // SLACK)

    @property
    def most_open(self) -> int:
        """Record batches that a reader should keep open: views of maps, or as much memory as `memory_bytes`."""
        if self._config.block_dir is not None or not len(self._bytes):
            return MAX_OPEN
        return int(np.clip(self._config.memory_bytes // max(1, self._bytes.max()), MIN_OPEN, MAX_OPEN))

    def prefetch(self, indices: Iterable[int]) -> None:
        """Say which sequences are read next, in which order. Returns at once.

        Threads fetch their record batches, as far as there is room for them, and keep them until they are read. Each call
        replaces the one before.
        """
        batches = self._batches(indices)
        fits = np.cumsum(self._bytes[batches]) <= self.capacity
        self.shards.prefetch([(int(self._units[d]), int(self._batches_in_shard[d])) for d in batches[fits]])

    def ahead_bytes(self, indices: Iterable[int]) -> int:
        """Bytes of the record batches that hold these sequences, within some percent: what `prefetch` has to keep."""
        return int(self._bytes[self._batches(indices)].sum())

    def largest_shards_bytes(self, num_shards: int) -> int:
        """The most bytes that the record batches of this many shards have."""
        return sum(sorted((shard.num_bytes for shard in self._infos.values()), reverse=True)[:num_shards])

    def reserve(self, num_bytes: int) -> None:
        """Raise ConfigError, with the size needed, unless this many bytes can be kept."""
        if num_bytes <= self.capacity:
            return
        field = "memory_bytes" if self._config.block_dir is None else "block_bytes"
        needed = num_bytes if self._config.block_dir is None else -(-num_bytes * SLACK // (SLACK - 2))
        elsewhere = ", or remote.block_dir to a local folder with that much room" if self._config.block_dir is None else ""
        raise ConfigError(
            f"remote.{field} is {self.shards.blocks.capacity}, but what is read ahead from {self.shards.root} at a time takes "
            f"{num_bytes} bytes: set remote.{field} to {needed} or more{elsewhere}, or read less ahead (loader.order local, "
            "loader.local_shards, loader.prefetch_batches)"
        )

    def _batches(self, indices: Iterable[int]) -> NDArray[np.int64]:
        """The distinct record batches of some sequences, in the order in which they are needed."""
        sequences = np.fromiter(indices, np.int64)
        batches = np.searchsorted(self._starts, sequences, side="right") - 1
        _, firsts = np.unique(batches, return_index=True)
        return batches[np.sort(firsts)]


def batch_starts(unit_S: NDArray[np.uint32], batch_S: NDArray[np.uint32]) -> NDArray[np.int64]:
    """The first sequence of each record batch; the index has them in order."""
    if not len(unit_S):
        return np.zeros(0, np.int64)
    changes = (np.diff(unit_S.astype(np.int64)) != 0) | (np.diff(batch_S.astype(np.int64)) != 0)
    return np.append(0, np.flatnonzero(changes) + 1).astype(np.int64)


def batch_bytes(
    starts: NDArray[np.int64], columns: dict[str, NDArray[np.uint32]], shards: dict[int, ShardInfo]
) -> NDArray[np.int64]:
    """Estimate the bytes of each record batch: a shard's bytes are shared out by tokens and positions."""
    if not len(starts):
        return np.zeros(0, np.int64)
    sums = {n: np.add.reduceat(columns[n].astype(np.int64), starts) for n in ("num_tokens", "num_positions")}
    units = columns["unit"][starts]
    per_position, per_token = np.zeros(len(units)), np.zeros(len(units))
    firsts = np.append(0, np.flatnonzero(np.diff(units.astype(np.int64))) + 1)
    for first, last in zip(firsts, np.append(firsts[1:], len(units)), strict=True):
        shard = shards.get(int(units[first]))
        if shard is None:
            continue  # an index that names no shard of ours is reported when it is read
        text = shard.num_tokens * TEXT_BYTES_PER_TOKEN
        has_positions = shard.num_positions > 0 and shard.num_bytes > text
        per_token[first:last] = TEXT_BYTES_PER_TOKEN if has_positions else shard.num_bytes / max(1, shard.num_tokens)
        per_position[first:last] = (shard.num_bytes - text) / shard.num_positions if has_positions else 0.0
    return np.ceil(sums["num_tokens"] * per_token + sums["num_positions"] * per_position).astype(np.int64)
