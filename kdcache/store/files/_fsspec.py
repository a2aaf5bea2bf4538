"""Object stores through fsspec, which only this file imports: the few requests that a cache needs, as bytes and OSErrors."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.config import conf as fsspec_settings

from kdcache.config.remote import RemoteConfig
from kdcache.credentials import remember
from kdcache.errors import ConfigError, StorageError
from kdcache.store.files.remote_errors import http_status, translated

PART_BYTES = 16 * 2**20
"""Of a multipart upload; an object of fewer than two parts is put at once."""

_BEYOND_THE_END = 416
_PUTTING = {"pipe_file", "put_file"}


@dataclass(frozen=True)
class Entry:
    """What a store says of an object or, with `is_folder`, of a prefix."""

    name: str
    num_bytes: int
    modified_at: float
    is_folder: bool


class ObjectStore:
    """The requests to one object store, one attempt each. Safe to use from several threads and after a fork."""

    def __init__(self, scheme: str, config: RemoteConfig) -> None:
        self._scheme, self._config = scheme, config
        self._lock = threading.Lock()
        self._filesystem: tuple[int, Any] | None = None

    def read(self, uri: str, start: int, stop: int, seconds: float) -> bytes:
        """Bytes start..stop-1 of an object, or fewer where it is shorter or the answer is cut."""
        try:
            return self._call("cat_file", uri, seconds, start=start, end=stop)
        except StorageError as error:
            if error.__cause__ is not None and http_status(error.__cause__) == _BEYOND_THE_END:
                return b""
            raise

    def entry(self, uri: str, seconds: float) -> Entry:
        """What the store says of this name. Raises FileNotFoundError."""
        return _entry(self._call("info", uri, seconds))

    def list(self, uri: str, seconds: float) -> list[Entry]:
        """What lies right under a prefix, asked of the store each time; empty where nothing does."""
        try:
            found = self._call("ls", uri, seconds, detail=True, **self._if_taken("ls", refresh=True))
        except FileNotFoundError:
            return []
        return [_entry(info) for info in found if info["name"].strip("/") != self._path(uri).strip("/")]

    def put(self, uri: str, data: bytes, seconds: float) -> None:
        """Put an object, whole or not at all; replaces."""
        self._call("pipe_file", uri, seconds, data)

    def create(self, uri: str, data: bytes, seconds: float) -> None:
        """Put an object where none exists. Raises FileExistsError."""
        if self._scheme == "memory":
            with _memory_lock:  # fsspec looks and writes in two steps
                self._call("pipe_file", uri, seconds, data, mode="create")
        else:
            self._call("pipe_file", uri, seconds, data, mode="create")

    def upload(self, local: Path, uri: str, seconds: float) -> None:
        """Put a file; it appears when its last part is there."""
        path = self._path(uri)
        parts = self._if_taken("put_file", chunksize=PART_BYTES)
        self._request("put_file", uri, seconds, str(local), path, **parts)

    def delete(self, uri: str, seconds: float) -> None:
        """Remove an object. Raises FileNotFoundError where the store says so; S3 does not."""
        self._call("rm_file", uri, seconds)

    def _call(self, method: str, uri: str, seconds: float, *args: Any, **kwargs: Any) -> Any:
        return self._request(method, uri, seconds, self._path(uri), *args, **kwargs)

    def _request(self, method: str, uri: str, seconds: float, *args: Any, **kwargs: Any) -> Any:
        filesystem = self._open()
        try:
            if isinstance(filesystem, AsyncFileSystem):
                return sync(filesystem.loop, getattr(filesystem, f"_{method}"), *args, timeout=seconds, **kwargs)
            return getattr(filesystem, method)(*args, **kwargs)
        except Exception as error:
            raise translated(error, uri, is_put=method in _PUTTING) from error

    def _path(self, uri: str) -> str:
        """The name as the file system takes it; raises ConfigError where it would read a different name."""
        filesystem = self._open()
        path = filesystem._strip_protocol(uri)
        parts = filesystem.split_path(path)[:2] if hasattr(filesystem, "split_path") else (path,)
        written = uri.partition("://")[2].strip("/")
        if path.strip("/") != written or "/".join(parts).strip("/") != written:
            raise ConfigError(f"{uri!r}: {self._scheme}:// reads this name as {'/'.join(parts)!r}; take a plainer one")
        return path

    def _if_taken(self, method: str, **kwargs: Any) -> dict[str, Any]:
        """The arguments if this file system has them: they are not part of fsspec's own interface."""
        filesystem = self._open()
        function = getattr(filesystem, f"_{method}" if isinstance(filesystem, AsyncFileSystem) else method)
        return {name: value for name, value in kwargs.items() if name in inspect.signature(function).parameters}

    def _open(self) -> Any:
        # A fork inherits neither fsspec's event loop nor its connections: each process opens its own.
        with self._lock:
            if self._filesystem is None or self._filesystem[0] != os.getpid():
                self._filesystem = os.getpid(), _filesystem(self._scheme, self._config)
            return self._filesystem[1]

    def renew_after_fork(self) -> None:
        """Make the lock again in a forked child, where another thread may have held it."""
        self._lock = threading.Lock()


_memory_lock = threading.Lock()


def _own_options(scheme: str, config: RemoteConfig) -> dict[str, Any]:
    """What we ask of a file system, where the user says nothing else."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":
        # botocore's own attempts would multiply ours.
        timeouts = {"connect_timeout": min(10.0, config.timeout_seconds), "read_timeout": config.timeout_seconds}
        pool = {"max_pool_connections": max(10, config.num_threads)}
        options["config_kwargs"] = {**timeouts, **pool, "retries": {"max_attempts": 0}}
    return options


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings; `high` wins where they differ, and mappings inside are merged the same way."""
    merged = {**low, **high}
    for name in low.keys() & high.keys():
        if isinstance(low[name], Mapping) and isinstance(high[name], Mapping):
            merged[name] = _merged(low[name], high[name])
    return merged


def _filesystem(scheme: str, config: RemoteConfig) -> Any:
    kind = fsspec.get_filesystem_class(scheme)
    options = _own_options(scheme, config)
    # fsspec itself would put ours in place of what its files and variables (FSSPEC_S3_...) set, whole dictionaries at once.
    for protocol in (kind.protocol,) if isinstance(kind.protocol, str) else kind.protocol:
        options = _merged(options, fsspec_settings.get(protocol, {}))
    options = _merged(options, config.options)
    remember(options)  # what a store says of them is shown without them
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"remote.options: {scheme}:// does not take {sorted(options)}: {error}") from error


def _entry(info: dict[str, Any]) -> Entry:
    modified = info.get("LastModified") or info.get("mtime") or info.get("updated") or info.get("created")
    at = modified.timestamp() if hasattr(modified, "timestamp") else 0.0  # pyright: ignore[reportOptionalMemberAccess]
    name = info["name"].rstrip("/").rpartition("/")[2]
    return Entry(name, int(info.get("size") or 0), at, info.get("type") == "directory")
