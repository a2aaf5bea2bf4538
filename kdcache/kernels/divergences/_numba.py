"""Every divergence on one position's buckets, compiled: the O(K) part of the kernels. Formulas: `reference`.

A function gets seven lines of B float64: log P, P, log Q, Q, h = dL / dlog Q, which it writes, 1 for an entry that is an
estimate, and 1 for the bucket of the target id, 0 for all else; and the divergence's options at this position. It returns L. A
bucket that does not exist has P = Q = 0 and both logs -inf. NaN in Q must come out: comparisons are written so that NaN does
not take the side of 0.

Each is compiled when first asked for. The kernels get its address, so that they are compiled once for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from kdcache.compiled import compiled, inlined
from kdcache.kernels import divergences as d
from kdcache.kernels.divergences import _numba_support as support

LOG_P, P, LOG_Q, Q, H, ESTIMATE, TARGET = range(7)
SIGNATURE = types.float64(types.float64[:, ::1], types.float64[::1])


@cache
def get_address(kind: type[d.Divergence]) -> int:
    """Of the machine code of a divergence's O(K) part, which has the type SIGNATURE and numba's own calling convention."""
    result = get_compiled(kind).get_compile_result(SIGNATURE)
    return result.library.get_pointer_to_function(result.fndesc.llvm_func_name)


@cache
def get_compiled(kind: type[d.Divergence]) -> Any:
    """A divergence's O(K) part, compiled; kept, since its address is used."""
    return compiled(SIGNATURE)(kind.for_numba or _FUNCTIONS[kind])


def _forward_kl(x_7K1, _):
    loss = 0.0
    for b in range(x_7K1.shape[1]):
        p = x_7K1[P, b]
        x_7K1[H, b] = -p
        if p > 0:
            loss += p * (x_7K1[LOG_P, b] - x_7K1[LOG_Q, b])
    return loss


@inlined
def _reverse_kl_with_floor(x_7K1, floor):
    loss, log_floor = 0.0, math.log(floor)
    for b in range(x_7K1.shape[1]):
        h = 0.0
        if x_7K1[Q, b] != 0:
            h = x_7K1[Q, b] * (x_7K1[LOG_Q, b] - max(x_7K1[LOG_P, b], log_floor))
        x_7K1[H, b] = h
        loss += h
    return loss


def _reverse_kl(x_7K1, options):
    return _reverse_kl_with_floor(x_7K1, options[0])


@inlined
def _log_mix(log_share, log_p, log_rest, log_q):
    """log(share p + rest q)."""
    one, other = log_share + log_p, log_rest + log_q
    top = one if one > other else other
    return top if top == -np.inf else top + math.log(math.exp(one - top) + math.exp(other - top))


@inlined
def _interior_jensen_shannon(x_7K1, beta, factor):
    loss, log_beta, log_rest = 0.0, math.log(beta), math.log1p(-beta)
    for b in range(x_7K1.shape[1]):
        log_m = _log_mix(log_beta, x_7K1[LOG_P, b], log_rest, x_7K1[LOG_Q, b])
        h = 0.0
        if x_7K1[Q, b] != 0:
            h = factor * x_7K1[Q, b] * (x_7K1[LOG_Q, b] - log_m) / beta
        x_7K1[H, b] = h
        loss += h
        if x_7K1[P, b] > 0:
            loss += factor * x_7K1[P, b] * (x_7K1[LOG_P, b] - log_m) / (1 - beta)
    return loss


def _jensen_shannon(x_7K1, options):
    if options[0] == 1:
        return _reverse_kl_with_floor(x_7K1, options[1])
    if options[0] > 0:
        factor = options[0] * (1 - options[0]) if options[2] != 0 else 1.0
        return _interior_jensen_shannon(x_7K1, options[0], factor)
    loss = 0.0
    for b in range(x_7K1.shape[1]):
        x_7K1[H, b] = -x_7K1[P, b]
        if x_7K1[P, b] > 0:
            loss += x_7K1[P, b] * (x_7K1[LOG_P, b] - x_7K1[LOG_Q, b])
    return loss


def _skew_kl(x_7K1, options):
    skew, loss = options[0], 0.0
    log_skew, log_rest = math.log(skew), math.log1p(-skew)
    for b in range(x_7K1.shape[1]):
        x_7K1[H, b] = 0.0
        if x_7K1[P, b] > 0:
            log_m = _log_mix(log_skew, x_7K1[LOG_P, b], log_rest, x_7K1[LOG_Q, b])
            loss += x_7K1[P, b] * (x_7K1[LOG_P, b] - log_m)
            # Where both are beyond float64, as Q = M = 0, Q / M is 1 / (1 - skew).
            ratio = math.exp(x_7K1[LOG_Q, b] - log_m) if log_m > -np.inf else 1 / (1 - skew)
            x_7K1[H, b] = -(1 - skew) * x_7K1[P, b] * ratio
    return loss


def _skew_reverse_kl(x_7K1, options):
    skew, loss = options[0], 0.0
    log_skew, log_rest = math.log(skew), math.log1p(-skew)
    for b in range(x_7K1.shape[1]):
        x_7K1[H, b] = 0.0
        if x_7K1[Q, b] != 0:
            log_m = _log_mix(log_rest, x_7K1[LOG_P, b], log_skew, x_7K1[LOG_Q, b])
            part = x_7K1[Q, b] * (x_7K1[LOG_Q, b] - log_m)
            loss += part
            x_7K1[H, b] = part - skew * x_7K1[Q, b] * math.exp(x_7K1[LOG_Q, b] - log_m)
    return loss


@inlined
def _guide_gap(x_7K1, lam):
    """KL(G || Q) of G = lam P + (1 - lam) E, E the target id's bucket; and whether there is a target id."""
    gap, has_target = 0.0, False
    for b in range(x_7K1.shape[1]):
        g = lam * x_7K1[P, b] + (1 - lam) * x_7K1[TARGET, b]
        has_target |= x_7K1[TARGET, b] > 0
        if g > 0:
            gap += g * (math.log(g) - x_7K1[LOG_Q, b])
    return gap, has_target


def _self_evolution(x_7K1, options):
    lam, mu, loss = options[0], 0.0, 0.0
    gap, has_target = _guide_gap(x_7K1, lam)
    if has_target and gap > options[1]:
        mu = options[2] * (1 - options[3] / (gap + options[3]))
    for b in range(x_7K1.shape[1]):
        p = x_7K1[P, b]
        x_7K1[H, b] = -(1 - mu) * p
        if p > 0:
            log_m = x_7K1[LOG_Q, b]
            if mu > 0:
                g = lam * p + (1 - lam) * x_7K1[TARGET, b]
                log_m = _log_mix(math.log(mu), math.log(g), math.log1p(-mu), x_7K1[LOG_Q, b])
                x_7K1[H, b] *= math.exp(x_7K1[LOG_Q, b] - log_m)
            loss += p * (x_7K1[LOG_P, b] - log_m)
    return loss


def _hard_share(x_7K1, options):
    gap, has_target = _guide_gap(x_7K1, options[0])
    x_7K1[H] = 0.0
    return 1.0 if has_target and gap > options[1] else 0.0


def _adaptive_kl(x_7K1, options):
    tail = x_7K1.shape[1] - 1
    gap, head_gap, running = abs(x_7K1[P, tail] - x_7K1[Q, tail]), 0.0, 0.0
    order_K = np.argsort(-x_7K1[P, :tail], kind="mergesort")
    for rank in range(tail):
        b = order_K[rank]
        running += x_7K1[P, b]
        difference = abs(x_7K1[P, b] - x_7K1[Q, b])
        gap += difference
        if rank == 0 or running <= options[0]:
            head_gap += difference
    share = 0.5 if gap == 0 else head_gap / gap
    reverse, forward = _reverse_kl_with_floor(x_7K1, options[1]), 0.0
    for b in range(tail + 1):
        x_7K1[H, b] = (1 - share) * x_7K1[H, b] - share * x_7K1[P, b]
        if x_7K1[P, b] > 0:
            forward += x_7K1[P, b] * (x_7K1[LOG_P, b] - x_7K1[LOG_Q, b])
    # A share of 0 must not turn an infinite forward KL into NaN, but NaN must come through.
    return (1 - share) * reverse + (0.0 if share == 0 else share * forward)


def _total_variation(x_7K1, _):
    loss = 0.0
    for b in range(x_7K1.shape[1]):
        gap = x_7K1[Q, b] - x_7K1[P, b]
        sign = 1.0 if gap > 0 else (-1.0 if gap < 0 else gap)
        loss += abs(gap) / 2
        x_7K1[H, b] = x_7K1[Q, b] * sign / 2
    return loss


def _hellinger(x_7K1, _):
    loss = 0.0
    for b in range(x_7K1.shape[1]):
        root = math.exp(x_7K1[LOG_Q, b] / 2)
        gap = root - math.exp(x_7K1[LOG_P, b] / 2)
        loss += gap * gap / 2
        x_7K1[H, b] = root * gap / 2
    return loss


def _alpha_beta(x_7K1, options):
    a, b, loss = options[0], options[1], 0.0
    for i in range(x_7K1.shape[1]):
        p_a, q_b = math.exp(a * x_7K1[LOG_P, i]), math.exp(b * x_7K1[LOG_Q, i])
        p_ab, q_ab = math.exp((a + b) * x_7K1[LOG_P, i]), math.exp((a + b) * x_7K1[LOG_Q, i])
        loss += (a * p_ab + b * q_ab) / (a + b) - p_a * q_b
        x_7K1[H, i] = (q_ab - p_a * q_b) / a
    return loss / (a * b)


@inlined
def _logsumexp(values_K, temperature):
    """Of values / temperature."""
    top = -np.inf
    for k in range(len(values_K)):
        if not values_K[k] <= top:
            top = values_K[k]
    if top == -np.inf:
        return top
    total = 0.0
    for k in range(len(values_K)):
        total += math.exp((values_K[k] - top) / temperature)
    return top / temperature + math.log(total)


def _decoupled_top_k(x_7K1, options):
    t, tail = options[0], x_7K1.shape[1] - 1
    m, r = 0.0, x_7K1[P, tail]
    for b in range(tail):
        m += x_7K1[P, b]
    x_7K1[H, tail] = -r
    loss = r * (x_7K1[LOG_P, tail] - x_7K1[LOG_Q, tail]) if r > 0 else 0.0
    if m == 0:
        x_7K1[H, :tail] = 0.0
        return loss
    log_q_S = _logsumexp(x_7K1[LOG_Q, :tail], 1.0)
    norm_p, norm_q = _logsumexp(x_7K1[LOG_P, :tail], t), _logsumexp(x_7K1[LOG_Q, :tail], t)
    loss += m * (math.log(m) - log_q_S)
    for b in range(tail):
        log_p_t, log_q_t = x_7K1[LOG_P, b] / t - norm_p, x_7K1[LOG_Q, b] / t - norm_q
        p_t = math.exp(log_p_t)
        if p_t > 0:
            loss += m * t * t * p_t * (log_p_t - log_q_t)
        x_7K1[H, b] = m * (t * (math.exp(log_q_t) - p_t) - math.exp(x_7K1[LOG_Q, b] - log_q_S))
    return loss


def _tail_aware_kl(x_7K1, options):
    weight, last, top = options[0], x_7K1.shape[1] - 1, x_7K1[LOG_Q, x_7K1.shape[1] - 1]
    r, s, loss = x_7K1[P, last], 0.0, 0.0
    for b in range(last):
        if x_7K1[ESTIMATE, b] == 0:
            x_7K1[H, b] = -x_7K1[P, b]
            if x_7K1[P, b] > 0:
                loss += x_7K1[P, b] * (x_7K1[LOG_P, b] - x_7K1[LOG_Q, b])
        else:
            s += x_7K1[P, b]
            if not x_7K1[LOG_Q, b] <= top:
                top = x_7K1[LOG_Q, b]
    if top == -np.inf:
        # A tail that the student cannot give is, as in the forward KL, one bucket of mass 0.
        for b in range(last):
            if x_7K1[ESTIMATE, b] != 0:
                x_7K1[H, b] = -weight * x_7K1[P, b]
        x_7K1[H, last] = weight * s - r
        return loss if r == 0 and s == 0 else np.inf
    total = math.exp(x_7K1[LOG_Q, last] - top)
    for b in range(last):
        if x_7K1[ESTIMATE, b] != 0:
            total += math.exp(x_7K1[LOG_Q, b] - top)
    log_tail = top + math.log(total)
    if r > 0:
        loss += r * (x_7K1[LOG_P, last] - log_tail)
    within = -s * math.log(s) if s > 0 else 0.0
    x_7K1[H, last] = (weight * s - r) * math.exp(x_7K1[LOG_Q, last] - log_tail)
    for b in range(last):
        if x_7K1[ESTIMATE, b] != 0:
            x_7K1[H, b] = (weight * s - r) * math.exp(x_7K1[LOG_Q, b] - log_tail) - weight * x_7K1[P, b]
            if x_7K1[P, b] > 0:
                within += x_7K1[P, b] * (x_7K1[LOG_P, b] - x_7K1[LOG_Q, b] + log_tail)
    return loss + weight * within


_FUNCTIONS: dict[type[d.Divergence], Callable[..., Any]] = {
    d.ForwardKL: _forward_kl,
    d.ReverseKL: _reverse_kl,
    d.JensenShannon: _jensen_shannon,
    d.SkewKL: _skew_kl,
    d.SkewReverseKL: _skew_reverse_kl,
    d.SelfEvolution: _self_evolution,
    d.HardShare: _hard_share,
    d.AdaptiveKL: _adaptive_kl,
    d.TotalVariation: _total_variation,
    d.Hellinger: _hellinger,
    d.AlphaBeta: _alpha_beta,
    d.DecoupledTopK: _decoupled_top_k,
    d.TailAwareKL: _tail_aware_kl,
    d.CenteredMSE: support.centered_mse,
    d.HingeRanking: support.hinge_ranking,
    d.LogisticRanking: support.logistic_ranking,
    d.SoftSpearman: support.soft_spearman,
}
