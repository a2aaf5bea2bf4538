"""What a model's name says and what lies in its folder, without loading it. Standard library only."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kdcache.errors import TeacherError

WEIGHT_SUFFIXES = (".safetensors", ".bin")
CONFIG_FILE = "config.json"


def check_model_name(model: str) -> None:
    """Refuse a path that leads nowhere, in better words than a hub client's: it would ask the hub for it.

    Raises:
        TeacherError: `model` is written as a path, or has more parts than a hub id, and is not a folder; or it is a folder
            without a config.json.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise TeacherError(f"{model}: no {CONFIG_FILE} in this folder; expected a model in the Hugging Face layout")
    elif path.is_file():
        raise TeacherError(f"{model} is a file; expected a hub id or a folder in the Hugging Face layout")
    elif model.startswith(("/", ".", "~")) or model.count("/") > 1 or "\\" in model:
        raise TeacherError(f"{model}: no such folder; expected a hub id or a folder in the Hugging Face layout")


def short_name(model: str) -> str:
    """The folder's name of a local model, the hub id of another."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def weights_digest(model: str) -> str | None:
    """SHA-256 over the names and SHA-256 of a local folder's weight files and config.json; None for a hub id.

    Reads every byte of the weights: seconds per ten gigabytes.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    files = [path for path in folder.iterdir() if path.name == CONFIG_FILE or path.suffix in WEIGHT_SUFFIXES]
    hasher = hashlib.sha256(b"kdcache.weights.v1\0")
    for path in sorted(files, key=lambda path: path.name):
        with path.open("rb") as file:
            hasher.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return hasher.hexdigest()
