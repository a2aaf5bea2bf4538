"""How caches in object stores are reached."""

from __future__ import annotations

from typing import Any

import msgspec

from kdcache.config.base import Config, Positive, Seconds


class RemoteConfig(Config, frozen=True, kw_only=True):
    """How a cache under `s3://`, `gs://`, `hf://` or `memory://` is read and written; without effect for a cache on a disk.

    Attributes:
        block_dir: local folder that keeps the record batches that were read, for the next time; null keeps them in memory
            only. Any number of processes and caches may share it. It needs room for everything that they read ahead: a loader
            checks that its own share fits, for all workers of its DataLoader, but knows of no other process. With order `local`
            the ranks read the same shards at about the same time; with `global` each of the N ranks of a machine needs as much
            room as one: set `block_bytes` to N times the size that the error names.
        block_bytes: most bytes in `block_dir`; several processes at work may each exceed it by a sixty-fourth.
        memory_bytes: memory for record batches that were fetched ahead (without `block_dir`), and as much again for those in
            use.
        num_threads: concurrent requests per reader.
        deadline_seconds: how long a request is retried, with growing waits, before the store counts as unreachable.
        timeout_seconds: limit of one attempt, plus the time that its bytes take at 1 MB/s.
        spool_dir: local folder where a shard is written before it is uploaded; null for the system's temporary folder.
        options: further arguments of the file system (fsspec's storage options: `endpoint_url`, `anon`, `config_kwargs`, ...).
            They take precedence over fsspec's own files and variables, and those over our timeouts; the rest is merged.
            Credentials belong in the store's own environment variables or files. Credentials given here are used, and masked
            in messages and in the records of training runs.
    """

    block_dir: str | None = None
    block_bytes: Positive = 32 * 2**30
    memory_bytes: Positive = 512 * 2**20
    num_threads: Positive = 16
    deadline_seconds: Seconds = 300.0
    timeout_seconds: Seconds = 30.0
    spool_dir: str | None = None
    options: dict[str, Any] = msgspec.field(default_factory=dict)
