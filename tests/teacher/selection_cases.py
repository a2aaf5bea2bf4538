"""Selections to try, and how they are made of logits here. Shape letters: P positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from contracts.selection import check_draws
from contracts.teacher import make_sequence
from numpy.typing import NDArray

from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions, TokenSequence
from kdcache.teacher.select.found import Found, Selected, record_of
from kdcache.teacher.select.reference import select_reference
from kdcache.teacher.select.torch_selector import Selector
from kdcache.teacher.select.uniforms import position_states

SEED = 5
EDGE = 2e-6
"""How far float32 may move the edge between two tokens of the cumulative sum."""

KINDS: dict[str, dict[str, Any]] = {
    "top_k": {"k": 5},
    "top_p_k": {"p": 0.8, "k": 20},
    "sampled": {"num_draws": 30, "seed": SEED},
    "threshold": {"tau": 0.03, "seed": SEED},
    "top_k_sampled": {"k": 4, "num_draws": 20, "seed": SEED},
}
BACKENDS: dict[str, Callable[[Selector], Callable[..., Any]]] = {
    "numba": lambda selector: selector._on_cpu,
    "torch": lambda selector: selector.on_device,
}


def of_kind(kind: str, **options: Any) -> SelectionInfo:
    params = {name: options.pop(name, value) for name, value in KINDS[kind].items()}
    return SelectionInfo(kind=kind, params=params, **options)


def draw_logits(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size + num_rows)
    return (torch.randn(num_rows, vocab_size, generator=generator) * scale).to(dtype)


def sequence_for(logits_PV: torch.Tensor) -> TokenSequence:
    """One token more than there are rows, so that every row has a target."""
    num_rows, vocab_size = logits_PV.shape
    return make_sequence(np.arange(num_rows + 1) * 31 % vocab_size, np.arange(num_rows + 1) < num_rows)


def states_of(sequence: TokenSequence, selection: SelectionInfo) -> NDArray[np.uint64]:
    return position_states(selection.params.get("seed", 0), sequence.key, sequence.positions_P)


def select(logits_PV: torch.Tensor, selection: SelectionInfo, backend: str | None = None) -> Distributions:
    """The record of all rows, as `Selector.select` makes it, or one of its ways."""
    sequence, selector = sequence_for(logits_PV), Selector(selection, logits_PV.shape[-1])
    way = selector.select if backend is None else BACKENDS[backend](selector)
    targets_P = torch.from_numpy(sequence.target_ids_P.astype(np.int64)).to(logits_PV.device)
    states_P = torch.from_numpy(states_of(sequence, selection).view(np.int64)).to(logits_PV.device)
    arrays = Selected(*(tensor.cpu().numpy() for tensor in way(logits_PV, targets_P, states_P)))
    return record_of(sequence, selection, Found.from_padded(arrays))


def define(logits_PV: torch.Tensor, selection: SelectionInfo) -> Distributions:
    """The same by definition."""
    sequence = sequence_for(logits_PV)
    logits = logits_PV.cpu().double().numpy()
    return select_reference(logits, sequence.target_ids_P, selection, states_of(sequence, selection))


def check_rows(record: Distributions, logits_PV: torch.Tensor, selection: SelectionInfo) -> None:
    """`check_draws` of what `select` gave."""
    logprobs_PV = logits_PV.cpu().double().log_softmax(dim=-1).numpy()
    check_draws(record, logprobs_PV, selection, states_of(sequence_for(logits_PV), selection), EDGE)
