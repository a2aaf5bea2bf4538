"""Files that appear whole or not at all. The only module that writes to a cache's directory.

Every step of publishing calls `reached(name)`; the crash tests kill the process there.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import socket
from pathlib import Path

from kdcache.errors import CaptureError
from kdcache.format import paths

_temp_numbers = itertools.count()

FAULT_POINTS = (
    "directories made",
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


def reached(point: str) -> None:
    """Called at each fault point; does nothing. Crash tests put something deadly in its place."""


def make_directories(root: Path) -> None:
    """The cache's directories, made where they are missing."""
    try:
        for name in paths.DIRECTORIES:
            (root / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CaptureError(f"cannot make the cache's directories under {str(root)!r}: {error}") from error
    sync_directory(root)
    reached("directories made")


def temp_path(root: Path) -> Path:
    """A private name in tmp/ of the same file system; carries host and pid, so that a dead writer's files can be told."""
    return root / paths.TMP / f"{socket.gethostname()}-{os.getpid()}-{next(_temp_numbers)}"


def publish_file(root: Path, temp: Path, name: str) -> None:
    """Give a written temp file its final, content-derived name. An equal file of that name is replaced by its equal."""
    sync_file(temp)
    reached("temp file synced")
    os.replace(temp, root / name)
    reached("renamed")
    sync_directory((root / name).parent)
    reached("renamed and synced")


def publish_bytes(root: Path, data: bytes, name: str) -> None:
    """Write bytes under a final name, whole or not at all; replaces."""
    temp = _write_temp(root, data)
    publish_file(root, temp, name)


def publish_new(root: Path, data: bytes, name: str) -> bool:
    """Write bytes under a final name unless a file of that name exists; whole or not at all.

    Returns:
        False if the name is taken; that file is left as it is.
    """
    temp = _write_temp(root, data)
    sync_file(temp)
    reached("temp file synced")
    try:
        os.link(temp, root / name)  # link, unlike rename, fails where the name exists: put-if-absent
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        return _rename_new(root, temp, name)
    finally:
        temp.unlink(missing_ok=True)
    reached("linked")
    sync_directory((root / name).parent)
    reached("linked and synced")
    return True


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
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


def sweep_temp_files(root: Path) -> int:
    """Delete temp files whose writer is gone: a process of this host that no longer runs. Returns how many."""
    swept = 0
    host = socket.gethostname()
    for path in (root / paths.TMP).iterdir():
        writer_host, _, rest = path.name.rpartition("-")[0].rpartition("-")
        if writer_host == host and rest.isdigit() and not _is_running(int(rest)):
            path.unlink(missing_ok=True)
            swept += 1
            reached("swept one")
    return swept


def _write_temp(root: Path, data: bytes) -> Path:
    temp = temp_path(root)
    temp.write_bytes(data)
    reached("temp file written")
    return temp


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
    except PermissionError:
        return True
    return True
