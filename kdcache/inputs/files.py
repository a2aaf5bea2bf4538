"""Which files an input names, in an order that depends on their names alone."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from kdcache.errors import InputError

ENDINGS = {
    "txt": (".txt",),
    "lines": (".txt",),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather", ".ipc"),
}
"""The endings that folders are searched for; a file that is named itself, or matched by a pattern, may end as it likes."""


def find_files(paths: Iterable[str], input_format: str) -> list[str]:
    """The files behind paths, folders and glob patterns.

    Args:
        paths: each a file, a folder (searched whole for the format's endings; hidden files and folders are left out), or a
            pattern with `*`, `?`, `[...]` or `**`.
        input_format: a key of ENDINGS.

    Returns:
        Paths as a user would write them, each once, sorted by their text.

    Raises:
        InputError: a path that does not exist, or one that leads to no file.
    """
    found: set[str] = set()
    for path in paths:
        matches = _matches(path, ENDINGS[input_format])
        if not matches:
            raise InputError(_nothing(path, input_format))
        found.update(matches)
    return sorted(found)


def _matches(path: str, endings: tuple[str, ...]) -> list[str]:
    named = Path(path)
    if named.is_file():
        return [named.as_posix()]
    if named.is_dir():
        return [file.as_posix() for file in named.rglob("*") if _is_wanted(file, named, endings)]
    return [Path(match).as_posix() for match in glob.glob(path, recursive=True) if Path(match).is_file()]


def _is_wanted(file: Path, folder: Path, endings: tuple[str, ...]) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.name.lower().endswith(endings) and file.is_file()


def _nothing(path: str, input_format: str) -> str:
    if Path(path).is_dir():
        endings = " or ".join(ENDINGS[input_format])
        return f"{path}: no file in this folder ends in {endings}, as input.format {input_format!r} asks"
    if glob.has_magic(path):
        return f"{path}: no file matches this pattern (working directory {Path.cwd()})"
    return f"{path}: no such file or folder (working directory {Path.cwd()})"
