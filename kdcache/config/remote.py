"""How caches in object stores are reached. Frozen, keyword-only, unknown keys refused; imports nothing heavy."""

from __future__ import annotations

from typing import Any

import msgspec

from kdcache.config.base import Config, Positive, Seconds


class RemoteConfig(Config, frozen=True, kw_only=True):
    """How a cache under `s3://`, `gs://`, `hf://` or `memory://` is read and written; without effect for one on a disk.

    Attributes:
        block_dir: local folder in which record batches that were read are kept for the next time; null keeps them in memory
            alone. Any number of processes and caches may share it. It must have room for what all of them read ahead: a loader
            looks whether its own share fits, for all workers of its DataLoader, but knows of no other process. With order
            `local` ranks read the same shards at about the same time; with `global` each of N ranks of a machine needs as
            much room as one: give `block_bytes` N times the size that a refusal names.
        block_bytes: most bytes in `block_dir`; several processes at work may pass it by a sixty-fourth each.
        memory_bytes: record batches held in memory: those fetched ahead (without `block_dir`), and as many again in use.
        num_threads: requests at once, per reader.
        deadline_seconds: how long a request is tried again, with growing waits, before the store counts as out of reach.
        timeout_seconds: of one attempt, to which is added the time that its bytes take at 1 MB/s.
        spool_dir: local folder where a shard is written before it is uploaded; null for the system's folder for such files.
        options: further arguments of the file system (fsspec's storage options: `endpoint_url`, `anon`, `config_kwargs`, ...).
            They go before fsspec's own files and variables, and those before our timeouts; what does not clash is merged.
            Credentials belong in the store's own environment variables or files; those that stand here are used, and masked in
            messages and in training runs' records.
    """

    block_dir: str | None = None
    block_bytes: Positive = 32 * 2**30
    memory_bytes: Positive = 512 * 2**20
    num_threads: Positive = 16
    deadline_seconds: Seconds = 300.0
    timeout_seconds: Seconds = 30.0
    spool_dir: str | None = None
    options: dict[str, Any] = msgspec.field(default_factory=dict)
