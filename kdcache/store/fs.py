"""Files that appear whole or not at all. The only module that writes to a cache's directory.

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
import time
from pathlib import Path

from kdcache.errors import CaptureError
from kdcache.format import paths

ABANDONED_SECONDS = 24 * 3600
"""A temp file of a writer elsewhere (another machine or container) is swept when nothing was written to it for so long."""

_TEMP = re.compile(r"(.+)-([0-9]+)-([0-9a-f]{8})\.[0-9]+")
_temp_numbers = itertools.count()
_process_token = secrets.token_hex(4)

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
    missing = [path for path in (root, *root.parents) if not path.exists()]
    try:
        for name in paths.DIRECTORIES:
            (root / name).mkdir(parents=True, exist_ok=True)
        for path in [root, *(path.parent for path in missing)]:
            sync_directory(path)
    except OSError as error:
        raise CaptureError(f"cannot make the cache's directories under {str(root)!r}: {error}") from error
    reached("directories made")


def temp_path(root: Path) -> Path:
    """A private name in tmp/ of the same file system; carries host and pid, so that a dead writer's files can be told."""
    # The token: in a restarted container host and pid come back, and a name used again could be a dead writer's file that is
    # still hard-linked to a published manifest; writing into that one would write into the manifest.
    return root / paths.TMP / f"{_host()}-{os.getpid()}-{_process_token}.{next(_temp_numbers)}"


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
    temp = temp_path(root)
    try:
        _write_temp(temp, data)
        publish_file(root, temp, name)
    finally:
        temp.unlink(missing_ok=True)


def publish_new(root: Path, data: bytes, name: str) -> bool:
    """Write bytes under a final name unless a file of that name exists; whole or not at all.

    Returns:
        False if the name is taken; that file is left as it is.
    """
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
    """Delete temp files whose writer is gone. Returns how many."""
    swept = 0
    for path in (root / paths.TMP).iterdir():
        if _is_abandoned(path):
            path.unlink(missing_ok=True)
            swept += 1
            reached("swept one")
    return swept


def is_temp_name(base_name: str) -> bool:
    """Whether a name is one that `temp_path` gives."""
    return _TEMP.fullmatch(base_name) is not None


def _is_abandoned(path: Path) -> bool:
    match = _TEMP.fullmatch(path.name)
    if match is None:
        return False
    host, pid, token = match[1], int(match[2]), match[3]
    if host != _host():
        try:
            return time.time() - path.stat().st_mtime > ABANDONED_SECONDS
        except FileNotFoundError:
            return False
    return token != _process_token if pid == os.getpid() else not _is_running(pid)


def _host() -> str:
    """Where pids mean the same: the host and, as containers can share its name, the pid namespace."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}.{namespace}"


def _write_temp(temp: Path, data: bytes) -> None:
    temp.write_bytes(data)
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
