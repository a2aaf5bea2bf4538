"""Object stores through fsspec, which nothing else imports: the few requests that a cache needs, in bytes and OSErrors."""

from __future__ import annotations

import errno
import inspect
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from kdcache.config.remote import RemoteConfig
from kdcache.errors import ConfigError, MissingDependencyError

PART_BYTES = 16 * 2**20
"""Of a multipart upload; an object of fewer than two parts is put at once."""

EXTRAS = {"s3": "s3", "gs": "gs", "hf": "hf", "memory": "remote"}
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "memory": "fsspec"}
_OCCUPIED = {"PreconditionFailed", "412"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError"}


@dataclass(frozen=True)
class Entry:
    """What a store says of an object or, with `is_folder`, of a prefix."""

    name: str
    num_bytes: int
    modified_at: float
    is_folder: bool


class ObjectStore:
    """The requests, one attempt each. Safe to use from several threads and after a fork."""

    def __init__(self, scheme: str, config: RemoteConfig) -> None:
        self._scheme, self._options = scheme, _options(scheme, config)
        self._lock = threading.Lock()
        self._filesystem: tuple[int, Any] | None = None

    def read(self, uri: str, start: int, stop: int, seconds: float) -> bytes:
        """Bytes start..stop-1 of an object, or fewer where it is shorter or the answer is cut."""
        return self._call("cat_file", uri, seconds, start=start, end=stop)

    def entry(self, uri: str, seconds: float) -> Entry:
        """What the store says of this name. Raises FileNotFoundError."""
        return _entry(self._call("info", uri, seconds))

    def list(self, uri: str, seconds: float) -> list[Entry]:
        """What there is right under a prefix, asked anew; empty where there is nothing."""
        try:
            found = self._call("ls", uri, seconds, detail=True, **self._if_taken("ls", refresh=True))
        except FileNotFoundError:
            return []
        return [_entry(info) for info in found if info["name"].strip("/") != self._path(uri).strip("/")]

    def put(self, uri: str, data: bytes, seconds: float) -> None:
        """Put an object, whole or not at all; replaces."""
        self._call("pipe_file", uri, seconds, data)

    def create(self, uri: str, data: bytes, seconds: float) -> None:
        """Put an object where there is none. Raises FileExistsError."""
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
            raise _translated(error, uri) from error

    def _path(self, uri: str) -> str:
        return self._open()._strip_protocol(uri)

    def _if_taken(self, method: str, **kwargs: Any) -> dict[str, Any]:
        """The arguments if this file system has them: they are not part of fsspec's own interface."""
        filesystem = self._open()
        function = getattr(filesystem, f"_{method}" if isinstance(filesystem, AsyncFileSystem) else method)
        return {name: value for name, value in kwargs.items() if name in inspect.signature(function).parameters}

    def _open(self) -> Any:
        # A fork inherits neither fsspec's event loop nor its connections: each process opens its own.
        with self._lock:
            if self._filesystem is None or self._filesystem[0] != os.getpid():
                self._filesystem = os.getpid(), _filesystem(self._scheme, self._options)
            return self._filesystem[1]

    def renew_after_fork(self) -> None:
        """In the child: another thread may have held the lock."""
        self._lock = threading.Lock()


_memory_lock = threading.Lock()


def _options(scheme: str, config: RemoteConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"use_listings_cache": False, **config.options}
    if scheme == "s3":
        # botocore's own attempts would multiply ours.
        timeouts = {"connect_timeout": min(10.0, config.timeout_seconds), "read_timeout": config.timeout_seconds}
        pool = {"max_pool_connections": max(10, config.num_threads)}
        options["config_kwargs"] = {**timeouts, **pool, "retries": {"max_attempts": 0}}
    return options


def _filesystem(scheme: str, options: dict[str, Any]) -> Any:
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise MissingDependencyError(_PACKAGES[scheme], extra=EXTRAS[scheme], purpose=f"{scheme}://") from error
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigError(f"remote.options: {scheme}:// does not take {options}: {error}") from error


def _entry(info: dict[str, Any]) -> Entry:
    modified = info.get("LastModified") or info.get("mtime") or info.get("updated") or info.get("created")
    at = modified.timestamp() if hasattr(modified, "timestamp") else 0.0  # pyright: ignore[reportOptionalMemberAccess]
    name = info["name"].rstrip("/").rpartition("/")[2]
    return Entry(name, int(info.get("size") or 0), at, info.get("type") == "directory")


def _translated(error: Exception, uri: str) -> Exception:
    """An OSError that says by its type what to do: missing, occupied and refused are answers, all others can be tried again."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri)
    codes = {_code(cause) for cause in _causes(error)}
    if isinstance(error, FileExistsError) or codes & _OCCUPIED:
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), uri)
    if any(type(cause).__name__ in _NO_CREDENTIALS for cause in _causes(error)):
        return PermissionError(errno.EACCES, str(error), uri)
    if isinstance(error, OSError):
        return error
    return OSError(errno.EIO, f"{type(error).__name__}: {error}", uri)


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    found = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
    return str(found)
