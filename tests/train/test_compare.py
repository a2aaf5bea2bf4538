import json

import numpy as np
import pytest

from kdcache.errors import ConfigError
from kdcache.train.evaluation.compare import compare_models
from kdcache.train.evaluation.heldout import HeldoutSequence
from kdcache.train.evaluation.scores import Scores

NUM_SEQUENCES = 200
SEQUENCES = [HeldoutSequence(np.zeros(11, np.int64), num_bytes=30, text=i // 2) for i in range(NUM_SEQUENCES)]


def _scores(loss: float, kl: float, agreement: float, *, seed: int = 0, spread: float = 1.0) -> Scores:
    """Ten targets per sequence; per-token means as given, with noise between sequences."""
    noise = np.random.Generator(np.random.Philox(key=seed)).normal(0, spread, NUM_SEQUENCES)
    noise -= noise.mean()
    return Scores(
        10 * (loss + noise), 10 * (kl + 0.1 * noise), np.full(NUM_SEQUENCES, 10 * agreement), np.full(NUM_SEQUENCES, 3.0)
    )


TEACHER = _scores(2.0, 0.0, 1.0)


def test_means_are_per_token_and_per_byte() -> None:
    results = compare_models({"teacher": TEACHER, "a": _scores(3.0, 0.5, 0.6)}, SEQUENCES, baseline="a")
    assert (results["num_tokens"], results["num_bytes"]) == (2000, 6000)
    a = {name: entry["value"] for name, entry in results["models"]["a"].items()}
    assert a == pytest.approx({"nats_per_token": 3.0, "nats_per_byte": 1.0, "kl": 0.5, "top1_agreement": 0.6, "accuracy": 0.3})


def test_what_all_models_share_cancels_in_a_difference() -> None:
    """Noise common to both students (hard and easy texts) widens each one's error and leaves the difference sharp."""
    scores = {"teacher": TEACHER, "labels": _scores(3.0, 0.5, 0.6), "kd": _scores(2.99, 0.4, 0.7)}
    results = compare_models(scores, SEQUENCES, baseline="labels")
    assert results["models"]["kd"]["nats_per_token"]["standard_error"] > 0.05
    difference = results["comparisons"]["kd"]["nats_per_token"]
    assert difference["value"] == pytest.approx(-0.01)
    assert difference["low"] == pytest.approx(-0.01)
    assert difference["high"] == pytest.approx(-0.01)


def test_independent_noise_gives_an_interval_around_zero_of_the_right_width() -> None:
    scores = {"teacher": TEACHER, "labels": _scores(3.0, 0.5, 0.6, seed=1), "kd": _scores(3.0, 0.5, 0.6, seed=2)}
    difference = compare_models(scores, SEQUENCES, baseline="labels")["comparisons"]["kd"]["nats_per_token"]
    assert difference["low"] < 0 < difference["high"]
    # Two independent means over 200 sequences of spread 1: 2 * 1.96 * sqrt(2 / 200).
    assert difference["high"] - difference["low"] == pytest.approx(0.392, rel=0.2)


def test_the_gap_closed_is_zero_at_the_baseline_and_one_at_the_teacher() -> None:
    scores = {"teacher": TEACHER, "labels": _scores(3.0, 0.8, 0.5), "half": _scores(2.5, 0.2, 0.6), "full": TEACHER}
    gap = compare_models(scores, SEQUENCES, baseline="labels")["gap_closed"]
    assert "labels" not in gap
    assert {m: e["value"] for m, e in gap["half"].items()} == pytest.approx(
        {"nats_per_token": 0.5, "kl": 0.75, "top1_agreement": 0.2}
    )
    assert [entry["value"] for entry in gap["full"].values()] == pytest.approx([1.0, 1.0, 1.0])


def test_retention_is_of_accuracy_and_of_nats_over_the_unigram() -> None:
    half = Scores(TEACHER.nll_S + 10 * 1.5, TEACHER.kl_S, TEACHER.agreement_S, np.full(NUM_SEQUENCES, 2.4))
    scores = {"teacher": TEACHER, "half": half, "same": TEACHER}
    results = compare_models(scores, SEQUENCES, baseline="half", unigram_nll_S=np.full(NUM_SEQUENCES, 50.0))
    assert results["unigram"] == {"nats_per_token": pytest.approx(5.0)}
    # The teacher's loss is 2.0, this student's 3.5, the unigram's 5.0; 3 tokens in 10 right against 2.4.
    assert results["retention"]["half"]["nats_over_unigram"]["value"] == pytest.approx(0.5)
    assert results["retention"]["half"]["accuracy"]["value"] == pytest.approx(0.8)
    assert results["retention"]["same"] == {
        metric: {"value": 1.0, "low": 1.0, "high": 1.0} for metric in ("accuracy", "nats_over_unigram")
    }


def test_the_interval_of_what_is_kept_is_paired_with_the_teachers_texts() -> None:
    """A text that is hard for both moves both: a student always 0.3 nats behind has a narrow interval."""
    behind = Scores(TEACHER.nll_S + 3.0, TEACHER.kl_S, TEACHER.agreement_S, TEACHER.correct_S)
    results = compare_models({"teacher": TEACHER, "a": behind}, SEQUENCES, baseline="a", unigram_nll_S=TEACHER.nll_S + 50.0)
    kept = results["retention"]["a"]["nats_over_unigram"]
    assert [kept[name] for name in ("value", "low", "high")] == pytest.approx([0.94] * 3)
    assert results["models"]["a"]["nats_per_token"]["standard_error"] > 0.05


def test_without_a_unigram_the_nats_kept_are_null_and_the_accuracy_stays() -> None:
    results = compare_models({"teacher": TEACHER, "a": TEACHER}, SEQUENCES, baseline="a")
    assert results["unigram"] is None
    assert results["retention"]["a"]["nats_over_unigram"] is None
    assert results["retention"]["a"]["accuracy"]["value"] == 1.0
    same = compare_models({"teacher": TEACHER, "a": TEACHER}, SEQUENCES, baseline="a", unigram_nll_S=TEACHER.nll_S)
    assert same["retention"]["a"]["nats_over_unigram"]["value"] is None, "a teacher of no use: nothing can be kept of nothing"


def test_texts_are_resampled_whole_and_windows_where_texts_are_few() -> None:
    scores = {"teacher": TEACHER, "a": _scores(3.0, 0.5, 0.6)}
    bootstrap = compare_models(scores, SEQUENCES, baseline="a")["bootstrap"]
    assert (bootstrap["resampled"], bootstrap["num_resampled"]) == ("texts", 100)
    one_text = [HeldoutSequence(s.input_ids_N, s.num_bytes, 0) for s in SEQUENCES]
    bootstrap = compare_models(scores, one_text, baseline="a")["bootstrap"]
    assert (bootstrap["resampled"], bootstrap["num_resampled"]) == ("windows", 200)


def test_a_single_sequence_and_a_gap_of_zero_have_no_interval_and_stay_json() -> None:
    one = {
        name: Scores(*(np.array([v]) for v in values))
        for name, values in {"teacher": (20, 0, 10, 5), "a": (30, 5, 6, 3), "b": (25, 4, 7, 4)}.items()
    }
    results = compare_models(one, SEQUENCES[:1], baseline="a")
    assert results["comparisons"]["b"]["kl"] == {"value": pytest.approx(-0.1), "low": None, "high": None}
    assert results["models"]["a"]["kl"]["standard_error"] is None
    same = {"teacher": TEACHER, "a": TEACHER, "b": TEACHER}
    results = compare_models(same, SEQUENCES, baseline="a")
    assert results["gap_closed"]["b"]["kl"] == {"value": None, "low": None, "high": None}
    json.dumps(results, allow_nan=False)


def test_the_same_seed_gives_the_same_intervals() -> None:
    scores = {"teacher": TEACHER, "a": _scores(3.0, 0.5, 0.6, seed=1), "b": _scores(2.9, 0.4, 0.7, seed=2)}
    assert compare_models(scores, SEQUENCES, baseline="a") == compare_models(scores, SEQUENCES, baseline="a")


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ConfigError, match="baseline is 'c', but the students are 'a'"):
        compare_models({"teacher": TEACHER, "a": TEACHER}, SEQUENCES, baseline="c")
