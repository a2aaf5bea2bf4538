"""The random selections and the scalars of a record on a CPU: one more pass over a row whose top and normaliser are known.

A row is read in blocks. Each becomes weights exp(x - top) in the core's cache, of which the exact entries' are set to 0 and the
sums of strips of STRIP tokens are kept; entropy and normalisers at further temperatures are sums over the same block. Then the
points of a row are found by walking over the strips' sums, and over the tokens of those strips alone in which a point lies.

numba's cache on disk notices a change of its own file and of no other: hence the few lines of `exp` here, as in `_topk_numba`.

Shape letters: C positions of a chunk, V vocabulary, K columns, D uniforms, H exact entries, L points, G strips of a row, T
temperatures, S scalars.
"""

from __future__ import annotations

import math

import numpy as np

from kdcache.teacher._numba_compile import REASSOCIATE, kernel

BLOCK = 4096
STRIP = 64


@kernel()
def _load(bits, shift, top, words, floats):
    """floats = x - top, of logits given as bits; `shift` is 16 for bfloat16. `words` and `floats` are the same memory."""
    for j in range(len(bits)):
        words[j] = np.int32(np.int32(bits[j]) << shift)
    for j in range(len(bits)):
        floats[j] -= top


@kernel({"contract"})
def _exp(d, scale, powers, out):
    """out * the float32 that `powers` are the bits of = exp(d * scale) for d <= 0, within 1e-6; 0 below e^-87."""
    lowest = np.float32(-87.0)
    for j in range(len(d)):
        x = d[j] * scale
        y = (lowest if x < lowest else x) * np.float32(1.44269504)
        n = np.floor(y + np.float32(0.5))
        f = y - n
        p = np.float32(1.535336188319500e-4) * f + np.float32(1.339887440266574e-3)
        p = p * f + np.float32(9.618437357674640e-3)
        p = p * f + np.float32(5.550332471162809e-2)
        p = p * f + np.float32(2.402264791363012e-1)
        p = p * f + np.float32(6.931472028550421e-1)
        out[j] = np.float32(0.0) if x < lowest else p * f + np.float32(1.0)
        powers[j] = np.int32(np.int32(n) + 127) << 23


@kernel(REASSOCIATE)
def _multiply(x, y):
    total = np.float32(0.0)
    for j in range(len(x)):
        x[j] *= y[j]
        total += x[j]
    return total


@kernel(REASSOCIATE)
def _sum(x):
    total = np.float32(0.0)
    for j in range(len(x)):
        total += x[j]
    return total


@kernel(REASSOCIATE)
def _dot_above(x, d):
    """Sum of x * d, without what is -inf: its x is 0."""
    lowest, total = np.float32(-87.0), np.float32(0.0)
    for j in range(len(x)):
        total += x[j] * (lowest if d[j] < lowest else d[j])
    return total


@kernel()
def _weigh(logits, heads_H, inverse_T, scratch, sums_G, sums_S):
    """Strip sums without the heads; into sums_S: sum of weights x (x - top), then sum of weights^(1/T) for each T.

    logits: bits of the row, their shift, the row's maximum.
    heads_H: ascending ids of the exact entries, and one past the row at the end.
    """
    bits_V, shift, top = logits
    words, floats, powers, power_floats, out = scratch
    head = 0
    for start in range(0, len(bits_V), BLOCK):
        size = min(BLOCK, len(bits_V) - start)
        _load(bits_V[start : start + size], shift, top, words, floats)
        for i in range(len(inverse_T)):
            _exp(floats[:size], inverse_T[i], powers, out)
            sums_S[1 + i] += _multiply(out[:size], power_floats[:size])
        _exp(floats[:size], np.float32(1.0), powers, out)
        _multiply(out[:size], power_floats[:size])
        if len(sums_S) > 0:
            sums_S[0] += _dot_above(out[:size], floats[:size])
        while heads_H[head] < start + size:
            out[heads_H[head] - start] = 0.0
            head += 1
        first = start // STRIP
        for g in range(-(-size // STRIP)):
            sums_G[first + g] = _sum(out[g * STRIP : min(size, (g + 1) * STRIP)])


@kernel()
def _find(logits, heads_H, points_L, sums_G, scratch, ids_L):
    """The token of each of the rising points."""
    bits_V, shift, top = logits
    words, floats, powers, power_floats, out = scratch
    i, cumulative, head = 0, 0.0, 0
    for g in range(len(sums_G)):
        end = cumulative + sums_G[g]
        if i < len(points_L) and points_L[i] < end:
            start = g * STRIP
            size = min(STRIP, len(bits_V) - start)
            _load(bits_V[start : start + size], shift, top, words, floats)
            _exp(floats[:size], np.float32(1.0), powers, out)
            _multiply(out[:size], power_floats[:size])
            while heads_H[head] < start:
                head += 1
            while heads_H[head] < start + size:
                out[heads_H[head] - start] = 0.0
                head += 1
            edge, last = cumulative, 0
            for j in range(size):
                if out[j] > 0:
                    last = j
                edge += out[j]
                while i < len(points_L) and points_L[i] < edge:
                    ids_L[i] = start + j
                    i += 1
            # The strip's sum and the sum of its tokens differ by rounding.
            while i < len(points_L) and points_L[i] < end:
                ids_L[i] = start + last
                i += 1
        cumulative = end
    return i


@kernel()
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


@kernel()
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


@kernel()
def draw_rows(logits, known, options, found):
    """Fill in what a selection has beside its exact entries; every row on its own.

    Args:
        logits: (C, V) bits, and by how much they are shifted: 0 for float32's, 16 for bfloat16's.
        known: (C,) float32 maxima and (C,) float64 logs of the sum of exp; (C, D) uniforms, rising within a row, D = 0 to draw
            nothing.
        options: tau, or 0 for draws with replacement; whether draws share the rest's mass and not 1; whether the first scalar
            is the tail mass; whether the next is the entropy; (T,) float64 1 / temperature.
        found: (C, K) ids and logprobs, whose first counts_C2[c, 0] are there; (C, 2) counts; (C, S) scalars.
    """
    (bits_CV, shift), (tops_C, log_z_C, uniforms_CD) = logits, known
    tau, shares_rest, keeps_tail, keeps_entropy, inverse_T = options
    ids_CK, logprobs_CK, counts_C2, scalars_CS = found
    words, powers = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
    scratch = (words, words.view(np.float32), powers, powers.view(np.float32), np.empty(BLOCK, np.float32))
    num_tokens, num_draws = bits_CV.shape[1], uniforms_CD.shape[1]
    sums_G = np.empty(-(-num_tokens // STRIP), np.float64)
    most = ids_CK.shape[1] if tau > 0 else num_draws
    points_L, ids_L = np.empty(most, np.float64), np.empty(most, np.int64)
    sums_S = np.empty(1 + len(inverse_T) if keeps_entropy or len(inverse_T) else 0, np.float64)
    inverse_f_T = inverse_T.astype(np.float32)
    for row in range(len(bits_CV)):
        above, num_exact = np.float64(tops_C[row]) - log_z_C[row], counts_C2[row, 0]
        heads_H = np.full(num_exact + 1, num_tokens, np.int64)
        heads_H[:num_exact] = ids_CK[row, :num_exact]
        heads_H.sort()
        sums_S[:] = 0.0
        row_logits = (bits_CV[row], shift, tops_C[row])
        _weigh(row_logits, heads_H, inverse_f_T, scratch, sums_G, sums_S)
        total = 0.0
        for g in range(len(sums_G)):
            total += sums_G[g]
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
            num_points = _find(row_logits, heads_H, room[:num_points], sums_G, scratch, ids_L)
            mass = total * math.exp(above) if shares_rest else 1.0
            log_unit = math.log(tau) if tau > 0 else math.log(mass / num_draws)
            drawn_L, row_K = ids_L[:num_points], (ids_CK[row], logprobs_CK[row])
            num_estimates = _write_estimates(drawn_L, log_unit, tau == 0.0, row_K[0], row_K[1], num_exact)
            counts_C2[row, 1] = num_exact + num_estimates
