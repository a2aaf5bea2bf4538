"""Stored beside live rows: the fast sums are the plain definition, and the numbers mean what they say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from foreign_cases import log_softmax
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.foreign.judge.compare import FLOOR, Supports, divergence, fit_line, match, supports_of

V = 30


def top(logprobs_V: np.ndarray, k: int) -> dict[int, float]:
    return {int(i): float(logprobs_V[i]) for i in np.argsort(-logprobs_V)[:k]}


def as_rows(supports: list[dict[int, float]]) -> Supports:
    counts = np.array([len(s) for s in supports])
    ids = np.array([i for s in supports for i in s], np.int64)
    return supports_of(counts, ids, np.array([v for s in supports for v in s.values()]))


def teacher(seed: int, rows: int = 5) -> np.ndarray:
    return log_softmax(np.random.default_rng(seed).normal(0, 2, (rows, V)))


def slow_divergence(live: dict[int, float], stored: dict[int, float]) -> float:
    """The least KL over the cells common ids, A (live's own), B (stored's own) and rest, by searching the unknown masses."""
    both = live.keys() & stored.keys()
    p, q = {i: math.exp(live[i]) for i in live}, {i: math.exp(stored[i]) for i in stored}
    a, b = sum(p[i] for i in live.keys() - both), sum(q[i] for i in stored.keys() - both)
    v, u = max(1 - sum(p.values()), 0.0), max(1 - sum(q.values()), 0.0)
    known = sum(p[i] * (live[i] - stored[i]) for i in both)
    most_x = min(len(live.keys() - both) * min(q.values(), default=1.0), u)
    most_y = min(len(stored.keys() - both) * min(p.values(), default=1.0), v)

    def rest(x: float, y: float) -> float:
        return sum(m * math.log(max(m, FLOOR) / max(n, FLOOR)) for m, n in ((a, x), (y, b), (v - y, u - x)) if m > 0)

    return known + least(lambda x: least(lambda y: rest(x, y), most_y), most_x)


def least(function: Callable[[float], float], high: float) -> float:
    """The least value of a convex function on [0, high]."""
    low = 0.0
    for _ in range(60):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, second) if function(first) < function(second) else (first, high)
    return function(low)


@given(st.integers(0, 10**6), st.integers(1, V), st.integers(0, V))
@settings(max_examples=15, deadline=None)
def test_the_divergence_is_its_plain_definition_and_a_lower_bound(seed: int, k_live: int, k_stored: int):
    p_RV, q_RV = teacher(seed), teacher(seed + 1)
    live, stored = [top(p, k_live) for p in p_RV], [top(q, k_stored) for q in q_RV]
    found = divergence(as_rows(live), as_rows(stored))
    expected = [slow_divergence(a, b) for a, b in zip(live, stored, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found <= (np.exp(p_RV) * (p_RV - q_RV)).sum(axis=1) + 1e-6).all()


@given(st.integers(0, 10**6), st.integers(1, V), st.integers(1, V))
@settings(max_examples=40, deadline=None)
def test_one_distribution_cut_at_two_places_has_no_divergence(seed: int, k_live: int, k_stored: int):
    p_RV = teacher(seed)
    found = divergence(as_rows([top(p, k_live) for p in p_RV]), as_rows([top(p, k_stored) for p in p_RV]))
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_the_whole_vocabulary_on_both_sides_is_kl_itself():
    p_RV, q_RV = teacher(1), teacher(2)
    found = divergence(as_rows([top(p, V) for p in p_RV]), as_rows([top(q, V) for q in q_RV]))
    np.testing.assert_allclose(found, (np.exp(p_RV) * (p_RV - q_RV)).sum(axis=1), rtol=1e-9)


def test_rows_of_other_places_share_little_and_diverge_a_lot():
    p_RV = log_softmax(np.random.default_rng(0).normal(0, 4, (6, V)))
    rows = [top(p, 6) for p in p_RV]
    assert divergence(as_rows(rows), as_rows(rows[1:] + rows[:1])).min() > 0.2


def test_matching_finds_the_same_id_of_the_same_row_alone():
    stored = as_rows([{1: -1.0, 2: -2.0}, {}, {3: -1.0}])
    live = as_rows([{2: -0.5, 3: -0.7}, {1: -1.0}, {3: -0.1, 1: -0.2}])
    in_stored, in_live = match(stored, live)
    assert (in_stored.tolist(), in_live.tolist()) == ([1, 2], [0, 3])
    nothing = match(as_rows([{}]), as_rows([{}]))
    assert [len(part) for part in nothing] == [0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_line_gives_the_temperature_and_the_offset(temperature: float):
    p_RV = teacher(3, rows=40)
    live = [top(p, V) for p in p_RV]
    stored = [{i: v / temperature + 0.3 for i, v in list(row.items())[:10]} for row in live]
    line = fit_line(as_rows(stored), as_rows(live))
    assert line.slope == pytest.approx(1 / temperature)
    assert line.residual < 1e-12
    assert line.num_entries == 400
    if temperature == 1:
        assert (line.offset_mean, line.offset_std) == (pytest.approx(0.3), pytest.approx(0, abs=1e-12))
    assert math.isnan(fit_line(as_rows([{}]), as_rows([{1: -1.0}])).slope)


def test_taken_rows_come_in_their_new_order():
    rows = as_rows([{1: -1.0}, {}, {3: -3.0}]).take(np.array([0, 2]))
    assert (rows.num_positions, rows.position_E.tolist(), rows.ids_E.tolist()) == (2, [0, 1], [1, 3])
