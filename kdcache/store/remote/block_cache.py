"""Record batches of remote shards, kept on this machine: in memory, or in a folder that any number of processes share.

A block's key names where it was read from (the shard's address and SHA-256, and the index of the record batch), so that a
block is right whatever snapshot or process put it there, and is never taken for another cache's. A folder holds one file per
block and nothing else: no index that a crash could leave wrong, no lock that it could leave held. A file appears by a rename,
carries a digest that is checked on each read, and may vanish at any time, which is a miss.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import xxhash

from kdcache.errors import ConfigError
from kdcache.shown import get_logger
from kdcache.store.files import fs
from kdcache.store.files.regular import is_own_file

_log = get_logger(__name__)

_BLOCK = re.compile(r"[0-9a-f]{64}-(?:[0-9]+|footer|index)\.block")
_DIGEST_BYTES = 16
SLACK = 64
"""A process looks through the folder each time that it has added a SLACK-th of the bound."""


class Blocks(Protocol):
    """A store of blocks, in memory or in a folder. Safe to use from several threads."""

    capacity: int

    def get(self, key: str) -> pa.Buffer | None:
        """The block, whole and unchanged, or None."""
        ...

    def touch(self, key: str) -> bool:
        """Whether the block is there; if so it is now the one used last."""
        ...

    def put(self, key: str, data: bytes) -> pa.Buffer:
        """Keep a block, at the cost of those unused for longest; gives it back."""
        ...

    def drop(self, key: str) -> None:
        """Forget a block."""
        ...

    def pin(self, keys: Collection[str]) -> None:
        """Name the blocks that will be wanted soon: this process evicts them last. Replaces the ones before."""
        ...


class MemoryBlocks:
    """Blocks in this process's memory."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: OrderedDict[str, pa.Buffer] = OrderedDict()
        self._num_bytes = 0
        self._pinned: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    def get(self, key: str) -> pa.Buffer | None:
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
            return self._blocks.get(key)

    def touch(self, key: str) -> bool:
        return self.get(key) is not None

    def put(self, key: str, data: bytes) -> pa.Buffer:
        buffer = pa.py_buffer(data)
        with self._lock:
            self._remove(key)
            self._blocks[key] = buffer
            self._num_bytes += buffer.size
            for old in self._oldest_first():
                if self._num_bytes <= self.capacity:
                    break
                self._remove(old)
        return buffer

    def drop(self, key: str) -> None:
        with self._lock:
            self._remove(key)

    def pin(self, keys: Collection[str]) -> None:
        self._pinned = frozenset(keys)

    def renew_after_fork(self) -> None:
        """Make the lock again in a forked child, where another thread may have held it."""
        self._lock = threading.Lock()

    def _oldest_first(self) -> list[str]:
        return sorted(self._blocks, key=lambda key: key in self._pinned)  # stable: by age, pinned ones last

    def _remove(self, key: str) -> None:
        if key in self._blocks:
            self._num_bytes -= self._blocks.pop(key).size


class DiskBlocks:
    """Blocks in a folder, read as memory maps.

    Args:
        folder: made if missing; files in it that are not blocks are left alone.
        capacity: most bytes of all blocks in it, whoever put them there.

    Raises:
        ConfigError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self.folder, self.capacity = folder, capacity
        self._pinned: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self._unseen, self._failed = 0, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError("not writable")
        except OSError as error:
            raise ConfigError(f"remote.block_dir: {str(folder)!r} cannot be used: {error}") from error
        self._evict()

    def get(self, key: str) -> pa.Buffer | None:
        path = self._path(key)
        try:
            if not is_own_file(path):
                return None
            with pa.memory_map(str(path)) as file:
                data = file.read_buffer()
            os.utime(path)
        except (OSError, pa.ArrowException):
            return None
        block = data.slice(0, max(0, data.size - _DIGEST_BYTES))
        if _digest(key, block) != data.slice(block.size).to_pybytes():
            _log.warning("%s: damaged; the block is read from its store again", path)
            self.drop(key)
            return None
        return block

    def touch(self, key: str) -> bool:
        try:
            os.utime(self._path(key), follow_symlinks=False)
        except OSError:
            return False
        return True

    def put(self, key: str, data: bytes) -> pa.Buffer:
        if len(data) + _DIGEST_BYTES > self.capacity:
            return pa.py_buffer(data)
        try:
            self._write(key, data)
            with self._lock:
                self._unseen += len(data) + _DIGEST_BYTES
                if self._unseen > self.capacity // SLACK:
                    self._evict()
        except OSError as error:  # a full disk costs requests, not the run
            level, self._failed = (logging.DEBUG if self._failed else logging.WARNING), True
            _log.log(level, "%s: cannot keep blocks, which are fetched again each time: %s", self.folder, error)
        return pa.py_buffer(data)

    def drop(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def pin(self, keys: Collection[str]) -> None:
        self._pinned = frozenset(self._path(key).name for key in keys)

    def renew_after_fork(self) -> None:
        """Make the lock again in a forked child, where another thread may have held it."""
        self._lock = threading.Lock()

    def _write(self, key: str, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it to make room
        temp = self.folder / fs.temp_name()
        try:
            with temp.open("xb") as file:
                file.write(data)
                file.write(_digest(key, data))
            fs.reached("block written")
            os.replace(temp, self._path(key))
        except OSError:
            temp.unlink(missing_ok=True)
            raise

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.block"

    def _evict(self) -> None:
        """Make room for what is added until the next look: the sizes are asked of the file system each time, so that neither a
        crash nor another process can make them wrong."""
        self._unseen = 0
        found = sorted(self._found())
        excess = sum(num_bytes for *_, num_bytes in found) - (self.capacity - self.capacity // SLACK)
        for _, _, name, num_bytes in found:
            if excess <= 0:
                return
            (self.folder / name).unlink(missing_ok=True)
            fs.reached("block evicted")
            excess -= num_bytes

    def _found(self) -> list[tuple[bool, int, str, int]]:
        """Of each block: whether it is pinned, when it was used last, its name and its bytes."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    if not entry.is_file(follow_symlinks=False):
                        continue
                    if fs.is_temp_name(entry.name) and fs.is_abandoned(Path(entry.path)):
                        os.unlink(entry.path)
                    elif _BLOCK.fullmatch(entry.name):
                        stat = entry.stat()
                        found.append((entry.name in self._pinned, stat.st_mtime_ns, entry.name, stat.st_size))
                except FileNotFoundError:
                    continue  # another process was faster
        return found


def _digest(key: str, data: bytes | pa.Buffer) -> bytes:
    # The key too: a block under another's name would be whole, and wrong.
    hasher = xxhash.xxh3_128(key.encode())
    hasher.update(data)
    return hasher.digest()
