"""A training run's state on disk: one directory per checkpoint, there whole or not at all, and only the last is kept.

`step-00000200/` holds `model.safetensors`, `optimizer.safetensors` (AdamW's tensors, the generators' states), `state.json`,
where terms of the loss learn something themselves (projectors) also `terms.safetensors`, and the digests of all, which are
compared before anything is loaded. It is written under a temporary name, synced and
renamed, so a name that matches is a complete checkpoint. No pickle.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from kdcache.errors import StateError
from kdcache.store.files.fs import sync_directory, sync_file
from kdcache.store.files.regular import is_own_folder, read_regular
from kdcache.train.runs.digests import find_damage, write_digests

_NAME = re.compile(r"step-(\d{8})")
_TEMP_PREFIX = "unfinished-"
_RNG_PREFIX = "rng."
_TERMS = "terms.safetensors"


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint holds besides tensors.

    Attributes:
        step: optimiser steps done.
        num_tokens: tokens read, padding not counted.
        metrics_bytes: length of `metrics.jsonl` at that time; what was written later is cut off on resume.
        heldout_nats_per_token: last measured, or None.
        loader: the loader's `state_dict()`.
        num_skipped: steps that were left out because a number was not finite.
    """

    step: int
    num_tokens: int
    metrics_bytes: int
    heldout_nats_per_token: float | None
    loader: dict[str, Any]
    num_skipped: int = 0


def save_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    terms: torch.nn.Module | None = None,
) -> None:
    """Write a checkpoint under `folder`, with what terms of the loss have learned, then delete the others there.

    Raises:
        StateError: the disk refuses; the checkpoint before stays.
    """
    try:
        _save(folder, model, optimizer, state, terms)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{folder}: the checkpoint of step {state.step} cannot be written: {error}") from error


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    names = [path.name for path in folder.iterdir() if _is_checkpoint(path)] if is_own_folder(folder) else []
    return folder / max(names) if names else None


def _is_checkpoint(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None and is_own_folder(path)


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, terms: torch.nn.Module | None = None
) -> RunState:
    """Put the tensors back where they were, in place, and torch's generators too.

    Raises:
        StateError: a file is missing or damaged (named), or belongs to a model of another shape.
    """
    try:
        damage = find_damage(path)
        if damage is not None:
            raise StateError(damage)
        state = msgspec.json.decode(read_regular(path / "state.json", path), type=RunState)
        load_model(model, path / "model.safetensors")
        if terms is not None and terms.state_dict():
            terms.load_state_dict(load_file(path / _TERMS))
        tensors = load_file(path / "optimizer.safetensors")
        _restore_generators(tensors)
        _restore_optimizer(optimizer, tensors)
    except Exception as error:  # safetensors has error types of its own, load_state_dict raises RuntimeError
        raise StateError(f"{path}: this checkpoint cannot be loaded ({error}); delete it to train from the start") from error
    return state


def _save(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    terms: torch.nn.Module | None,
) -> None:
    final = folder / f"step-{state.step:08d}"
    temp = folder / f"{_TEMP_PREFIX}{final.name}"
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    save_model(model, str(temp / "model.safetensors"))
    if terms is not None and (learned := terms.state_dict()):
        save_file({name: tensor.contiguous() for name, tensor in learned.items()}, temp / _TERMS)
    save_file(_optimizer_tensors(optimizer) | _generator_states(), temp / "optimizer.safetensors")
    (temp / "state.json").write_bytes(msgspec.json.encode(state))
    write_digests(temp)
    for path in temp.iterdir():
        sync_file(path)
    sync_directory(temp)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temp, final)
    sync_directory(folder)
    for path in folder.iterdir():
        if path != final and (_is_checkpoint(path) or (path.name.startswith(_TEMP_PREFIX) and is_own_folder(path))):
            shutil.rmtree(path)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<number of the parameter>.<name>` -> tensor, as in `3.exp_avg`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": tensor.contiguous() for index, tensors in state.items() for name, tensor in tensors.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_RNG_PREFIX):
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _generator_states() -> dict[str, Tensor]:
    states = {f"{_RNG_PREFIX}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{_RNG_PREFIX}cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_generators(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors[f"{_RNG_PREFIX}cpu"])
    if torch.cuda.is_available() and f"{_RNG_PREFIX}cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"{_RNG_PREFIX}cuda"])
