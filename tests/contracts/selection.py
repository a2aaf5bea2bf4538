"""What a random selection may differ in from its definition, `kdcache.teacher.select.reference`: rounding moves an edge.

Shape letters: P positions, V vocabulary, L points of the draws at a position.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions
from kdcache.format.selection import has_estimates
from kdcache.teacher.select.exact_weights import MIN_LOGPROB
from kdcache.teacher.select.reference import draw_reference
from kdcache.teacher.select.uniforms import uniforms_of


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


def check_draws(
    record: Distributions,
    logprobs_PV: NDArray[np.float64],
    selection: SelectionInfo,
    states_P: NDArray[np.uint64],
    edge: float,
) -> None:
    """Each draw is the token in whose stretch of the cumulative sum its point lies; edges may be off by `edge`."""
    if not has_estimates(selection):
        return
    for position, (logprobs_V, state) in enumerate(zip(logprobs_PV, states_P, strict=True)):
        start = int(record.offsets_P1[position])
        rest_V = np.where(logprobs_V - logprobs_V.max() > MIN_LOGPROB, np.exp(logprobs_V), 0.0)
        rest_V[record.token_ids_E[start : start + int(record.num_exact_P[position])]] = 0.0  # type: ignore[index]
        total = float(rest_V.sum())
        if 0 < total < 1e-30:
            continue  # of tokens about MIN_LOGPROB, of which float32 knows no more than that they are there
        found = draws_of(record, position, selection)
        if selection.kind == "threshold":
            tau, (u,) = selection.params["tau"], uniforms_of(state[None], 1)[0]
            assert abs(len(found) - total / tau) <= 1 + edge / tau
            points_L = (np.arange(len(found)) + u) * tau
            assert len(found) + u > (total - edge) / tau
        else:
            assert len(found) == (selection.params["num_draws"] if total > 0 else 0)
            points_L = np.sort(uniforms_of(state[None], len(found))[0]) * total
        low_L = draw_reference(rest_V, np.maximum(points_L - edge, 0.0))
        high_L = draw_reference(rest_V, np.minimum(points_L + edge, total * (1 - 1e-15)))
        assert (low_L <= found).all(), position
        assert (found <= high_L).all(), position
