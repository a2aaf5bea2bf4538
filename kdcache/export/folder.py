"""A folder that is being exported to: what it is of, and files that are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache import __version__
from kdcache.errors import ConfigError
from kdcache.loader.cache import Cache

NAME = "kdcache-export.json"


def open_folder(root: Path, cache: Cache, uri: str, **chosen: Any) -> dict[str, Any]:
    """Make the folder, or resume: what it is an export of is written first, and must be the same afterwards.

    Args:
        root: the folder.
        cache: what is exported.
        uri: where the cache lies; readers in place open it again.
        chosen: format and features, as JSON values.

    Raises:
        ConfigError: the folder holds an export of something else, or other files.
    """
    absolute = uri if "://" in uri else str(Path(uri).resolve())
    wanted = {"cache": absolute, "snapshot": cache.snapshot, "kdcache": __version__, **chosen}
    path = root / NAME
    if path.exists():
        found = read_made(path)
        differing = [name for name in wanted if name not in ("cache", "kdcache") and found.get(name) != wanted[name]]
        if differing:
            shown = ", ".join(f"{name} {found.get(name)!r} and not {wanted[name]!r}" for name in differing)
            raise ConfigError(f"{root}: holds another export ({shown}); choose another folder, or remove it")
        return wanted
    if root.exists() and any(not _is_partial(file) for file in root.iterdir()):
        raise ConfigError(f"{root}: is not empty and no export of kdcache; choose another folder")
    root.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda to: to.write_text(json.dumps(wanted, indent=2) + "\n"))
    return wanted


def read_made(path: Path) -> dict[str, Any]:
    """What a folder says that it is an export of; raises ConfigError where the file is damaged."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: is damaged ({error}); remove the folder and export again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: is damaged; remove the folder and export again")
    return found


def _is_partial(file: Path) -> bool:
    """What a killed export leaves."""
    return file.name.startswith(f".{NAME}.") and file.name.endswith(".partial")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it, so that a file of this name is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
