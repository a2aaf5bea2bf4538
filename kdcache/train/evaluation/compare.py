"""From sums per sequence to means with confidence intervals: whether one student beats another, measured.

The paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8; to compare systems: Koehn, 2004)
draws texts with replacement; every model sees the same draws, so what is common to all of them cancels in a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ConfigError
from kdcache.train.evaluation.heldout import HeldoutSequence
from kdcache.train.evaluation.scores import TEACHER, Scores

_MIN_TEXTS = 10
_ROUNDS = 2000
_METRICS = ("nats_per_token", "nats_per_byte", "kl", "top1_agreement", "accuracy")
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True, slots=True, eq=False)
class _Resamples:
    """Each metric's value for every model: on all the data, and in every bootstrap round. Of the unigram only its loss."""

    value: Mapping[str, Mapping[str, float]]
    rounds_by_round: Mapping[str, Mapping[str, NDArray[np.float64]]]
    unigram: float | None = None
    unigram_by_round: NDArray[np.float64] | None = None


def compare_models(
    scores: Mapping[str, Scores],
    sequences: Sequence[HeldoutSequence],
    *,
    baseline: str,
    seed: int = 0,
    unigram_nll_S: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """The evaluation as plain data (numbers, strings, lists), which is what `results.json` holds.

    Args:
        scores: of the teacher and the students, as `score_models` gives them.
        sequences: the ones scored.
        baseline: the student that the others are compared with, and from which the gap to the teacher is counted.
        seed: of the bootstrap.
        unigram_nll_S: (S,) nats, the loss of each sequence by token frequencies alone (`unigram`); None where unknown.

    Returns:
        `models`: for each, every metric as {value, standard_error}; `retention`: for each student, what it keeps of the teacher
        as {value, low, high}: of its `accuracy`, acc_s / acc_t, and of its `nats_over_unigram`, (loss_u - loss_s) / (loss_u -
        loss_t), null where the unigram is unknown; `unigram`: its loss, or null; `comparisons`: for each student
        but the baseline, every metric's difference to the baseline as {value, low, high}, with a 95% interval; `gap_closed`:
        for each of these the share of the teacher-baseline gap closed in `nats_per_token`, `kl` and `top1_agreement`, likewise.
        An interval that cannot be had (one sequence, a gap of zero) is null.

    Raises:
        ConfigError: the baseline is not one of the students.
    """
    students = [name for name in scores if name != TEACHER]
    if baseline not in students:
        raise ConfigError(f"baseline is {baseline!r}, but the students are {', '.join(map(repr, students))}")
    groups_S, resampled = _groups(sequences)
    data = _resample(scores, sequences, groups_S, seed, unigram_nll_S)
    others = [name for name in students if name != baseline]
    return {
        "num_sequences": len(sequences),
        "num_tokens": sum(s.num_targets for s in sequences),
        "num_bytes": sum(s.num_bytes for s in sequences),
        "baseline": baseline,
        "bootstrap": {"rounds": _ROUNDS, "seed": seed, "resampled": resampled, "num_resampled": int(groups_S.max()) + 1},
        "models": {name: _summary(data, name) for name in scores},
        "unigram": None if data.unigram is None else {"nats_per_token": data.unigram},
        "retention": {
            name: {"accuracy": _accuracy_kept(data, name), "nats_over_unigram": _nats_kept(data, name)} for name in students
        },
        "comparisons": {name: {metric: _difference(data, metric, name, baseline) for metric in _METRICS} for name in others},
        "gap_closed": {
            name: {metric: _gap_closed(data, metric, name, baseline) for metric in ("nats_per_token", "kl", "top1_agreement")}
            for name in others
        },
    }


def _groups(sequences: Sequence[HeldoutSequence]) -> tuple[NDArray[np.int64], str]:
    """What is drawn: whole texts, since windows of one text are alike; single windows where there are too few texts."""
    _, groups_S = np.unique([s.text for s in sequences], return_inverse=True)
    if int(groups_S.max()) + 1 >= _MIN_TEXTS:
        return groups_S, "texts"
    return np.arange(len(sequences)), "windows"


def _resample(
    scores: Mapping[str, Scores],
    sequences: Sequence[HeldoutSequence],
    groups_S: NDArray[np.int64],
    seed: int,
    unigram_nll_S: NDArray[np.float64] | None,
) -> _Resamples:
    num_groups = int(groups_S.max()) + 1
    generator = np.random.Generator(np.random.Philox(key=seed))
    draws_by_round = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=_ROUNDS).astype(np.float64)
    if num_groups == 1:
        draws_by_round[:] = np.nan  # one thing drawn again and again says nothing of the spread
    counts_by_round = np.vstack([np.ones(num_groups), draws_by_round])  # round 0 is the data as it is

    def totals(per_sequence_S: Any) -> NDArray[np.float64]:
        return counts_by_round @ np.bincount(groups_S, weights=np.asarray(per_sequence_S, np.float64), minlength=num_groups)

    tokens_by_round, bytes_by_round = (
        totals([s.num_targets for s in sequences]),
        totals([max(1, s.num_bytes) for s in sequences]),
    )
    table = {}
    for name, score in scores.items():
        nll_by_round = totals(score.nll_S)
        table[name] = {
            "nats_per_token": nll_by_round / tokens_by_round,
            "nats_per_byte": nll_by_round / bytes_by_round,
            "kl": totals(score.kl_S) / tokens_by_round,
            "top1_agreement": totals(score.agreement_S) / tokens_by_round,
            "accuracy": totals(score.correct_S) / tokens_by_round,
        }
    value = {name: {metric: float(v[0]) for metric, v in metrics.items()} for name, metrics in table.items()}
    rounds_by_round = {name: {metric: v[1:] for metric, v in metrics.items()} for name, metrics in table.items()}
    if unigram_nll_S is None:
        return _Resamples(value, rounds_by_round)
    unigram_by_round = totals(unigram_nll_S) / tokens_by_round
    return _Resamples(value, rounds_by_round, float(unigram_by_round[0]), unigram_by_round[1:])


def _summary(data: _Resamples, name: str) -> dict[str, Any]:
    return {
        metric: {"value": data.value[name][metric], "standard_error": _finite(data.rounds_by_round[name][metric].std(ddof=1))}
        for metric in _METRICS
    }


def _difference(data: _Resamples, metric: str, name: str, baseline: str) -> dict[str, Any]:
    value = data.value[name][metric] - data.value[baseline][metric]
    return _interval(value, data.rounds_by_round[name][metric] - data.rounds_by_round[baseline][metric])


def _gap_closed(data: _Resamples, metric: str, name: str, baseline: str) -> dict[str, Any]:
    """(baseline - student) / (baseline - teacher): 0 for the baseline, 1 for the teacher."""

    def share(of: Mapping[str, Mapping[str, Any]]) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            gap = np.subtract(of[baseline][metric], of[TEACHER][metric])
            return np.subtract(of[baseline][metric], of[name][metric]) / gap

    return _interval(float(share(data.value)), share(data.rounds_by_round))


def _accuracy_kept(data: _Resamples, name: str) -> dict[str, Any]:
    def share(of: Mapping[str, Mapping[str, Any]]) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.divide(of[name]["accuracy"], of[TEACHER]["accuracy"])

    return _interval(float(share(data.value)), share(data.rounds_by_round))


def _nats_kept(data: _Resamples, name: str) -> dict[str, Any] | None:
    """0 for a student that knows nothing but frequencies, below for one that is worse; 1 for the teacher."""
    if data.unigram is None or data.unigram_by_round is None:
        return None

    def share(unigram: Any, of: Mapping[str, Mapping[str, Any]]) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            gap = np.subtract(unigram, of[TEACHER]["nats_per_token"])
            return np.subtract(unigram, of[name]["nats_per_token"]) / gap

    return _interval(float(share(data.unigram, data.value)), share(data.unigram_by_round, data.rounds_by_round))


def _interval(value: float, rounds_by_round: NDArray[np.float64]) -> dict[str, Any]:
    with np.errstate(invalid="ignore"):
        low, high = np.percentile(rounds_by_round, _INTERVAL)
    return {"value": _finite(value), "low": _finite(low), "high": _finite(high)}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
