"""Files that appear whole or not at all, on a disk or in an object store. The only module that writes to a cache.

Every step of publishing calls `reached(name)`; the crash tests kill the process there.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kdcache.errors import StorageError
from kdcache.format import paths
from kdcache.store.files.disk_errors import reason_of
from kdcache.store.files.location import Location, own_files
from kdcache.store.files.regular import is_own_file, is_own_folder, open_regular, what_is_not_own, write_new

ABANDONED_SECONDS = 24 * 3600
"""A temp file of a writer on another machine or in another container is swept when it has not been written to for this long."""

_TEMP = re.compile(r"(.+)-([0-9]+)-([0-9a-f]{8})\.[0-9]+")
_temp_numbers = itertools.count()
_process_token = secrets.token_hex(4)

FAULT_POINTS = (
    "directories made",
    "sidecar published",
    "temp file written",
    "temp file synced",
    "renamed",
    "renamed and synced",
    "linked",
    "linked and synced",
    "shard published",
    "journal published",
    "index published",
    "manifest published",
    "swept one",
)
"""The names that `reached` is called with, in about the order a capture meets them."""

REMOTE_FAULT_POINTS = (
    "sidecar published",
    "temp file written",
    "object uploaded",
    "shard published",
    "object put",
    "journal published",
    "index published",
    "object created",
    "manifest published",
    "swept one",
)
"""Those of a capture into an object store."""

BLOCK_FAULT_POINTS = ("block written", "block evicted")
"""Those of the block cache."""


def reached(point: str) -> None:
    """Mark a fault point; does nothing. Crash tests replace it with something deadly."""


def make_directories(root: Location) -> None:
    """Make the cache's directories where they are missing."""
    if not isinstance(root, Path):
        return
    missing = missing_directories(root)
    try:
        for name in paths.DIRECTORIES:
            (root / name).mkdir(parents=True, exist_ok=True)
            _refuse_other_folder(root / name)
        for path in [root, *(path.parent for path in missing)]:
            sync_directory(path)
    except OSError as error:
        raise StorageError(f"the cache's folders cannot be made under {str(root)!r}: {reason_of(error)}") from error
    reached("directories made")


def make_directory(root: Location, name: str) -> None:
    """Make one more directory of a cache; object stores need none."""
    if isinstance(root, Path):
        (root / name).mkdir(exist_ok=True)
        _refuse_other_folder(root / name)
        sync_directory(root)


def temp_path(root: Location) -> Path:
    """A private name in tmp/ of the same file system, or, for an object store, in a local folder."""
    return _temp_folder(root) / temp_name()


def temp_name() -> str:
    """A name that nothing had before; it carries host and pid, so that a dead writer's files can be recognized."""
    # The token: in a restarted container host and pid come back, and a name used again could be a dead writer's file that is
    # still hard-linked to a published manifest; writing into that one would write into the manifest.
    return f"{_host()}-{os.getpid()}-{_process_token}.{next(_temp_numbers)}"


def publish_file(root: Location, temp: Path, name: str) -> None:
    """Give a written temp file its final, content-derived name. An equal file of that name is replaced by its equal."""
    if not isinstance(root, Path):
        (root / name).upload(temp)
        reached("object uploaded")
        return
    sync_file(temp)
    reached("temp file synced")
    os.replace(temp, root / name)
    reached("renamed")
    sync_directory((root / name).parent)
    reached("renamed and synced")


def move(root: Location, name: str, target: str) -> None:
    """Give a file of the cache another name in it, replacing what has that name; nothing where it is not there."""
    if isinstance(root, Path):
        with suppress(FileNotFoundError):
            os.replace(root / name, root / target)
            sync_directory((root / name).parent)
            sync_directory((root / target).parent)
        return
    path, copy = root / name, temp_path(root)
    try:
        path.download(copy)
        (root / target).upload(copy)
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    finally:
        copy.unlink(missing_ok=True)


def publish_bytes(root: Location, data: bytes, name: str) -> None:
    """Write bytes under a final name, whole or not at all; an existing file is replaced."""
    if not isinstance(root, Path):
        (root / name).write_bytes(data)
        reached("object put")
        return
    temp = temp_path(root)
    try:
        _write_temp(temp, data)
        publish_file(root, temp, name)
    finally:
        temp.unlink(missing_ok=True)


def publish_new(root: Location, data: bytes, name: str) -> bool:
    """Write bytes under a final name unless a file of that name exists; whole or not at all.

    Returns:
        False if the name is taken; that file is left as it is. (In an object store: taken by other bytes.)
    """
    if not isinstance(root, Path):
        created = (root / name).create(data)
        reached("object created")
        return created
    temp = temp_path(root)
    try:
        _write_temp(temp, data)
        sync_file(temp)
        reached("temp file synced")
        os.link(temp, root / name)  # link, unlike rename, fails where the name exists: put-if-absent
        reached("linked")
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        return _rename_new(root, temp, name)
    finally:
        temp.unlink(missing_ok=True)
    sync_directory((root / name).parent)
    reached("linked and synced")
    return True


def missing_directories(root: Location) -> list[Path]:
    """The cache's directory and its parents, as far as they do not exist yet; none in an object store, which has none."""
    return [path for path in (root, *root.parents) if not path.exists()] if isinstance(root, Path) else []


def remove_cache(root: Location, made: Iterable[Path]) -> None:
    """Remove a cache that was not finished, and the directories that were made for it.

    The manifests go last: what is left by a kill in between is a cache that can still be resumed.

    Args:
        made: as `missing_directories` gave them before the cache was started.
    """
    for name in (paths.JOURNAL, paths.DATA, paths.INDEX, paths.SIDECARS, paths.FAILED, paths.TMP, paths.MANIFESTS):
        for path in sorted(own_files(root / name), key=str, reverse=True):
            path.unlink(missing_ok=True)
        if isinstance(root, Path):
            with suppress(OSError):
                (root / name).rmdir()
    with suppress(OSError):  # not empty: somebody else's
        for directory in made:
            directory.rmdir()


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """fsync a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """fsync a directory, so that a rename in it survives a power cut."""
    sync_file(path)


def sweep_temp_files(root: Location) -> int:
    """Delete temp files whose writer is gone. Returns how many."""
    swept = 0
    for path in _temp_folder(root).iterdir():
        if is_own_file(path) and is_abandoned(path):
            path.unlink(missing_ok=True)
            swept += 1
            reached("swept one")
    return swept


def is_temp_name(base_name: str) -> bool:
    """Whether a name is one that `temp_path` gives."""
    return _TEMP.fullmatch(base_name) is not None


def is_abandoned(path: Path) -> bool:
    """Whether this is a temp file of a writer that is gone."""
    match = _TEMP.fullmatch(path.name)
    if match is None:
        return False
    host, pid, token = match[1], int(match[2]), match[3]
    if host != _host():
        try:
            return time.time() - path.lstat().st_mtime > ABANDONED_SECONDS
        except FileNotFoundError:
            return False
    return token != _process_token if pid == os.getpid() else not _is_running(pid)


def _temp_folder(root: Location) -> Path:
    if isinstance(root, Path):
        return root / paths.TMP
    user = getattr(os, "getuid", int)()
    spool = root.config.spool_dir
    # By user: where several share a machine, the first one's folder would be closed to the others.
    folder = Path(spool) if spool is not None else Path(tempfile.gettempdir()) / f"kdcache-spool-{user}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if spool is None and (folder.lstat().st_uid != user or not is_own_folder(folder)):
        raise StorageError(
            f"{str(folder)!r} is not a folder of this user alone: another could change what is uploaded; set remote.spool_dir"
        )
    return folder


def _refuse_other_folder(path: Path) -> None:
    """Raise StorageError for a link to a folder: what is written, or swept, would be elsewhere."""
    there = what_is_not_own(path, folder=True)
    if there is not None:
        raise StorageError(
            f"{path}: is {there}, but a cache that is written has folders of its own; to keep it on another disk, move "
            "the whole cache there"
        )


def _host() -> str:
    """The scope in which pids are unique: the host and, as containers can share its name, the pid namespace."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}.{namespace}"


def _write_temp(temp: Path, data: bytes) -> None:
    write_new(temp, data)
    reached("temp file written")


def _rename_new(root: Path, temp: Path, name: str) -> bool:
    # A file system without hard links: the check and the rename are two steps, so two writers could both pass the check. What
    # they would write is named by content or is the same manifest, so the loser's file is redone, not lost.
    if (root / name).exists():
        return False
    publish_file(root, temp, name)
    return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
