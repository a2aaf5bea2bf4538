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
import rate_teachers
import selected

from kdcache.codec import CODECS, get_codec
from kdcache.store.records.column_view import column_view

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


@pytest.mark.parametrize("most_bytes", [2.9, 3.0, 35.9, 36.0, 1e9])
def test_the_most_draws_within_some_bytes_are_found(most_bytes):
    sizes = [3.0 * number**0.7 for number in range(1, 201)]
    expected = max((number for number, size in enumerate(sizes, 1) if size <= most_bytes), default=1)
    assert rate_schemes.most_draws(lambda number: sizes[number - 1], most_bytes, most=200) == expected


@pytest.mark.parametrize("codec_id", sorted(set(CODECS) & {"archive", "packed"}))
def test_what_is_timed_is_whole_batches_of_all_rows(codec_id, monkeypatch):
    monkeypatch.setattr(rate_schemes, "OUT_OF_CACHE", 1)
    records = [selected.draw(selected.SELECTIONS[0], vocab_size=97, num_positions=n, seed=n) for n in (5, 9, 2)]
    codec = get_codec(codec_id, {"vocab_size": 97}, selected.SELECTIONS[0])
    columns = {f.name: column_view(a) for f, a in zip(codec.fields(), codec.encode(records), strict=True)}
    decoded = []

    def count(self, tasks):
        decoded.append([len(task.offsets_P1) - 1 for task in tasks])
        decode(self, tasks)

    decode = type(codec).decode_many_into
    monkeypatch.setattr(type(codec), "decode_many_into", count)
    rate, copies = rate_schemes.timed_decode(
        codec, [{n: v[i] for n, v in columns.items()} for i in range(3)], records, rounds=2
    )
    assert decoded == [[5, 9, 2] * 5 + [5]] * 2
    assert rate > 0
    assert copies > 0


def test_scattered_ids_are_the_same_teacher_by_other_names():
    size = {"vocab_size": 500, "num_sequences": 1, "num_tokens": 12, "max_words": 20_000}
    ranked, scattered = (rate_teachers.stand_in(**size, scattered=scattered) for scattered in (False, True))
    of_rank, of_id = ranked.logprobs_TV(0), scattered.logprobs_TV(0)
    np.testing.assert_array_equal(np.sort(of_id, -1), np.sort(of_rank, -1))
    asked = np.arange(11)
    following = of_id[asked, scattered.ids_ST[0, 1:]], of_rank[asked, ranked.ids_ST[0, 1:]]
    np.testing.assert_array_equal(*following)
    assert np.abs(np.diff(np.argsort(-of_id[0])[:20])).mean() > 80  # neighbours in rank are none in id
