"""What an error on reading a file means: the file is missing or damaged, or the disk refuses and the file may be whole."""

from __future__ import annotations

import errno
import os

from kdcache.errors import CorruptCacheError, StorageError

_OF_THE_FILE = {None, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO}
"""None: Arrow's own, of what it found in the file."""


def is_damage(error: Exception) -> bool:
    """Whether an error on reading tells of the file itself: missing, not a file, or a sector that cannot be read."""
    return not isinstance(error, OSError) or error.errno in _OF_THE_FILE


def read_error(where: object, error: Exception, what: str = "cannot be read") -> CorruptCacheError | StorageError:
    """What to raise for a file of a cache that could not be read: StorageError where that says nothing of the file."""
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    if is_damage(error):
        return CorruptCacheError(f"{where}: {what}: {reason}")
    return StorageError(f"{where}: {what}: {reason}; nothing is known to be wrong with the file itself")


def reason_of(error: OSError) -> str:
    """What the operating system says, without Arrow's words around it."""
    return os.strerror(error.errno) if error.errno else str(error)
