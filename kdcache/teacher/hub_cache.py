"""What the hub client's cache on this machine holds of a model: which commit, and its files. Standard library only.

The layout is huggingface_hub's: `models--org--name/refs/<revision>` holds a commit, `snapshots/<commit>/` its files.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Where the hub client keeps its downloads, as its environment variables say."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def cached_commit(model: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a hub id stands for in the cache; None where the cache does not have it.

    Args:
        model: hub id.
        revision: branch, tag or commit; None for the default branch.
    """
    folder = cache_root() / f"models--{model.replace('/', '--')}"
    name = revision or "main"
    try:
        return (folder / "refs" / name).read_text().strip() or None
    except (OSError, ValueError):
        return name if os.path.isdir(folder / "snapshots" / name) else None  # a name too long for a file is none


def snapshot_folder(model: str, revision: str | None = None) -> Path | None:
    """The folder with a hub id's files at a revision; None where the cache does not have it."""
    commit = cached_commit(model, revision)
    folder = cache_root() / f"models--{model.replace('/', '--')}" / "snapshots" / (commit or "")
    return folder if commit is not None and folder.is_dir() else None
