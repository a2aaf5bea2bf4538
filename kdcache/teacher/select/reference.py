"""What every selection means: whole distributions in float64, NumPy, one position at a time. The fast paths must agree.

The random kinds walk along the cumulative sum of probabilities, in the order of the vocabulary. Let `rest` be the probabilities
of the tokens that are not exact entries (0 for those that are), R their sum, and u the position's uniforms:

- `sampled`, `top_k_sampled`: draw d takes the token in whose stretch of the cumulative sum of `rest` the point u_d R lies.
- `threshold`: tokens with p >= tau are exact. Of the others, those are kept in whose stretch one of the points (i + u_0) tau
  lies, i = 0, 1, ...: systematic sampling (Madow 1949) with inclusion probability p / tau, at most one point per token. With
  its fixed threshold this is the VarOpt estimate of Cohen, Duffield, Kaplan, Lund, Thorup (SODA 2009), except for the stored
  mass, which is within tau of 1 instead of exactly 1, since one tau serves all positions.

The fast paths round their weights, all in the same way (`exact_weights`). They may take the
neighbour of a token at whose edge a point lies, and may call a token exact whose p is tau up to
rounding. Nothing else may differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import NO_TARGET, Distributions
from kdcache.teacher.select.exact_weights import MIN_LOGPROB
from kdcache.teacher.select.uniforms import uniforms_of


def select_reference(
    logits_PV: NDArray[np.floating], target_ids_P: NDArray[np.int32], selection: SelectionInfo, states_P: NDArray[np.uint64]
) -> Distributions:
    """The record of P positions.

    Args:
        logits_PV: any floats; -inf for a token that cannot come. Logprobs are logits too.
        target_ids_P: NO_TARGET where nothing follows.
        selection: see `kdcache.format.selection`.
        states_P: see `uniforms.position_states`.
    """
    logits_PV = np.asarray(logits_PV, np.float64)
    if selection.filters:
        logits_PV = np.stack([filter_reference(logits_V, selection.filters) for logits_V in logits_PV])
    logprobs_PV = logits_PV - _log_sum_exp(logits_PV)[:, None]
    found = [_select(logprobs_V, selection, state) for logprobs_V, state in zip(logprobs_PV, states_P, strict=True)]
    counts_P = [len(each.token_ids) for each in found]
    exact_ids = [set(each.token_ids[: each.num_exact].tolist()) for each in found]
    outside_P = [t != NO_TARGET and int(t) not in ids for t, ids in zip(target_ids_P, exact_ids, strict=True)]
    return Distributions(
        token_ids_E=np.concatenate([each.token_ids for each in found]).astype(np.int32),
        logprobs_E=np.minimum(np.concatenate([each.logprobs for each in found]), 0.0).astype(np.float32),
        offsets_P1=np.concatenate([[0], np.cumsum(counts_P)]).astype(np.int64),
        tail_mass_P=np.array([each.tail_mass for each in found], np.float32),
        outside_target_logprobs=logprobs_PV[outside_P, target_ids_P[outside_P]].astype(np.float32),
        num_exact_P=np.array([each.num_exact for each in found], np.int64) if selection.kind in _RANDOM else None,
        log_z_PL=_log_z(logprobs_PV, selection.temperatures) if selection.temperatures else None,
        entropy_P=_entropy(logprobs_PV) if selection.entropy else None,
    )


@dataclass(frozen=True)
class _Entries:
    """Entries of one position, exact ones first, and the mass of all tokens that are not exact entries."""

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    num_exact: int
    tail_mass: float


_RANDOM = ("sampled", "threshold", "top_k_sampled")


def _select(logprobs_V: NDArray[np.float64], selection: SelectionInfo, state: np.uint64) -> _Entries:
    kind, params = selection.kind, selection.params
    by_probability = np.argsort(-logprobs_V, kind="stable")
    exact = by_probability[: _num_exact(logprobs_V[by_probability], selection)]
    p_V = np.where(logprobs_V - logprobs_V.max() > MIN_LOGPROB, np.exp(logprobs_V), 0.0)
    rest_V = p_V.copy()
    rest_V[exact] = 0.0
    tail_mass = float(rest_V.sum())
    if kind == "threshold":
        (u,) = uniforms_of(np.array([state]), 1)[0]
        points = (np.arange(math.ceil(tail_mass / params["tau"]) + 1) + u) * params["tau"]
        drawn, log_unit = draw_reference(rest_V, points[points < tail_mass]), math.log(params["tau"])
    elif kind in _RANDOM and tail_mass > 0:
        uniforms = uniforms_of(np.array([state]), params["num_draws"])[0]
        drawn = draw_reference(rest_V, uniforms * tail_mass)
        log_unit = (math.log(tail_mass) if len(exact) else 0.0) - math.log(params["num_draws"])
    else:
        drawn, log_unit = np.empty(0, np.int64), 0.0
    ids, counts = np.unique(drawn, return_counts=True)
    if kind == "threshold":
        counts = np.ones_like(ids)  # rounding may give two where p is nearly tau
    by_count = np.argsort(-counts, kind="stable")
    return _Entries(
        token_ids=np.concatenate([exact, ids[by_count]]),
        logprobs=np.concatenate([logprobs_V[exact], log_unit + np.log(counts[by_count])]),
        num_exact=len(exact),
        tail_mass=1.0 if kind == "sampled" else min(tail_mass, 1.0),
    )


def _num_exact(falling_V: NDArray[np.float64], selection: SelectionInfo) -> int:
    params = selection.params
    if selection.kind == "sampled":
        return 0
    if selection.kind == "threshold":
        return int((falling_V >= math.log(params["tau"])).sum())
    k = min(params["k"], len(falling_V))
    if selection.kind == "top_p_k":
        # One more than those before which the mass has not reached p.
        return min(k, 1 + int((np.cumsum(np.exp(falling_V)) < params["p"]).sum()))
    return k


def draw_reference(weights_V: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.int64]:
    """Find for each point in [0, sum of weights) the token in whose stretch of the cumulative sum it
    lies; never one of weight 0."""
    edges_V = np.cumsum(weights_V)
    last = int(np.flatnonzero(weights_V)[-1]) if len(points) else 0
    return np.minimum(np.searchsorted(edges_V, points, side="right"), last)


def filter_reference(logits_V: NDArray[np.float64], filters: dict[str, float]) -> NDArray[np.float64]:
    """What a sampler draws from: logits divided by the temperature, then -inf where a filter rules a token out.

    The order is vLLM's (v1/sample/sampler.py, ops/topk_topp_sampler.py, 0.24 to 0.32): temperature, min_p, top_k, top_p, each
    over what the one before left. top_k 0, top_p 1 and min_p 0 rule nothing out. Tokens that tie with the k-th stay.
    """
    logits_V = logits_V / filters.get("temperature", 1.0)
    if filters.get("min_p", 0.0) > 0:
        logits_V = np.where(logits_V >= logits_V.max() + math.log(filters["min_p"]), logits_V, -np.inf)
    k = int(filters.get("top_k", 0))
    if 0 < k < len(logits_V):
        logits_V = np.where(logits_V >= np.sort(logits_V)[-k], logits_V, -np.inf)
    if filters.get("top_p", 1.0) < 1:
        rising = np.argsort(logits_V, kind="stable")
        mass = np.cumsum(np.exp(logits_V[rising] - _log_sum_exp(logits_V[None])[0]))
        out = mass <= 1 - filters["top_p"]
        out[-1] = False
        logits_V = logits_V.copy()
        logits_V[rising[out]] = -np.inf
    return logits_V


def _log_z(logprobs_PV: NDArray[np.float64], temperatures: tuple[float, ...]) -> NDArray[np.float32]:
    return np.stack([_log_sum_exp(logprobs_PV / t) for t in temperatures], axis=-1).astype(np.float32)


def _entropy(logprobs_PV: NDArray[np.float64]) -> NDArray[np.float32]:
    p_PV = np.exp(logprobs_PV)
    return np.maximum(-(p_PV * np.where(p_PV > 0, logprobs_PV, 0.0)).sum(axis=-1), 0.0).astype(np.float32)


def _log_sum_exp(x_PV: NDArray[np.float64]) -> NDArray[np.float64]:
    top_P1 = x_PV.max(axis=-1, keepdims=True)
    return top_P1[:, 0] + np.log(np.exp(x_PV - top_P1).sum(axis=-1))
