import copy
from pathlib import Path
from typing import Any

import pytest

from kdcache.errors import ConfigError
from kdcache.report.evaluation import curve_lines, evaluation_sentences, evaluation_table, retention_sentences
from kdcache.report.plot import plot_evaluation
from kdcache.report.sparkline import BLOCKS


def _model(loss: float, kl: float, agreement: float) -> dict[str, Any]:
    values = {
        "nats_per_token": loss,
        "nats_per_byte": loss / 3,
        "kl": kl,
        "top1_agreement": agreement,
        "accuracy": agreement / 2,
    }
    return {name: {"value": value, "standard_error": 0.01 * value} for name, value in values.items()}


def _interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


RESULTS: dict[str, Any] = {
    "num_sequences": 100,
    "num_tokens": 20_000,
    "num_bytes": 60_000,
    "baseline": "labels",
    "bootstrap": {"rounds": 10, "seed": 0, "resampled": "texts", "num_resampled": 50},
    "models": {"teacher": _model(2.0, 0.0, 1.0), "labels": _model(3.0, 0.9, 0.5), "kd": _model(2.7, 0.5, 0.6)},
    "comparisons": {
        "kd": {"nats_per_token": _interval(-0.3), "kl": _interval(-0.4), "top1_agreement": _interval(0.1)},
    },
    "inputs": {"unigram": {"source": "cache", "tokens": 1000}},
    "sizes": {
        "teacher": {"parameters": 1500, "non_embedding": 1000},
        "labels": {"parameters": 1000, "non_embedding": 500},
        "kd": {"parameters": 1000, "non_embedding": 500},
    },
    "unigram": {"nats_per_token": 7.0},
    "retention": {
        "labels": {"accuracy": _interval(0.9), "nats_over_unigram": _interval(0.8)},
        "kd": {"accuracy": _interval(0.96), "nats_over_unigram": _interval(0.955)},
    },
    "gap_closed": {"kd": {"nats_per_token": _interval(0.3), "kl": _interval(0.4), "top1_agreement": _interval(0.2)}},
}
CURVES = {"labels": [(0, 8.0), (1000, 4.0), (2000, 3.0)], "kd": [(0, 8.0), (1000, 3.5), (2000, 2.7)]}


def test_the_table_shows_each_model_with_errors_its_size_and_what_it_keeps() -> None:
    lines = {line[0]: line for line in evaluation_table(RESULTS).lines}
    assert list(lines) == ["teacher", "labels", "kd"]
    assert lines["kd"][1:3] == ["500 (50%)", "2.7000 +- 0.0270"]
    assert lines["kd"][4] == "60.0% +- 0.6"
    assert [lines[name][-2:] for name in lines] == [
        ["100%", "100%"],
        ["90.0% [89.0, 91.0]", "80.0% [79.0, 81.0]"],
        ["96.0% [95.0, 97.0]", "95.5% [94.5, 96.5]"],
    ]


def test_what_a_student_keeps_is_said_with_its_size_and_without_a_unigram_why_not() -> None:
    assert retention_sentences(RESULTS)[1] == (
        "kd keeps 96.0% [95.0, 97.0] of the teacher's top-1 accuracy and 95.5% [94.5, 96.5] of its nats over unigram, with 50% "
        "of its non-embedding parameters"
    )
    unknown: dict[str, Any] = copy.deepcopy(RESULTS) | {"unigram": None, "inputs": {"unigram": {"missing": "no cache at c"}}}
    for kept in unknown["retention"].values():
        kept["nats_over_unigram"] = None
    sentences = retention_sentences(unknown)
    assert "nats" not in sentences[0]
    assert sentences[2].startswith("nats over unigram are not known (no cache at c); name training text")
    assert evaluation_table(unknown).lines[2][-1] == "n/a"


def test_the_verdict_knows_which_direction_is_better() -> None:
    (sentence,) = evaluation_sentences(RESULTS)
    assert sentence.startswith("kd against labels: -0.3000 nats/token of loss (95% interval -0.3100 to -0.2900): better")
    assert "+10.0 points of top-1 agreement" in sentence
    assert sentence.count("better") == 3


def test_an_interval_around_zero_is_no_clear_difference_and_the_wrong_sign_is_worse() -> None:
    results = copy.deepcopy(RESULTS)
    results["comparisons"]["kd"] |= {"nats_per_token": _interval(0.005), "kl": _interval(0.4)}
    (sentence,) = evaluation_sentences(results)
    assert "no clear difference; +0.4000 nats of KL" in sentence
    assert "0.4100): worse" in sentence


def test_missing_intervals_are_said_not_printed_as_numbers() -> None:
    results = copy.deepcopy(RESULTS)
    nothing = {"value": -0.3, "low": None, "high": None}
    results["comparisons"]["kd"] = dict.fromkeys(("nats_per_token", "kl", "top1_agreement"), nothing)
    results["retention"]["kd"]["nats_over_unigram"] = {"value": None, "low": None, "high": None}
    assert "no interval: too little data" in evaluation_sentences(results)[0]
    assert evaluation_table(results).lines[2][-1] == "n/a"


def test_curves_share_one_scale_and_empty_ones_are_left_out() -> None:
    lines = curve_lines(CURVES | {"other": []})
    assert len(lines) == 2
    assert lines[0].startswith("labels  8.000 ")
    assert lines[1].endswith(" 2.700")
    assert [line.split()[2][1] for line in lines] == [BLOCKS[-1], BLOCKS[4]], "the first points, 8.0, do not set the scale"
    assert curve_lines({"other": []}) == []


@pytest.mark.parametrize("curves", [CURVES, {}])
def test_the_plot_is_a_png_with_and_without_curves(tmp_path: Path, curves: dict[str, Any]) -> None:
    plot_evaluation(RESULTS, curves, tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing/plot\.png: the plot cannot be written"):
        plot_evaluation(RESULTS, CURVES, tmp_path / "missing" / "plot.png")
