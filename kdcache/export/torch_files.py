"""Files of tensors that trainers of drafters read: safetensors for speculators, torch's own for SpecForge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from kdcache.bars import bar_options
from kdcache.errors import ConfigError
from kdcache.export.folder import open_folder, write_whole
from kdcache.export.states import DrafterFeatures, DrafterStates, choose_features, drafter_states
from kdcache.loader.cache import Cache

Algorithm = Literal["eagle3", "dflash", "dspark"]

LAST: dict[Algorithm, str | None] = {"eagle3": "after_norm", "dflash": None, "dspark": "after_norm"}
"""algorithm of SpecForge -> which last state its trainer reads."""

_SEQUENCES_AT_ONCE = 1000


def export_speculators(
    cache: Cache, uri: str, out: Path, *, features: Sequence[str] = (), with_states: bool = True, show_progress: bool = False
) -> DrafterFeatures:
    """Write a cache as a data path of speculators: the data set of tokens, and one file of states for each sequence.

    Args:
        cache: with hidden states of inner layers and the last state before the norm, at all tokens.
        uri: where it lies.
        out: the folder; what is whole there already is not written again.
        features: names of the auxiliary features; empty for all, by layer.
        with_states: false writes the tokens alone: `speculators_training` reads the states from the cache's shards.
        show_progress: a bar on stderr.

    Raises:
        ConfigError: see `choose_features`, `open_folder`.
        CorruptCacheError: the cache is damaged.
    """
    chosen = choose_features(cache, features, last="before_norm")
    open_folder(out, cache, uri, format="speculators", features=chosen.names)
    if with_states:
        (out / "hidden_states").mkdir(exist_ok=True)
        for index in tqdm(range(len(cache)), **_bar(show_progress)):
            path = out / "hidden_states" / f"hs_{index}.safetensors"
            if not path.exists():
                tensors = speculators_tensors(drafter_states(cache, index, chosen.all))
                write_whole(path, lambda to, tensors=tensors: save_file(tensors, to))
    _save_tokens(cache, out)
    return chosen


def speculators_tensors(states: DrafterStates) -> dict[str, torch.Tensor]:
    """What a file of speculators holds: `hidden_states` (N, layers, H) bfloat16, the last state last, and `token_ids` (N,)."""
    stacked = torch.stack([torch.from_numpy(values).bfloat16() for values in states.hidden], dim=1)
    return {"hidden_states": stacked, "token_ids": torch.from_numpy(states.input_ids_N.astype(np.int64))}


def _save_tokens(cache: Cache, out: Path) -> None:
    """The data set that speculators loads: of each sequence its ids, its mask and its length."""
    batches = [
        _token_table(cache, range(at, min(at + _SEQUENCES_AT_ONCE, len(cache))))
        for at in range(0, len(cache), _SEQUENCES_AT_ONCE)
    ]
    tokens = datasets.Dataset(pa.concat_tables(batches))
    tokens.set_format("torch")
    tokens.save_to_disk(str(out))


def _token_table(cache: Cache, indices: range) -> pa.Table:
    states = [drafter_states(cache, index, ()) for index in indices]
    lengths = np.array([len(found.input_ids_N) for found in states], np.int64)
    offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int32())
    ids = pa.array(np.concatenate([found.input_ids_N for found in states]))
    mask = pa.array(np.concatenate([found.loss_mask_N for found in states]).astype(np.int8))
    columns = [pa.ListArray.from_arrays(offsets, ids), pa.ListArray.from_arrays(offsets, mask), pa.array(lengths)]
    return pa.table(columns, ["input_ids", "loss_mask", "seq_len"])


def export_specforge(
    cache: Cache, uri: str, out: Path, *, algorithm: Algorithm, features: Sequence[str] = (), show_progress: bool = False
) -> DrafterFeatures:
    """Write a cache as offline features of SpecForge: a `.ckpt` for each sequence.

    Args:
        cache: with hidden states of inner layers at all tokens, and for eagle3 and dspark the last state after the norm.
        uri, out, features, show_progress: as `export_speculators`.
        algorithm: whose trainer reads the files.

    Raises:
        ConfigError: see `choose_features`, `open_folder`; an unknown algorithm.
        CorruptCacheError: the cache is damaged.
    """
    if algorithm not in LAST:
        raise ConfigError(f"algorithm is {algorithm!r}, but must be one of {', '.join(map(repr, LAST))}")
    chosen = choose_features(cache, features, last=LAST[algorithm])
    open_folder(out, cache, uri, format=f"specforge-{algorithm}", features=chosen.names)
    digits = len(str(max(len(cache) - 1, 0)))
    for index in tqdm(range(len(cache)), **_bar(show_progress)):
        path = out / f"{index:0{digits}d}.ckpt"  # read in the order of their names
        if not path.exists():
            tensors = specforge_tensors(drafter_states(cache, index, chosen.all), algorithm)
            write_whole(path, lambda to, tensors=tensors: torch.save(tensors, to))
    return chosen


def specforge_tensors(states: DrafterStates, algorithm: Algorithm) -> dict[str, torch.Tensor]:
    """What a file of SpecForge holds: (N,) ids and mask, (1, N, layers x H) inner states, (1, N, H) last states."""
    hidden = [torch.from_numpy(values).bfloat16() for values in states.hidden]
    auxiliary = hidden if LAST[algorithm] is None else hidden[:-1]
    tensors: dict[str, torch.Tensor] = {
        "input_ids": torch.from_numpy(states.input_ids_N.astype(np.int64)),
        "loss_mask": torch.from_numpy(states.loss_mask_N.astype(np.int64)),
    }
    joined = torch.cat(auxiliary, dim=1)[None]
    if algorithm == "eagle3":
        return tensors | {"hidden_state": hidden[-1][None], "aux_hidden_state": joined}
    last: Mapping[str, torch.Tensor] = {"target_last_hidden_states": hidden[-1][None]} if algorithm == "dspark" else {}
    return tensors | {"hidden_states": joined, **last}


def _bar(show_progress: bool) -> dict[str, Any]:
    return bar_options(delay=2, unit="sequence", disable=not show_progress)
