"""The random selections and the scalars of a record on a CPU: one more pass over a row whose top and normaliser are known.

A row is read in blocks that stay in the core's first cache. Of weights exp(x - reference) the sums of strips of STRIP tokens
are kept; entropy and normalisers at further temperatures are sums over the same block. Strips with exact entries are summed
anew without these. Then the points of a row are found by walking over the strips' sums, and over the tokens of those strips
alone in which a point lies. What decides a draw is `exact_weights`, bit for bit.

Shape letters: C positions of a chunk, V vocabulary, K columns, D uniforms, H exact entries, L points, G strips of a row, T
temperatures, S scalars.
"""

from __future__ import annotations

import math

import numpy as np

from kdcache.compiled import compiled, inlined, version_of
from kdcache.teacher.select import _numba_blocks, _numba_vectors, exact_weights
from kdcache.teacher.select._numba_blocks import (
    BLOCK,
    block_of,
    fill_last,
    logit_of,
    sum_exp,
    sum_falls,
    sum_strips,
    sum_unit,
    weigh,
    weight_of,
)
from kdcache.teacher.select.exact_weights import MIN_LOGPROB, STRIP, UNITS

_VERSION = version_of(_numba_blocks, _numba_vectors, exact_weights)


@inlined
def _weigh(logits, top, inverse_T, wants_strips, sums_G, sums_S):
    """Strip sums, where they are wanted; into sums_S: sum of exp(x - top) x (x - top), then of exp((x - top) / T) for each T.

    logits: bits of the row, its last block, what weights are relative to.
    """
    bits_V, last, reference = logits
    for start in range(0, len(bits_V), BLOCK):
        block, first = block_of(bits_V, start, last), start // STRIP
        for i in range(len(inverse_T)):
            sums_S[1 + i] += sum_exp(block, top, inverse_T[i])
        if len(sums_S) > 0:
            sums_S[0] += sum_falls(block, top)
        if wants_strips:
            sum_strips(block, reference, sums_G[first : first + BLOCK // STRIP])


@inlined
def _units(weight):
    return np.int64(np.float64(weight) * UNITS)


@inlined
def _sums(sums_G):
    """As a number, and in whole units."""
    total, units = 0.0, np.int64(0)
    for g in range(len(sums_G)):
        total += np.float64(sums_G[g])
        units += _units(sums_G[g])
    return total, units


@inlined
def _count_exact(logits, ids_H, num_heads, total_units, tau, p):
    """How many of the most probable tokens have probability tau, where tau > 0; else how many it takes to reach p."""
    count, cumulative = 0, np.int64(0)
    while count < num_heads:
        units = _units(weight_of(logit_of(logits[0][ids_H[count]]), logits[2]))
        if tau > 0 and np.float64(units) < tau * np.float64(total_units):
            break
        count += 1
        cumulative += units
        if tau == 0 and np.float64(cumulative) >= p * np.float64(total_units):
            break
    return count


@inlined
def _weigh_strip(logits, heads_H, head, g, weights):
    """Weights of a strip, 0 for the exact entries, whose rising ids are heads_H from `head` on; the first one behind it."""
    bits_V, last, reference = logits
    start = g * STRIP
    block, place = block_of(bits_V, start // BLOCK * BLOCK, last), start % BLOCK
    weigh(block[place : place + STRIP], reference, weights)
    while heads_H[head] < start:
        head += 1
    while heads_H[head] < min(start + STRIP, len(bits_V)):
        weights[heads_H[head] - start] = 0.0
        head += 1
    return head


@inlined
def _leave_out(logits, heads_H, weights, sums_G):
    """Sum the strips with exact entries anew, without these: to subtract them would cost the rest its accuracy."""
    head = 0
    while heads_H[head] < len(logits[0]):
        g = heads_H[head] // STRIP
        head = _weigh_strip(logits, heads_H, head, g, weights)
        sums_G[g] = sum_unit(weights)


@inlined
def _find(logits, heads_H, points_L, weights, sums_G, ids_L):
    """The token of each of the rising points, given in units; how many were found."""
    i, head, cumulative = 0, 0, np.int64(0)
    for g in range(len(sums_G)):
        end = cumulative + _units(sums_G[g])
        if i < len(points_L) and points_L[i] < end:
            head = _weigh_strip(logits, heads_H, head, g, weights)
            edge, last = cumulative, 0
            for j in range(STRIP):
                if weights[j] > 0:
                    last = j
                edge += _units(weights[j])
                while i < len(points_L) and points_L[i] < edge and points_L[i] < end:
                    ids_L[i] = g * STRIP + j
                    i += 1
            # The strip's sum and the sum of its tokens differ by rounding.
            while i < len(points_L) and points_L[i] < end:
                ids_L[i] = g * STRIP + last
                i += 1
        cumulative = end
    return i


@inlined
def _points(rest_units, step, uniforms_D, points_L):
    """Points in [0, rest_units), rising: a step apart, or one per uniform where the step is 0; how many."""
    if step == 0.0:
        for d in range(len(uniforms_D)):
            points_L[d] = min(np.int64(uniforms_D[d] * np.float64(rest_units)), rest_units - 1)
        return len(uniforms_D) if rest_units > 0 else 0
    count = 0
    while count < len(points_L) and np.int64((count + uniforms_D[0]) * step) < rest_units:
        points_L[count] = np.int64((count + uniforms_D[0]) * step)
        count += 1
    return count


@inlined
def _write_estimates(ids_L, log_unit, are_counts, ids_K, logprobs_K, num_exact):
    """Distinct ids after the exact entries, by falling count, then rising id; how many.

    With log_unit + log(count), or log_unit alone where a token has one point (two, by rounding, where p is nearly tau).
    """
    keys = np.empty(len(ids_L), np.int64)
    count, i = 0, 0
    while i < len(ids_L):
        end = i + 1
        while end < len(ids_L) and ids_L[end] == ids_L[i]:
            end += 1
        keys[count] = ((np.int64(i - end) if are_counts else np.int64(-1)) << 32) | np.int64(ids_L[i])
        count, i = count + 1, end
    keys = np.sort(keys[:count])
    for j in range(count):
        ids_K[num_exact + j] = keys[j] & 0xFFFFFFFF
        logprobs_K[num_exact + j] = log_unit + math.log(-(keys[j] >> 32))
    return count


@compiled()
def draw_rows(bits_CV, known, options, found, version=_VERSION):  # noqa: ARG001 - see `kdcache.compiled`
    """Fill in what a selection has beside its exact entries; every row on its own.

    Args:
        bits_CV: bits of bfloat16 or float32.
        known: (C,) float32 maxima; (C,) the logits that weights are relative to, the maxima or the largest that can be drawn;
            (C,) float64 logs of the sum of exp; (C, D) uniforms, rising within a row, D = 0 to draw nothing.
        options: tau and p, 0 where the number of exact entries is known; whether draws share the rest's mass and not 1;
            whether the first scalar is the tail mass; whether the next is the entropy; (T,) float64 1 / temperature.
        found: (C, K) ids and logprobs, whose first counts_C2[c, 0] are there, and perhaps not all of them exact; (C, 2) counts;
            (C, S) scalars.
    """
    tops_C, references_C, log_z_C, uniforms_CD = known
    tau, p, shares_rest, keeps_tail, keeps_entropy, inverse_T = options
    ids_CK, logprobs_CK, counts_C2, scalars_CS = found
    last, weights = np.empty(BLOCK, bits_CV.dtype), np.empty(STRIP, np.float32)
    num_tokens, num_draws = bits_CV.shape[1], uniforms_CD.shape[1]
    sums_G = np.empty(-(-num_tokens // BLOCK) * (BLOCK // STRIP), np.float32)
    most = ids_CK.shape[1] if tau > 0 else num_draws
    points_L, ids_L = np.empty(most, np.int64), np.empty(most, np.int64)
    sums_S = np.empty(1 + len(inverse_T) if keeps_entropy or len(inverse_T) else 0, np.float64)
    inverse_f_T, wants_strips = inverse_T.astype(np.float32), keeps_tail or num_draws > 0
    for row in range(len(bits_CV)):
        above, num_exact = np.float64(tops_C[row]) - log_z_C[row], counts_C2[row, 0]
        is_sound, step = above == above, 0.0
        sums_S[:] = 0.0
        row_logits = (bits_CV[row], last, references_C[row])
        fill_last(bits_CV[row], last)
        _weigh(row_logits, tops_C[row], inverse_f_T, wants_strips, sums_G, sums_S)
        if is_sound and (tau > 0 or p > 0):
            total_units = _sums(sums_G)[1]
            num_exact, step = (
                _count_exact(row_logits, ids_CK[row], num_exact, total_units, tau, p),
                tau * np.float64(total_units),
            )
        counts_C2[row] = num_exact
        heads_H = np.full(num_exact + 1, num_tokens, np.int64)
        heads_H[:num_exact] = ids_CK[row, :num_exact]
        heads_H.sort()
        if wants_strips:
            _leave_out(row_logits, heads_H, weights, sums_G)
        can_draw = is_sound and references_C[row] - tops_C[row] > MIN_LOGPROB
        rest, rest_units = _sums(sums_G) if wants_strips and can_draw else (0.0, np.int64(0))
        rest *= math.exp(np.float64(references_C[row]) - log_z_C[row])
        column = 0
        if keeps_tail:
            # Without exact entries the tail is everything. NaN stays NaN.
            scalars_CS[row, 0] = rest if num_exact > 0 or tau > 0 else 1.0 + 0.0 * above
            column = 1
        if keeps_entropy:
            scalars_CS[row, column] = -math.exp(above) * sums_S[0] - above
            column += 1
        for i in range(len(inverse_T)):
            scalars_CS[row, column + i] = math.log(sums_S[1 + i]) + above * inverse_T[i]
        if num_draws and can_draw and rest_units > 0:
            room = points_L if tau == 0.0 else points_L[: ids_CK.shape[1] - num_exact]
            num_points = _points(rest_units, step, uniforms_CD[row], room)
            num_points = _find(row_logits, heads_H, room[:num_points], weights, sums_G, ids_L)
            log_unit = math.log(tau) if tau > 0 else math.log((rest if shares_rest else 1.0) / num_draws)
            drawn_L, row_K = ids_L[:num_points], (ids_CK[row], logprobs_CK[row])
            num_estimates = _write_estimates(drawn_L, log_unit, tau == 0.0, row_K[0], row_K[1], num_exact)
            counts_C2[row, 1] = num_exact + num_estimates
