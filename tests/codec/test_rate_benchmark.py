"""The measures of benchmarks/rate_distortion.py, against plain sums over the whole vocabulary."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytest.importorskip("torch")

import rate_measures
import rate_schemes

V, P = 60, 40


@pytest.fixture(scope="module")
def truth() -> rate_measures.Truth:
    rng = np.random.default_rng(0)
    logits_PV = rng.normal(0, 2, (P, V))
    logprobs_PV = logits_PV - np.log(np.exp(logits_PV).sum(-1, keepdims=True))
    return rate_measures.Truth(logprobs_PV.astype(np.float32), rng.integers(0, V, P))


def top(truth, k, rest):
    ids_PK = np.argsort(-truth.logprobs_PV, axis=-1)[:, :k].astype(np.int32)
    masses_PK = np.take_along_axis(truth.teacher_PV, ids_PK, -1).astype(np.float64)
    rest_P = 1 - masses_PK.sum(-1) if rest else np.zeros(P)
    return rate_measures.Reading(ids_PK.reshape(-1), masses_PK.reshape(-1), np.arange(P + 1) * k, rest_P)


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_error_and_angle_are_those_of_the_dense_target(truth, k, rest):
    reading = top(truth, k, rest)
    kept_PV = np.zeros((P, V), bool)
    kept_PV[reading.rows_E, reading.token_ids_E] = True
    q_PV = truth.student_PV.astype(np.float64)
    share_P = reading.rest_P / (q_PV * ~kept_PV).sum(-1)
    target_PV = np.where(kept_PV, truth.teacher_PV, share_P[:, None] * q_PV)
    assert truth.error(reading) == pytest.approx(((target_PV - truth.teacher_PV) ** 2).sum(-1).mean(), rel=1e-3, abs=1e-9)
    gradient = (target_PV.sum(-1, keepdims=True) * q_PV - target_PV).T @ truth.features_PH
    full = truth.full_gradient_VH
    cosine = (gradient * full).sum() / np.linalg.norm(gradient) / np.linalg.norm(full)
    assert truth.angle(reading) == pytest.approx(np.degrees(np.arccos(min(cosine, 1.0))), abs=0.1)


def test_kl_is_that_of_the_dense_reading_and_nothing_is_lost_where_all_is_kept(truth):
    reading = top(truth, 6, rest=True)
    dense_PV = np.repeat(reading.rest_P[:, None] / (V - 6), V, axis=1)
    dense_PV[reading.rows_E, reading.token_ids_E] = reading.masses_E
    expected = (truth.teacher_PV * (truth.logprobs_PV - np.log(dense_PV))).sum(-1).mean()
    assert truth.kl(reading) == pytest.approx(expected, rel=2e-3)
    assert truth.kl(top(truth, V, rest=True)) == pytest.approx(0, abs=2e-4)


def test_distillkits_curve_gives_back_what_is_a_curve():
    t = np.arange(49, dtype=np.float32)
    falling = np.concatenate([[-0.5], -1 - 0.01 * t - 0.5 * np.sqrt(t)]).astype(np.float32)[None]
    for normalize_t in (False, True):
        back = rate_schemes.distillkit(falling, 1, (0, 1, "sqrt"), normalize_t=normalize_t)
        np.testing.assert_allclose(back, falling, rtol=2**-8)
