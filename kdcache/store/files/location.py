"""Where a cache is: a folder on a disk (a `Path`) or a prefix in an object store (a `RemotePath`), with the same methods."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar
from urllib.parse import unquote

from kdcache.config.remote import RemoteConfig
from kdcache.credentials import looks_secret
from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.extras import EXTRAS, STORES, require
from kdcache.store.files.regular import is_own_file, is_own_folder, read_regular
from kdcache.store.files.retry import RetryPolicy, retried

if TYPE_CHECKING:
    from kdcache.store.files._fsspec import Entry, ObjectStore

Answer = TypeVar("Answer")
Item = TypeVar("Item")

SCHEMES = ("s3", "gs", "hf", "memory")
_MOST_NAME_BYTES = 255
_CREATING = ("s3://", "gs://", "memory://")
READ_BYTES = 16 * 2**20
"""Of one request, where more is read in sequence."""

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)


def locate(path: str | os.PathLike[str] | RemotePath, remote: RemoteConfig | None = None) -> Location:
    """Turn a plain path, a `file://` URI or a URI of an object store into a location. A location is returned as it is.

    Args:
        remote: how an object store is reached; the defaults for None.

    Raises:
        ConfigError: an unknown scheme, a `file://` URI of another machine, or a name that a store would read otherwise.
    """
    if isinstance(path, RemotePath):
        return path
    match = _URI.fullmatch(path) if isinstance(path, str) else None
    if match is None:
        _check_path(os.fspath(path))
        return Path(path)
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        if not rest.startswith("/"):
            raise ConfigError(f"{path!r}: expected file:///absolute/path, of this machine")
        return Path(unquote(rest))
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in ("file", *SCHEMES))
        raise ConfigError(f"{path!r}: unknown scheme {scheme!r}; expected a path or one of {known}")
    if not rest.strip("/"):
        raise ConfigError(f"{path!r}: names no bucket or prefix in the store; expected {scheme}://BUCKET/PREFIX")
    name = rest.rstrip("/") if scheme != "memory" else rest.strip("/")
    _check_name(scheme, name)
    return RemotePath(f"{scheme}://{name}", remote or RemoteConfig())


def _check_path(path: str) -> None:
    """Raise ConfigError for a path that no file can have, and for a URI that has lost a slash, as `Path("s3://bucket/x")` does:
    a folder `s3:` would be made."""
    if "\0" in path or any(len(os.fsencode(part)) > _MOST_NAME_BYTES for part in path.split(os.sep)):
        raise ConfigError(
            f"{path!r}: a part of the path is longer than {_MOST_NAME_BYTES} bytes, or holds a NUL; no file has it"
        )
    if "://" in path:
        raise ConfigError(
            f"{path!r}: several addresses in one, or no scheme; expected a path or one address, as in s3://bucket/x"
        )
    scheme, colon, rest = path.partition(":")
    if colon and scheme.lower() in ("file", *SCHEMES) and rest.startswith("/"):
        uri = f"{scheme}://{'/' if scheme == 'file' else ''}{rest.strip('/')}"
        raise ConfigError(f"{path!r}: expected a URI, as text: {uri}")


def _check_name(scheme: str, name: str) -> None:
    """Raise ConfigError for a name that stores, their libraries and listings do not all read the same way."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        plain = "/".join(part for part in parts if part not in ("", ".", ".."))
        raise ConfigError(f"{scheme}://{name}: a part of the name is empty, '.' or '..'; did you mean {scheme}://{plain}?")
    if looks_secret(f"{scheme}://{name}"):
        raise ConfigError(
            f"{scheme}://{name}: holds a user, a password or a key, which no store reads there; set the store's variables"
        )
    if not name.isprintable():
        raise ConfigError(f"{f'{scheme}://{name}'!r}: holds a control character; take a name without")


@dataclass(frozen=True)
class RemoteStat:
    """What a store knows of what `os.stat` gives: bytes, and seconds from 1970 to the last change."""

    st_size: int
    st_mtime: float


class RemotePath:
    """A name in an object store, with those of `pathlib.Path`'s methods that a cache needs.

    Every request is tried again until its deadline, see `retried`; a missing object is a FileNotFoundError, a store out of
    reach a StorageError. Can be pickled.
    """

    def __init__(self, uri: str, config: RemoteConfig) -> None:
        self.uri, self.config = uri, config

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.uri}/{name}", self.config)

    def __str__(self) -> str:
        return self.uri

    def __repr__(self) -> str:
        return f"RemotePath({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    @property
    def can_create(self) -> bool:
        """Whether the store puts an object only where none exists, as one step; no cache is written to a store that cannot."""
        return self.uri.startswith(_CREATING)

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self.uri.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The name without its last part."""
        return RemotePath(self.uri.rpartition("/")[0], self.config)

    def absolute(self) -> RemotePath:
        """The same path: a URI does not depend on the working directory."""
        return self

    def relative_to(self, other: RemotePath) -> str:
        """The part after a prefix."""
        return self.uri.removeprefix(f"{other.uri}/")

    def stat(self) -> RemoteStat:
        """Ask for size and time. Raises FileNotFoundError."""
        entry = self._retried("asking for", lambda seconds: self._store.entry(self.uri, seconds))
        return RemoteStat(entry.num_bytes, entry.modified_at)

    def exists(self) -> bool:
        """Whether there is an object of this name, or any below it."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there is any object below this name."""
        return bool(self._entries())

    def iterdir(self) -> Iterator[RemotePath]:
        """The names right below this one; an object store has no empty folders."""
        return (self / entry.name for entry in self._entries())

    def read_bytes(self) -> bytes:
        """Read the whole object; its size is asked first, as an answer that was cut short could not be recognized otherwise."""
        num_bytes = self.stat().st_size
        return b"".join(self.read_range(at, min(at + READ_BYTES, num_bytes)) for at in range(0, num_bytes, READ_BYTES))

    def read_range(self, start: int, stop: int) -> bytes:
        """Read bytes start..stop-1, all of them.

        Raises:
            CorruptCacheError: the object ends before `stop`. Answers that are short for another reason are tried again.
        """
        return self._retried(f"reading bytes {start}:{stop} of", lambda s: self._read_range(start, stop, s), stop - start)

    def download(self, local: Path) -> None:
        """Download the whole object into a file."""
        num_bytes = self.stat().st_size
        with local.open("xb") as file:
            for at in range(0, num_bytes, READ_BYTES):
                file.write(self.read_range(at, min(at + READ_BYTES, num_bytes)))

    def write_bytes(self, data: bytes) -> None:
        """Put the object, whole or not at all; an existing one is replaced."""
        self._retried("writing", lambda seconds: self._store.put(self.uri, data, seconds), len(data))

    def create(self, data: bytes) -> bool:
        """Put the object if none exists. True where, in the end, it holds these bytes: an answer may be lost on its way, and
        the next attempt then finds what the one before it has put."""
        try:
            self._retried("creating", lambda seconds: self._store.create(self.uri, data, seconds), len(data))
        except FileExistsError:
            return self.read_bytes() == data
        return True

    def upload(self, local: Path) -> None:
        """Put a file; the object appears with its last byte."""
        self._retried("uploading", lambda seconds: self._store.upload(local, self.uri, seconds), local.stat().st_size)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        try:
            self._retried("deleting", lambda seconds: self._store.delete(self.uri, seconds))
        except FileNotFoundError:
            if not missing_ok:
                raise

    @property
    def _store(self) -> ObjectStore:
        return _store_of(self.uri.partition("://")[0], _key_of(self.config))

    def _entries(self) -> list[Entry]:
        return self._retried("listing", lambda seconds: self._store.list(self.uri, seconds))

    def _read_range(self, start: int, stop: int, seconds: float) -> bytes:
        data = self._store.read(self.uri, start, stop, seconds)
        if len(data) == stop - start:
            return data
        num_bytes = self._store.entry(self.uri, seconds).num_bytes
        if num_bytes < stop:
            raise CorruptCacheError(f"{self.uri}: has {num_bytes} bytes, expected {stop} or more; it is truncated or damaged")
        raise OSError(f"{len(data)} bytes of {stop - start} came")

    def _retried(self, doing: str, attempt: Callable[[float], Answer], num_bytes: int = 0) -> Answer:
        policy = RetryPolicy(self.config.deadline_seconds, self.config.timeout_seconds)
        return retried(attempt, policy, what=f"{doing} {self.uri}", num_bytes=num_bytes)


Location: TypeAlias = Path | RemotePath
"""Of a cache, or of a file in it."""


def children(directory: Location) -> list[Location]:
    """The names right below a directory; none where it does not exist."""
    return list(directory.iterdir()) if not isinstance(directory, Path) or directory.is_dir() else []


def own_files(directory: Location) -> list[Location]:
    """The children that may be deleted: plain files, in a folder that is not a link."""
    if not isinstance(directory, Path):
        return children(directory)
    return list(filter(is_own_file, directory.iterdir())) if is_own_folder(directory) else []


def read_file(path: Location) -> bytes:
    """Read a file of a cache; on a disk only a plain file inside the cache's folder.

    Raises:
        FileNotFoundError: no such file. CorruptCacheError: see `regular_file`.
    """
    return read_regular(path) if isinstance(path, Path) else path.read_bytes()


def each(function: Callable[[Item], Answer], items: Iterable[Item], root: Location) -> Iterator[Answer]:
    """`map(function, items)`; by threads where `root` is in an object store, so that their requests run side by side."""
    if isinstance(root, Path):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(root.config.num_threads) as pool:
        yield from pool.map(function, items)


class _ConfigKey:
    """A config that can be a key: its `options` are a dict, which has no hash."""

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config

    def __hash__(self) -> int:
        return hash((self.config.timeout_seconds, self.config.num_threads, *sorted(self.config.options)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ConfigKey) and other.config == self.config


def _key_of(config: RemoteConfig) -> _ConfigKey:
    return _ConfigKey(config)


@lru_cache(maxsize=64)
def _store_of(scheme: str, key: _ConfigKey) -> ObjectStore:
    package = STORES.get(scheme, "fsspec")
    require(package, "fsspec", purpose=f"{scheme}://", extra=EXTRAS[package])
    from kdcache.store.files import _fsspec

    store = _fsspec.ObjectStore(scheme, key.config)
    _stores.append(store)
    return store


_stores: list[ObjectStore] = []


def _renew_after_fork() -> None:
    for store in _stores:
        store.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)
