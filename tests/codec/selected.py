"""Records of every kind of selection, made of random logits by the definition of the selections.

Shape letters: P positions, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import NO_TARGET, Distributions
from kdcache.teacher.select.reference import select_reference
from kdcache.teacher.select.uniforms import position_states

SELECTIONS = [
    SelectionInfo(kind="top_k", params={"k": 5}),
    SelectionInfo(kind="top_p_k", params={"p": 0.8, "k": 6}, entropy=True),
    SelectionInfo(kind="sampled", params={"num_draws": 12, "seed": 0}, temperatures=(2.0,)),
    SelectionInfo(kind="sampled", params={"num_draws": 300, "seed": 0}),
    SelectionInfo(kind="threshold", params={"tau": 0.05, "seed": 0}, temperatures=(2.0, 0.5), entropy=True),
    SelectionInfo(kind="threshold", params={"tau": 0.003, "seed": 0}),
    SelectionInfo(kind="top_k_sampled", params={"k": 3, "num_draws": 9, "seed": 0}),
]


def draw(selection: SelectionInfo, *, vocab_size: int, num_positions: int, seed: int) -> Distributions:
    """What the selection keeps of random distributions over the first 200 ids of the vocabulary; every third has no target."""
    rng = np.random.default_rng(seed)
    logits_PV = rng.normal(0.0, 3.0, (num_positions, min(vocab_size, 200)))
    targets_P = rng.integers(0, logits_PV.shape[1], num_positions).astype(np.int32)
    targets_P[::3] = NO_TARGET
    return select_reference(logits_PV, targets_P, selection, position_states(0, b"k" * 16, np.arange(num_positions)))
