"""The record batches of a cache in an object store: fetched ahead by threads, neighbours in one request, kept as blocks."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from kdcache.config.remote import RemoteConfig
from kdcache.errors import CorruptCacheError
from kdcache.format.manifest import ShardInfo
from kdcache.store.files.location import RemotePath
from kdcache.store.remote.block_cache import Blocks, DiskBlocks, MemoryBlocks
from kdcache.store.remote.remote_file import Layout, parse_record_batch, parse_tail, read_tail

NEIGHBOURS = 4
"""Record batches in one request, at most: beyond some 16 MiB a request gains nothing, and others could run at once."""
MAX_REQUEST_BYTES = 32 * 2**20

THREAD_NAME = "kdcache-fetch"

BatchId = tuple[int, int]
"""Unit and index of a record batch."""


class RemoteShards:
    """What a reader of an object store uses instead of memory maps. Safe to use from several threads.

    Args:
        root: of the cache.
        shards: of the snapshot, by unit.
    """

    def __init__(self, root: RemotePath, shards: dict[int, ShardInfo]) -> None:
        self.root, self._shards = root, shards
        self.blocks = open_blocks(root.config)
        self._address = address_of(root)
        self._layouts: dict[int, Layout] = {}
        self._renew()

    def open(self, unit: int) -> RemoteFile:
        """Open a shard: read its footer; an error names the shard."""
        return RemoteFile(self, unit, self._layout(unit))

    def record_batch(self, unit: int, index: int) -> pa.RecordBatch:
        """A record batch: from the blocks, from a request that is under way, or from the store.

        Raises:
            CorruptCacheError, StorageError, FileNotFoundError: the shard is damaged, out of reach, missing.
        """
        block = self._awaited((unit, index)) or self.blocks.get(self._key(unit, index)) or self._fetched((unit, index))
        return parse_record_batch(block, self._layout(unit).schema)

    def prefetch(self, wanted: Sequence[BatchId]) -> None:
        """Start to fetch what is not here, in this order, and keep all of it while there is room. Replaces what was wanted
        before: of that, what has not begun is dropped. Errors are left to the reading of their record batch."""
        window = dict.fromkeys(wanted)
        keys = {batch: self._key(*batch) for batch in window}
        self.blocks.pin(keys.values())
        with self._lock:
            stale = {fetch for batch, fetch in self._under_way.items() if batch not in window}
        for fetch in stale:  # without the lock, which the end of each takes
            fetch.cancel()
        missing = [batch for batch in window if batch not in self._under_way and not self.blocks.touch(keys[batch])]
        for group in neighbours(missing):
            self._start(group)

    def forget(self, unit: int, index: int) -> None:
        """Drop what is kept of a record batch and of its shard's footer, so that both are read from the store again."""
        self.blocks.drop(self._key(unit, index))
        self.blocks.drop(self._footer_key(unit))
        self._layouts.pop(unit, None)

    def close(self) -> None:
        """End the threads; what they have begun is waited for."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        self._under_way.clear()
        self._layouts.clear()

    def renew_after_fork(self) -> None:
        """Start again in a forked child, which has none of the threads and may have inherited locks that one of them held."""
        self._renew()
        if isinstance(self.blocks, MemoryBlocks | DiskBlocks):
            self.blocks.renew_after_fork()

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: dict[BatchId, Future[dict[BatchId, pa.Buffer]]] = {}

    def _awaited(self, batch: BatchId) -> pa.Buffer | None:
        """The record batch of a request that is under way; None where no request is, or where it fails."""
        with self._lock:
            fetch = self._under_way.get(batch)
        return None if fetch is None else _result(fetch, batch)

    def _fetched(self, batch: BatchId) -> pa.Buffer:
        """Fetch a record batch now; of several threads that want it at once, one asks."""
        mine: Future[dict[BatchId, pa.Buffer]] = Future()
        mine.set_running_or_notify_cancel()
        with self._lock:
            fetch = self._under_way.setdefault(batch, mine)
        if fetch is not mine:
            return _result(fetch, batch) or self._fetch([batch])[batch]
        try:
            found = self._fetch([batch])
            mine.set_result(found)
            return found[batch]
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            self._over([batch], mine)

    def _start(self, group: Sequence[BatchId]) -> None:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.root.config.num_threads, THREAD_NAME)
            fetch = self._pool.submit(self._fetch, group)
            self._under_way.update(dict.fromkeys(group, fetch))
        fetch.add_done_callback(lambda _: self._over(group, fetch))

    def _over(self, group: Sequence[BatchId], fetch: Future[dict[BatchId, pa.Buffer]]) -> None:
        with self._lock:
            for batch in group:
                if self._under_way.get(batch) is fetch:
                    del self._under_way[batch]

    def _fetch(self, group: Sequence[BatchId]) -> dict[BatchId, pa.Buffer]:
        """Neighbours of one shard, from the store, in as few requests as their bytes allow."""
        unit = group[0][0]
        layout, path = self._layout(unit), self._path(unit)
        fetched: dict[BatchId, pa.Buffer] = {}
        for run in _requests(layout, [index for _, index in group], str(path)):
            start, stop = layout.messages[run[0]].offset, layout.messages[run[-1]].stop
            data = path.read_range(start, stop)
            for index in run:
                message = layout.messages[index]
                # Copied where there are several: a slice would keep the others' bytes in memory.
                block = data if len(run) == 1 else data[message.offset - start : message.stop - start]
                fetched[unit, index] = self.blocks.put(self._key(unit, index), block)
        return fetched

    def _layout(self, unit: int) -> Layout:
        layout = self._layouts.get(unit)
        if layout is not None:
            return layout
        with self._opening.setdefault(unit, threading.Lock()):  # else each of a shard's first requests would bring its footer
            if unit in self._layouts:
                return self._layouts[unit]
            shard, path, key = self._shards[unit], self._path(unit), self._footer_key(unit)
            try:
                tail = self.blocks.get(key) or self.blocks.put(key, read_tail(path.read_range, shard.num_bytes))
                layout = parse_tail(memoryview(tail), shard.num_bytes)
            except CorruptCacheError as error:
                raise CorruptCacheError(_named(path, error)) from error
            except FileNotFoundError as error:
                raise CorruptCacheError(f"{path}: the shard is missing") from error
            self._layouts[unit] = layout
        return layout

    def _path(self, unit: int) -> RemotePath:
        return self.root / self._shards[unit].name

    def _key(self, unit: int, index: int) -> str:
        return f"{self._origin(unit)}-{index}"

    def _footer_key(self, unit: int) -> str:
        return f"{self._origin(unit)}-footer"

    def _origin(self, unit: int) -> str:
        """Names what a block was read from, in 64 hex digits. The address is part of it: a manifest only claims its shards'
        SHA-256, which nobody can check of a part, so that a cache elsewhere could put its blocks where this one's belong."""
        shard = self._shards[unit]
        parts = (self._address, shard.name, shard.sha256, str(shard.num_bytes))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class RemoteFile:
    """What a reader uses of `pyarrow.RecordBatchFileReader`."""

    def __init__(self, shards: RemoteShards, unit: int, layout: Layout) -> None:
        self._shards, self._unit = shards, unit
        self.schema, self.num_record_batches = layout.schema, len(layout.messages)

    def get_batch(self, index: int) -> pa.RecordBatch:
        """Read record batch `index`; raises as `RemoteShards.record_batch`."""
        return self._shards.record_batch(self._unit, index)


def neighbours(wanted: Sequence[BatchId]) -> list[list[BatchId]]:
    """Groups of record batches that follow each other in their shard, each group where its first one was wanted."""
    left = dict.fromkeys(wanted)
    groups = []
    for batch in wanted:
        if batch not in left:
            continue
        group = []
        while batch in left and len(group) < NEIGHBOURS:
            del left[batch]
            group.append(batch)
            batch = (batch[0], batch[1] + 1)  # noqa: PLW2901 - walks along the shard
        groups.append(group)
    return groups


def read_content(path: RemotePath, sha256: str, what: str = "the index") -> pa.Buffer:
    """Read an object of a known SHA-256, kept as a block where there is a folder for them. `what` it is, for messages.

    Raises:
        CorruptCacheError: its bytes are others, twice. FileNotFoundError, StorageError: it cannot be had.
    """
    blocks = open_blocks(path.config) if path.config.block_dir is not None else None
    key = f"{sha256}-index"
    kept = blocks.get(key) if blocks is not None else None
    if kept is not None:
        return kept
    for _ in range(2):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            if blocks is None:
                return pa.py_buffer(data)
            put = blocks.put(key, data)
            return blocks.get(key) or put  # mapped, so that it takes no memory of this process
    raise CorruptCacheError(f"{path}: its SHA-256 is not the one in the manifest; {what} is damaged")


def address_of(path: RemotePath) -> str:
    """The URI, and the server that is asked where it is not the usual one."""
    options = path.config.options
    client = options.get("client_kwargs")
    named = options.get("endpoint_url") or (client.get("endpoint_url") if isinstance(client, dict) else None)
    return f"{path.uri} {named or os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL') or ''}"


def open_blocks(config: RemoteConfig) -> Blocks:
    """The blocks of a config: in its folder, shared by all readers of this process that name it, else in memory."""
    if config.block_dir is None:
        return MemoryBlocks(config.memory_bytes)
    return _disk_blocks(str(Path(config.block_dir).absolute()), config.block_bytes, os.getpid())


@lru_cache(maxsize=8)
def _disk_blocks(folder: str, capacity: int, pid: int) -> DiskBlocks:  # noqa: ARG001 - a fork makes its own
    return DiskBlocks(Path(folder), capacity)


def _result(fetch: Future[dict[BatchId, pa.Buffer]], batch: BatchId) -> pa.Buffer | None:
    try:
        return fetch.result()[batch]
    except Exception:
        return None  # tried again where it is needed, and reported there


def _requests(layout: Layout, indices: Sequence[int], where: str) -> list[list[int]]:
    """Runs of adjacent record batches, each of no more bytes than a request should have."""
    runs: list[list[int]] = []
    for index in indices:
        if index >= len(layout.messages):
            raise CorruptCacheError(f"{where}: record batch {index}: the shard has {len(layout.messages)} of them")
        run = runs[-1] if runs else None
        is_next = run is not None and layout.messages[run[-1]].stop == layout.messages[index].offset
        if run is not None and is_next and layout.messages[index].stop - layout.messages[run[0]].offset <= MAX_REQUEST_BYTES:
            run.append(index)
        else:
            runs.append([index])
    return runs


def _named(path: RemotePath, error: CorruptCacheError) -> str:
    return str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
