"""Which files an input names, in an order that depends only on their names, and which it leaves out."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from kdcache.errors import InputError
from kdcache.inputs.formats.base import COMPRESSED
from kdcache.inputs.left_out import LeftOut


class FoundFiles(NamedTuple):
    """Files that are read, and what is not. Paths are as a user would write them, each file once, sorted by their text."""

    files: list[str]
    left_out: LeftOut


def find_files(paths: Iterable[str], input_format: str, endings: tuple[str, ...]) -> FoundFiles:
    """Find the files that paths, folders and glob patterns name.

    Links to files are followed, links to folders inside a folder are not.

    Args:
        paths: each a file, a folder (searched whole for the format's endings; hidden files and folders are left out), or a
            pattern with `*`, `?`, `[...]` or `**`.
        input_format: its name, for messages.
        endings: of the format. A file that is named itself, or matched by a pattern, may end as it likes.

    Raises:
        InputError: a path that does not exist, or one that leads to no file.
    """
    left_out = LeftOut()
    found: set[str] = set()
    for path in paths:
        if not path.strip():
            raise InputError("input.paths holds an empty text; write '.' for the working directory")
        here = LeftOut()
        try:
            matches = _matches(path, endings, here)
        except OSError as error:  # a name that is too long, a folder on the way that may not be read
            raise InputError(f"{path:.200}: cannot be searched: {error.strerror}") from error
        if not matches:
            raise InputError(_nothing(path, input_format, endings, here))
        found.update(matches)
        _take(here, left_out)
    files: dict[str, str] = {}
    for path in sorted(found):
        if path.encode(errors="replace").decode() != path:
            raise InputError(f"{path}: the file's name is not UTF-8, and would be stored in the cache; rename the file")
        if files.setdefault(_real(path), path) != path:
            left_out.add("other names of files that are read", [path])
    return FoundFiles(list(files.values()), left_out)


def _matches(path: str, endings: tuple[str, ...], left_out: LeftOut) -> list[str]:
    named = Path(path)
    if named.is_file():
        return [named.as_posix()]
    if named.is_dir():
        return list(_search(named.as_posix(), endings, left_out))
    return list(_match_pattern(path, left_out))


def _search(folder: str, endings: tuple[str, ...], left_out: LeftOut) -> Iterator[str]:
    """The files of a folder and its sub-folders."""

    def closed(error: OSError) -> None:
        left_out.add("folders that cannot be opened", [str(error.filename)])

    for at, folders, names in os.walk(folder, onerror=closed):
        # What is taken out of the list is not walked into.
        folders[:] = [name for name in sorted(folders) if _is_walked(Path(at, name), left_out)]
        for name in sorted(names):
            path = Path(at, name)
            if name.startswith("."):
                left_out.add("hidden files", [path.as_posix()])
            elif not path.is_file():
                left_out.add(_kind(path), [path.as_posix()])
            elif name.lower().endswith(endings):
                yield path.as_posix()
            else:
                left_out.add("files of other endings", [path.as_posix()])


def _is_walked(folder: Path, left_out: LeftOut) -> bool:
    if folder.name.startswith("."):
        left_out.add("hidden folders", [folder.as_posix()])
    elif folder.is_symlink():
        left_out.add("links to folders, which are read if named themselves", [folder.as_posix()])
    else:
        return True
    return False


def _match_pattern(pattern: str, left_out: LeftOut) -> Iterator[str]:
    matched = set(glob.glob(pattern, recursive=True))
    hidden = set(glob.glob(pattern, recursive=True, include_hidden=True)) - matched
    left_out.add("hidden files", sorted(Path(path).as_posix() for path in hidden if Path(path).is_file()))
    for match in sorted(matched):
        path = Path(match)
        if path.is_file():
            yield path.as_posix()
        elif not path.is_dir():
            left_out.add(_kind(path), [path.as_posix()])
        elif "**" not in pattern:  # which goes into them
            left_out.add("folders that a pattern matches, which are read if named themselves", [path.as_posix()])


def _kind(path: Path) -> str:
    return "links that lead nowhere" if path.is_symlink() and not path.exists() else "names that are not plain files"


def _take(here: LeftOut, all_of_them: LeftOut) -> None:
    for reason, count in here.counts.items():
        names = here.names[reason]
        all_of_them.add(reason, names)
        all_of_them.counts[reason] += count - len(names)


def _real(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.realpath(path) if os.path.islink(path) else os.path.join(_real_folder(folder), name)


@lru_cache(maxsize=1024)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _nothing(path: str, input_format: str, endings: tuple[str, ...], left_out: LeftOut) -> str:
    there = f"; not read, {left_out}" if left_out else ""
    if Path(path).is_dir():
        wanted = " or ".join(ending for ending in endings if not ending.endswith(COMPRESSED))
        return f"{path}: no file in this folder ends in {wanted}, as input.format {input_format!r} requires{there}"
    if os.path.islink(path):
        return f"{path}: this link leads nowhere (to {os.readlink(path)!r})"
    if os.path.exists(path):
        return f"{path}: not a plain file; an input is read more than once, so save it as a file first"
    if glob.has_magic(path):
        return f"{path}: no file matches this pattern (working directory {Path.cwd()}){there}"
    return f"{path}: no such file or folder (working directory {Path.cwd()})"
