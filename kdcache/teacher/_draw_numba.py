"""The random selections and the scalars of a record on a CPU: one more pass over a row whose top and normaliser are known.

A row is read in blocks that stay in the core's first cache. Of weights exp(x - top) the sums of strips of STRIP tokens are
kept; entropy and normalisers at further temperatures are sums over the same block. Strips with exact entries are summed anew
without these. Then the points of a row are found by walking over the strips' sums, and over the tokens of those strips alone in
which a point lies.

Shape letters: C positions of a chunk, V vocabulary, K columns, D uniforms, H exact entries, L points, G strips of a row, T
temperatures, S scalars.
"""

from __future__ import annotations

import math

import numpy as np

from kdcache.teacher import _numba_blocks, _numba_vectors
from kdcache.teacher._numba_blocks import BLOCK, UNIT, block_of, fill_last, sum_exp, sum_falls, sum_strips, weigh
from kdcache.teacher._numba_compile import inlined, kernel, version_of

STRIP = UNIT
_VERSION = version_of(_numba_blocks, _numba_vectors)


@inlined()
def _weigh(logits, inverse_T, wants_strips, sums_G, sums_S):
    """Strip sums, where they are wanted; into sums_S: sum of weights x (x - top), then sum of weights^(1/T) for each T.

    logits: bits of the row, its last block, the row's maximum.
    """
    bits_V, last, top = logits
    for start in range(0, len(bits_V), BLOCK):
        block, first = block_of(bits_V, start, last), start // STRIP
        for i in range(len(inverse_T)):
            sums_S[1 + i] += sum_exp(block, top, inverse_T[i])
        if len(sums_S) > 0:
            sums_S[0] += sum_falls(block, top)
        if wants_strips:
            sum_strips(block, top, sums_G[first : first + BLOCK // STRIP])


@inlined()
def _weigh_strip(logits, heads_H, head, g, weights):
    """Weights of a strip, 0 for the exact entries, whose rising ids are heads_H from `head` on; the first one behind it."""
    bits_V, last, top = logits
    start = g * STRIP
    block, place = block_of(bits_V, start // BLOCK * BLOCK, last), start % BLOCK
    weigh(block[place : place + STRIP], top, weights)
    while heads_H[head] < start:
        head += 1
    while heads_H[head] < min(start + STRIP, len(bits_V)):
        weights[heads_H[head] - start] = 0.0
        head += 1
    return head


@inlined()
def _leave_out(logits, heads_H, weights, sums_G):
    """Sum the strips with exact entries anew, without these: to subtract them would cost the rest its accuracy."""
    head = 0
    while heads_H[head] < len(logits[0]):
        g = heads_H[head] // STRIP
        head = _weigh_strip(logits, heads_H, head, g, weights)
        sums_G[g] = 0.0
        for j in range(STRIP):
            sums_G[g] += weights[j]


@inlined()
def _find(logits, heads_H, points_L, weights, sums_G, ids_L):
    """The token of each of the rising points."""
    i, cumulative, head = 0, 0.0, 0
    for g in range(len(sums_G)):
        end = cumulative + np.float64(sums_G[g])
        if i < len(points_L) and points_L[i] < end:
            head = _weigh_strip(logits, heads_H, head, g, weights)
            edge, last = cumulative, 0
            for j in range(STRIP):
                if weights[j] > 0:
                    last = j
                edge += weights[j]
                while i < len(points_L) and points_L[i] < edge:
                    ids_L[i] = g * STRIP + j
                    i += 1
            # The strip's sum and the sum of its tokens differ by rounding.
            while i < len(points_L) and points_L[i] < end:
                ids_L[i] = g * STRIP + last
                i += 1
        cumulative = end
    return i


@inlined()
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


@inlined()
def _points(total, tau, uniforms_D, points_L):
    """Points in [0, total), rising: tau apart, or one per uniform where tau is 0; how many."""
    if tau == 0.0:
        for d in range(len(uniforms_D)):
            points_L[d] = uniforms_D[d] * total
        return len(uniforms_D) if total > 0 else 0
    count = 0
    while count < len(points_L) and (count + uniforms_D[0]) * tau < total:
        points_L[count] = (count + uniforms_D[0]) * tau
        count += 1
    return count


@kernel
def draw_rows(bits_CV, known, options, found, version=_VERSION):  # noqa: ARG001 - see `_numba_compile`
    """Fill in what a selection has beside its exact entries; every row on its own.

    Args:
        bits_CV: bits of bfloat16 or float32.
        known: (C,) float32 maxima and (C,) float64 logs of the sum of exp; (C, D) uniforms, rising within a row, D = 0 to draw
            nothing.
        options: tau, or 0 for draws with replacement; whether draws share the rest's mass and not 1; whether the first scalar
            is the tail mass; whether the next is the entropy; (T,) float64 1 / temperature.
        found: (C, K) ids and logprobs, whose first counts_C2[c, 0] are there; (C, 2) counts; (C, S) scalars.
    """
    tops_C, log_z_C, uniforms_CD = known
    tau, shares_rest, keeps_tail, keeps_entropy, inverse_T = options
    ids_CK, logprobs_CK, counts_C2, scalars_CS = found
    last, weights = np.empty(BLOCK, bits_CV.dtype), np.empty(STRIP, np.float32)
    num_tokens, num_draws = bits_CV.shape[1], uniforms_CD.shape[1]
    sums_G = np.empty(-(-num_tokens // BLOCK) * (BLOCK // STRIP), np.float32)
    most = ids_CK.shape[1] if tau > 0 else num_draws
    points_L, ids_L = np.empty(most, np.float64), np.empty(most, np.int64)
    sums_S = np.empty(1 + len(inverse_T) if keeps_entropy or len(inverse_T) else 0, np.float64)
    inverse_f_T, wants_strips = inverse_T.astype(np.float32), keeps_tail or num_draws > 0
    for row in range(len(bits_CV)):
        above, num_exact = np.float64(tops_C[row]) - log_z_C[row], counts_C2[row, 0]
        heads_H = np.full(num_exact + 1, num_tokens, np.int64)
        heads_H[:num_exact] = ids_CK[row, :num_exact]
        heads_H.sort()
        sums_S[:] = 0.0
        row_logits = (bits_CV[row], last, tops_C[row])
        fill_last(bits_CV[row], last)
        _weigh(row_logits, inverse_f_T, wants_strips, sums_G, sums_S)
        total = 0.0
        if wants_strips:
            _leave_out(row_logits, heads_H, weights, sums_G)
            for g in range(len(sums_G)):
                total += np.float64(sums_G[g])
        column = 0
        if keeps_tail:
            # Without exact entries the tail is everything. NaN stays NaN.
            scalars_CS[row, 0] = total * math.exp(above) if num_exact > 0 or tau > 0 else 1.0 + 0.0 * above
            column = 1
        if keeps_entropy:
            scalars_CS[row, column] = -math.exp(above) * sums_S[0] - above
            column += 1
        for i in range(len(inverse_T)):
            scalars_CS[row, column + i] = math.log(sums_S[1 + i]) + above * inverse_T[i]
        if num_draws and above == above:
            room = points_L if tau == 0.0 else points_L[: ids_CK.shape[1] - num_exact]
            num_points = _points(total, tau * math.exp(-above), uniforms_CD[row], room)
            num_points = _find(row_logits, heads_H, room[:num_points], weights, sums_G, ids_L)
            mass = total * math.exp(above) if shares_rest else 1.0
            log_unit = math.log(tau) if tau > 0 else math.log(mass / num_draws)
            drawn_L, row_K = ids_L[:num_points], (ids_CK[row], logprobs_CK[row])
            num_estimates = _write_estimates(drawn_L, log_unit, tau == 0.0, row_K[0], row_K[1], num_exact)
            counts_C2[row, 1] = num_exact + num_estimates
