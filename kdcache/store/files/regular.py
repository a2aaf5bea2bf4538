"""Find the file that a name in a folder means; the folder may be a stranger's, so only a plain file inside it will do.

A link in the folder could have any file of the reader's read, shown, written to or swept; a named pipe blocks whoever opens it
for ever, and a device does what it likes. So each name is followed to its end first. See the README's decisions.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from kdcache.errors import CorruptCacheError

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device", stat.S_IFLNK: "a link",
}  # fmt: skip
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_BLOBS, _SNAPSHOTS = "blobs", "snapshots"


def regular_file(path: Path, folder: Path | None = None) -> Path:
    """The plain file that a name in a folder means, links followed.

    Args:
        path: the name.
        folder: whose file it must be; None for that of a cache, in which files lie one folder deep.

    Raises:
        CorruptCacheError: it is something else, or a link that leads out of the folder. FileNotFoundError: no such file.
    """
    real = Path(os.path.realpath(path))
    mode = real.stat().st_mode
    if not stat.S_ISREG(mode):
        raise CorruptCacheError(f"{path}: is {_kind(mode)}, but a plain file was expected")
    if not leads_inside(path, folder or path.parent.parent, real):
        raise CorruptCacheError(
            f"{path}: a link leads out of its folder (to {real}), and only what lies in it is read; if you trust it, "
            "copy the folder with `cp -rL`, which copies what links point to"
        )
    return real


def leads_inside(path: Path, folder: Path, real: Path | None = None) -> bool:
    """Whether a name, its links followed, means something inside a folder, or among the files of the hub's snapshot that the
    folder is or lies in: `huggingface_hub` keeps those in `blobs/`, next to `snapshots/`, and links to them."""
    real = real or Path(os.path.realpath(path))
    inside = Path(os.path.realpath(folder))
    if real.is_relative_to(inside):
        return True
    snapshots = (above for above in inside.parents if above.name == _SNAPSHOTS)
    return any(real.parent == above.parent / _BLOBS for above in snapshots)


def open_regular(path: Path, folder: Path | None = None) -> BufferedReader:
    """Open the file that `regular_file` finds, for reading; raises as it does, never waits, and opens nothing else."""
    descriptor = os.open(regular_file(path, folder), _FLAGS)
    # Asked again of what is open: somebody may have replaced it with a pipe.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptCacheError(f"{path}: is not a plain file any more")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, folder: Path | None = None) -> bytes:
    """The bytes of the file that `regular_file` finds; raises as it does."""
    with open_regular(path, folder) as file:
        return file.read()


def write_new(path: Path, data: bytes) -> None:
    """Write a file under a private name; whatever has that name, such as a link, is removed first and not written through."""
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(data)


def is_own_folder(path: Path) -> bool:
    """Whether there is a folder of this name itself, and not a link to one."""
    return stat.S_ISDIR(_mode(path))


def is_own_file(path: Path) -> bool:
    """Whether there is a plain file of this name itself, and not a link to one."""
    return stat.S_ISREG(_mode(path))


def what_is_not_own(path: Path, *, folder: bool) -> str | None:
    """What is in the way of a folder or plain file of our own, in words; None for such a one, or nothing, there."""
    mode = _mode(path)
    return _kind(mode) if mode and stat.S_IFMT(mode) != (stat.S_IFDIR if folder else stat.S_IFREG) else None


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "a plain file" if stat.S_ISREG(mode) else "of an unknown kind")
