"""Records of every selection with their whole distributions, and what to hold an unbiased estimate to.

Shape letters: P positions, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from cache_making import make_cache
from numpy.typing import NDArray

from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions, SequenceRecord, TokenSequence, sequence_key
from kdcache.teacher.select.reference import select_reference
from kdcache.teacher.select.uniforms import position_states

VOCAB_SIZE = 41
SELECTIONS = {
    "top_k": SelectionInfo(kind="top_k", params={"k": 8}),
    "top_p_k": SelectionInfo(kind="top_p_k", params={"p": 0.8, "k": 12}),
    "sampled": SelectionInfo(kind="sampled", params={"num_draws": 30, "seed": 1}),
    "threshold": SelectionInfo(kind="threshold", params={"tau": 0.03, "seed": 1}),
    "top_k_sampled": SelectionInfo(kind="top_k_sampled", params={"k": 3, "num_draws": 20, "seed": 1}),
}


def text(num_tokens: int, seed: int = 0, *, source: str = "made", vocab_size: int = VOCAB_SIZE) -> TokenSequence:
    """Plain text of random ids, supervised everywhere but at its end."""
    ids_N = np.random.default_rng((seed, 7)).integers(0, vocab_size, num_tokens, np.int32)
    supervised_N = np.arange(num_tokens) < num_tokens - 1
    zeros_N = np.zeros(num_tokens, np.uint8)
    key = sequence_key(ids_N, supervised_N, "")
    return TokenSequence(ids_N, supervised_N, zeros_N, np.zeros(1, np.int32), source, key)


def random_logprobs(num_positions: int, seed: int = 0, *, vocab_size: int = VOCAB_SIZE) -> NDArray[np.float64]:
    """(P, V) log softmax of random logits."""
    logits_PV = np.random.default_rng((seed, 8)).normal(0.0, 2.0, (num_positions, vocab_size))
    return logits_PV - np.log(np.exp(logits_PV).sum(axis=-1, keepdims=True))


def captured(sequence: TokenSequence, logprobs_PV: NDArray[np.float64], selection: SelectionInfo) -> SequenceRecord:
    """What a capture stores of a teacher that says this."""
    states_P = position_states(selection.params.get("seed", 0), sequence.key, sequence.positions_P)
    return SequenceRecord(sequence, select_reference(logprobs_PV, sequence.target_ids_P, selection, states_P))


def dense(d: Distributions, vocab_size: int = VOCAB_SIZE) -> NDArray[np.float64]:
    """(P, V) the probabilities that the entries stand for, 0 elsewhere."""
    rows_E = np.repeat(np.arange(d.num_positions), d.num_entries_P)
    found_PV = np.zeros((d.num_positions, vocab_size))
    found_PV[rows_E, d.token_ids_E] = np.exp(d.logprobs_E.astype(np.float64))
    return found_PV


def largest_z(found_PV: NDArray[np.float64], p_V: NDArray[np.float64]) -> float:
    """How many standard errors the mean over positions is away from p, at the token where it is most.

    A token that is the same everywhere has to be p itself, to float32's rounding.
    """
    error_V = np.abs(found_PV.mean(axis=0) - p_V)
    spread_V = found_PV.std(axis=0) / np.sqrt(len(found_PV))
    return float((error_V / np.maximum(spread_V, 1e-7)).max())


Z_LIMIT = 4.5
"""Of 41 tokens one in 3500 runs is farther off by chance; the draws are fixed, so that none is."""


def selected_cache(path: Path, kind: str, *, seed: int = 0, codec_id: str = "raw", num_units: int = 2) -> Path:
    """A cache of a made-up teacher, by any selection; of every seed the same texts."""
    units = []
    for unit in range(num_units):
        sequences = [text(12 + i, 10 * unit + i, source=f"{'wiki' if i % 2 else 'news'}/{unit}#{i}") for i in range(4)]
        units.append(
            [captured(s, random_logprobs(s.num_tokens - 1, seed + 7 * s.num_tokens), SELECTIONS[kind]) for s in sequences]
        )
    return make_cache(path, codec_id, units=units, vocab_size=VOCAB_SIZE, selection=SELECTIONS[kind])
