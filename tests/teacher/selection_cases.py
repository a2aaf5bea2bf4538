"""Selections to try, how they are made of logits here, and what a random one may differ in from its definition.

Shape letters: P positions, V vocabulary, L points of the draws at a position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from contracts.teacher import make_sequence
from numpy.typing import NDArray

from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions, TokenSequence
from kdcache.format.selection import has_estimates
from kdcache.teacher._select_torch import Selector
from kdcache.teacher.found import Found, record_of
from kdcache.teacher.select_reference import MIN_LOGPROB, draw_reference, select_reference
from kdcache.teacher.uniforms import position_states, uniforms_of

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
    arrays = [tensor.cpu().numpy() for tensor in way(logits_PV, targets_P, states_P)]
    return record_of(sequence, selection, Found.from_padded(arrays))


def define(logits_PV: torch.Tensor, selection: SelectionInfo) -> Distributions:
    """The same by definition."""
    sequence = sequence_for(logits_PV)
    logits = logits_PV.cpu().double().numpy()
    return select_reference(logits, sequence.target_ids_P, selection, states_of(sequence, selection))


def draws_of(record: Distributions, position: int, selection: SelectionInfo) -> NDArray[np.int64]:
    """The token of each draw, ascending; of `threshold`, the kept ones."""
    num_exact = 0 if record.num_exact_P is None else int(record.num_exact_P[position])
    entries = slice(int(record.offsets_P1[position]) + num_exact, int(record.offsets_P1[position + 1]))
    counts = np.ones(entries.stop - entries.start)
    if selection.kind != "threshold":
        mass = float(record.tail_mass_P[position])
        counts = np.exp(record.logprobs_E[entries].astype(np.float64)) / mass * selection.params["num_draws"]
        np.testing.assert_allclose(counts, np.rint(counts), rtol=1e-3)
    return np.sort(np.repeat(record.token_ids_E[entries], np.rint(counts).astype(np.int64)))


def check_draws(record: Distributions, logits_PV: torch.Tensor, selection: SelectionInfo) -> None:
    """Each draw is the token in whose stretch its point lies, up to EDGE."""
    if not has_estimates(selection):
        return
    states_P = states_of(sequence_for(logits_PV), selection)
    logprobs_PV = logits_PV.cpu().double().log_softmax(dim=-1).numpy()
    for position, (logprobs_V, state) in enumerate(zip(logprobs_PV, states_P, strict=True)):
        start = int(record.offsets_P1[position])
        rest_V = np.where(logprobs_V > MIN_LOGPROB, np.exp(logprobs_V), 0.0)
        rest_V[record.token_ids_E[start : start + int(record.num_exact_P[position])]] = 0.0  # type: ignore[index]
        total = float(rest_V.sum())
        if 0 < total < 1e-30:
            continue  # of tokens about MIN_LOGPROB, of which float32 knows no more than that they are there
        found = draws_of(record, position, selection)
        if selection.kind == "threshold":
            tau, (u,) = selection.params["tau"], uniforms_of(state[None], 1)[0]
            assert abs(len(found) - total / tau) <= 1 + EDGE / tau
            points_L = (np.arange(len(found)) + u) * tau
            assert len(found) + u > (total - EDGE) / tau
        else:
            assert len(found) == (selection.params["num_draws"] if total > 0 else 0)
            points_L = np.sort(uniforms_of(state[None], len(found))[0]) * total
        low_L = draw_reference(rest_V, np.maximum(points_L - EDGE, 0.0))
        high_L = draw_reference(rest_V, np.minimum(points_L + EDGE, total * (1 - 1e-15)))
        assert (low_L <= found).all(), position
        assert (found <= high_L).all(), position
