"""What a model's name, its folder and the hub client's cache say of it, without loading it. Standard library only.

The cache's layout is huggingface_hub's: `models--org--name/refs/<revision>` holds a commit, `snapshots/<commit>/` its files.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from kdcache.errors import TeacherError
from kdcache.shown import shown

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
TRAINING_FILES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
"""How the names of the files begin that a trainer leaves next to the weights, with the same endings."""

MEANING_FILES = frozenset(
    {"config.json", "params.json", "adapter_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"}
)
"""Files that say what the weights mean: shapes, rope, quantisation, an adapter's scale."""

CONFIG_FILE = "config.json"
_IMPLEMENTATION = "_implementation"
"""How the names of fields end that choose code: attn_implementation, experts_implementation."""
_MOST = {
    "max_position_embeddings": 2**31 - 1, "num_hidden_layers": 10_000, "hidden_size": 2**20, "intermediate_size": 2**24,
    "vocab_size": 2**31, "num_attention_heads": 2**16, "num_local_experts": 2**16,
}  # fmt: skip
"""Sizes far beyond any real model's."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
ADAPTER_FILE = "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json",
)  # fmt: skip
"""Any of these makes a folder one that a tokenizer can be loaded from, with or without a model."""


def check_model_name(model: str, *, is_tokenizer: bool = False) -> None:
    """Refuse a path that leads nowhere, which a hub client would look up on the hub, and a folder that is not a model's.

    Args:
        model: hub id or folder.
        is_tokenizer: whether a tokenizer alone is enough.

    Raises:
        TeacherError: `model` is written as a path, or has more parts than a hub id, and is not a folder; or it is a folder
            without a config.json (where a tokenizer is enough, without any of its files); or its config.json asks for a kernel
            from a hub, or has sizes that no model has.
    """
    path = Path(model)
    if path.is_dir():
        needed, what = ((*TOKENIZER_FILES, CONFIG_FILE), "tokenizer") if is_tokenizer else ((CONFIG_FILE,), "model")
        if not any((path / name).is_file() for name in needed):
            raise TeacherError(f"{model}: no {needed[0]} in this folder; expected a {what} in the Hugging Face layout")
        odd = next((file for file in path.iterdir() if file.exists() and not file.is_file() and not file.is_dir()), None)
        if odd is not None:  # opening a named pipe would wait forever
            raise TeacherError(f"{odd}: is a pipe, a socket or a device; a model's folder holds plain files")
        fields = config_fields(model)
        _refuse_kernels_of_a_hub(model, fields)
        _refuse_impossible_sizes(model, fields)
    elif path.is_file():
        raise TeacherError(f"{model} is a file; expected a hub id or a folder in the Hugging Face layout")
    elif model.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(model):
        raise TeacherError(f"{model}: no such folder{_near(path)}; expected a hub id or a folder in the Hugging Face layout")


def why_not_loaded(model: str, reason: str) -> str:
    """The reason, for the end of a message; for what could be a folder and a hub id and is neither, that too."""
    path = Path(model)
    if path.exists() or snapshot_folder(model) is not None:
        return reason
    return f"such a folder does not exist{_near(path)}, and as a hub id it was not found ({reason})"


def _near(path: Path) -> str:
    """The folder that was probably meant, in brackets; "" where none has a similar name."""
    try:
        there = [child.name for child in path.parent.iterdir() if child.is_dir()]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, there, n=1)
    return f" (there is {path.parent / close[0]})" if close else ""


def _refuse_kernels_of_a_hub(model: str, fields: dict[str, Any]) -> None:
    """Refuse a config.json that names a repository whose code transformers would download and run without asking."""
    for name, value in fields.items():
        chosen = list(value.values()) if isinstance(value, dict) else [value]
        if name.endswith(_IMPLEMENTATION) and (kernel := next((v for v in chosen if isinstance(v, str) and "/" in v), None)):
            raise TeacherError(
                f"{model}: {CONFIG_FILE} asks for the code of another repository, {name} {ascii(kernel)[:100]}; remove the "
                "line, and name that kernel in your own config's engine_options if you trust it"
            )
        if isinstance(value, dict):
            _refuse_kernels_of_a_hub(model, value)


def _refuse_impossible_sizes(model: str, fields: dict[str, Any]) -> None:
    """Refuse sizes that no model has, before they are allocated, or built for hours."""
    for name, value in fields.items():
        if type(value) is int and value > _MOST.get(name, value):
            raise TeacherError(f"{model}: {CONFIG_FILE} says {name} {shown(value, 40)}; expected at most {_MOST[name]:,}")
        if isinstance(value, dict):
            _refuse_impossible_sizes(model, value)


def short_name(model: str) -> str:
    """The folder's name of a local model, else the hub id."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def config_fields(model: str, revision: str | None = None) -> dict[str, Any]:
    """The config.json of a local folder, or of a downloaded hub id; empty if it cannot be read."""
    folder = Path(model) if Path(model).is_dir() else snapshot_folder(model, revision)
    try:
        fields = json.loads((folder / CONFIG_FILE).read_text("utf-8")) if folder is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def resolved_revision(model: str, revision: str | None, loaded: str | None = None) -> str | None:
    """The commit that a hub id stands for; None for a local folder.

    Args:
        model: hub id or folder.
        revision: what the user asked for: branch, tag, commit, or None for the default branch.
        loaded: the commit that the library which loaded the model names, if it does.

    Returns:
        The commit if it is known, else what was asked for.
    """
    if Path(model).is_dir():
        return None
    return loaded or cached_commit(model, revision) or revision


def weights_digest(model: str, adapter: str | None = None) -> str | None:
    """SHA-256 over the files of a local folder that decide what the model computes, by name and digest; None for a hub id.

    These are weights of all formats, shards and adapters, the files that say what they mean, and the model's own code; for an
    adapter also the model that it is based on. Reads every byte of the weights: seconds per ten gigabytes.

    Args:
        model: folder or hub id.
        adapter: folder of an adapter that is put on the model; its files count too, also with a hub id.
    """
    if adapter is not None:
        return hashlib.sha256(f"kdcache.adapted.v1\0{weights_digest(model)}\0{folder_digest(adapter)}".encode()).hexdigest()
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest, base = folder_digest(folder), _adapted_model(folder)
    if base is None:
        return digest
    of_base = folder_digest(base) if os.path.isdir(base) else cached_commit(base)
    return hashlib.sha256(f"kdcache.adapter.v1\0{digest}\0{of_base}".encode()).hexdigest()


def folder_digest(folder: str | Path) -> str:
    """SHA-256 over the files of a folder that decide what a model or an adapter computes, by name and digest."""
    hasher = hashlib.sha256(b"kdcache.weights.v2\0")
    for path in sorted(filter(_is_part_of_model, Path(folder).iterdir()), key=lambda path: path.name):
        with path.open("rb") as file:
            hasher.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return hasher.hexdigest()


def _is_part_of_model(path: Path) -> bool:
    if not path.is_file() or path.name.startswith(TRAINING_FILES):
        return False
    return path.name in MEANING_FILES or path.suffix in (*WEIGHT_SUFFIXES, ".py")


def _adapted_model(folder: Path) -> str | None:
    """The hub id or folder of the model that an adapter in the folder belongs to; None without an adapter."""
    try:
        named = json.loads((folder / ADAPTER_FILE).read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return named if isinstance(named, str) and named else None


def cache_root() -> Path:
    """Where the hub client keeps its downloads, as its environment variables say."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def cached_commit(model: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a hub id stands for in the hub client's cache; None if it is not there.

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
    """The folder with a hub id's files at a revision; None if the hub client's cache does not have it."""
    commit = cached_commit(model, revision)
    folder = cache_root() / f"models--{model.replace('/', '--')}" / "snapshots" / (commit or "")
    return folder if commit is not None and folder.is_dir() else None
