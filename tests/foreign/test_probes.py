"""The totals are those of plain loops over rows, whatever the size of a block; the verdicts need enough rows and a margin."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.foreign.base import ForeignSequence, ReadConfig
from kdcache.foreign.blocks import SHIFTS, blocks
from kdcache.foreign.formats.detect import open_foreign
from kdcache.foreign.judge.alignment import MIN_POSITIONS, judge
from kdcache.foreign.probes import FLOOR_NATS, ROUNDING, ProbeCounts


def sequence(seed: int, num_positions: int = 12, width: int = 6) -> ForeignSequence:
    """Ragged rows with empty ones, duplicates, unsorted values and odd numbers."""
    rng = np.random.default_rng(seed)
    counts_P = rng.integers(0, width, num_positions)
    values_E = np.round(rng.normal(-2, 1.5, counts_P.sum()), 2)
    values_E[rng.random(len(values_E)) < 0.03] = -np.inf
    return ForeignSequence(
        source="made",
        input_ids_N=rng.integers(0, 9, num_positions + 1),
        positions_P=np.arange(num_positions),
        counts_P=counts_P,
        token_ids_E=rng.integers(0, 9, counts_P.sum()),
        values_E=values_E,
    )


def slow(made: ForeignSequence) -> dict[str, Any]:
    """The totals, a row at a time."""
    found: dict[str, Any] = {"masses": [], "unsorted": 0, "duplicates": 0, "sizes": Counter(), "scores": []}
    assert made.input_ids_N is not None
    for r, (start, end) in enumerate(zip(made.offsets_P1[:-1], made.offsets_P1[1:], strict=True)):
        ids, values = made.token_ids_E[start:end].tolist(), made.values_E[start:end].tolist()
        if not ids:
            continue
        found["sizes"][len(ids)] += 1
        found["unsorted"] += any(b > a for a, b in pairwise(values))
        given = [i for i, value in zip(ids, values, strict=True) if value > -math.inf]
        found["duplicates"] += len(set(given)) < len(given)
        if max(values) > -math.inf:
            found["masses"].append(sum(map(math.exp, values)))
        targets = [made.input_ids_N[r + 1 + s] if 0 <= r + 1 + s < len(made.input_ids_N) else None for s in SHIFTS]
        if None not in targets and values[0] > -math.inf:
            found["scores"].append([score(ids, values, t) for t in targets])
    return found


def score(ids: list[int], values: list[float], target: object) -> float:
    log_z = math.log(sum(map(math.exp, values)))
    inside = [value for i, value in zip(ids, values, strict=True) if i == target][:1]
    if inside and inside[0] > -math.inf:
        return inside[0] - log_z
    return min(value for value in values if value > -math.inf) - log_z - FLOOR_NATS


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_totals_are_those_of_plain_loops(seed: int):
    made = sequence(seed)
    counts, expected = ProbeCounts(), slow(made)
    counts.add_sequence(made, "logprobs")
    masses = np.array(expected["masses"])
    assert counts.sizes == expected["sizes"]
    assert (counts.num_unsorted_positions, counts.num_duplicate_positions) == (expected["unsorted"], expected["duplicates"])
    assert counts.mass_sum == pytest.approx(masses.sum())
    assert counts.num_heavy_positions == (masses > 1 + ROUNDING).sum()
    scores = np.array(expected["scores"]).reshape(-1, len(SHIFTS))
    assert counts.num_paired == len(scores)
    np.testing.assert_allclose(counts.score_sum, scores.sum(axis=0), atol=1e-9)
    np.testing.assert_allclose(counts.score_diff_sum, (scores - scores[:, 1:2]).sum(axis=0), atol=1e-9)


@pytest.mark.parametrize("cells", [1, 7, 20, 10**6])
def test_rows_are_the_same_in_blocks_of_any_size(cells: int):
    made = sequence(5, num_positions=40)
    parts = list(blocks(made, "logprobs", cells))
    assert len(parts) == 1 or cells < 10**6
    assert all(part.ids_PK.size <= cells or len(part.ids_PK) == 1 for part in parts)
    flat = [(i, v) for part in parts for i, v in zip(part.ids_PK[part.filled_PK], part.values_PK[part.filled_PK], strict=True)]
    assert flat == list(zip(made.token_ids_E, made.values_E, strict=True))
    assert sum((part.targets_3P.shape[1] for part in parts), 0) == (made.counts_P > 0).sum()


def test_few_rows_give_no_verdict_and_no_rows_give_none_either():
    path = Path(__file__).parent / "data" / "distillkit" / "exact"
    counts = ProbeCounts()
    assert judge(counts).verdict == "unclear"
    (first, *rest) = open_foreign(path, ReadConfig()).read()
    counts.add_sequence(first, "logprobs")
    assert counts.num_paired < MIN_POSITIONS
    assert judge(counts).verdict == "unclear"
    for made in rest:
        counts.add_sequence(made, "logprobs")
    assert judge(counts).verdict == "aligned"


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_know_nothing_of_the_text_give_no_verdict(seed: int):
    counts = ProbeCounts()
    for number in range(20):
        counts.add_sequence(sequence(100 * seed + number, num_positions=60), "logprobs")
    assert counts.num_paired > 500
    assert judge(counts).verdict == "unclear"
