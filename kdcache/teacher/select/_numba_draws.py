"""The random selections and the scalars of a record on a CPU: a second pass over logits whose maximum and normaliser are known.

A position's logits are read in blocks that stay in the core's first-level cache. Of the weights exp(x - reference) the sums of
strips of STRIP tokens are kept; entropy and the normalisers at further temperatures are sums over the same block. Strips with
exact entries are summed again without them. Then the points are found by walking over the strip sums, and over the tokens of
those strips in which a point lies. What decides a draw is `exact_weights`, bit for bit.
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
def _weigh(logits, top, inverse_temperatures, wants_strips, strip_sums, sums):
    """Fill strip_sums where they are wanted, and sums: of exp(x - top) x (x - top), then of exp((x - top) / T) for each T.

    logits: the bits of a position, its last block, and the logit that weights are relative to.
    """
    bits_V, last, reference = logits
    for start in range(0, len(bits_V), BLOCK):
        block, first = block_of(bits_V, start, last), start // STRIP
        for i in range(len(inverse_temperatures)):
            sums[1 + i] += sum_exp(block, top, inverse_temperatures[i])
        if len(sums) > 0:
            sums[0] += sum_falls(block, top)
        if wants_strips:
            sum_strips(block, reference, strip_sums[first : first + BLOCK // STRIP])


@inlined
def _units(weight):
    return np.int64(np.float64(weight) * UNITS)


@inlined
def _sums(strip_sums):
    """The total as a float, and in whole units."""
    total, units = 0.0, np.int64(0)
    for g in range(len(strip_sums)):
        total += np.float64(strip_sums[g])
        units += _units(strip_sums[g])
    return total, units


@inlined
def _count_exact(logits, head_ids, num_heads, total_units, tau, p):
    """How many of the most probable tokens have at least probability tau, if tau > 0; else how many it takes to reach p."""
    count, cumulative = 0, np.int64(0)
    while count < num_heads:
        units = _units(weight_of(logit_of(logits[0][head_ids[count]]), logits[2]))
        if tau > 0 and np.float64(units) < tau * np.float64(total_units):
            break
        count += 1
        cumulative += units
        if tau == 0 and np.float64(cumulative) >= p * np.float64(total_units):
            break
    return count


@inlined
def _weigh_strip(logits, exact_ids, head, g, weights):
    """Fill the weights of a strip, 0 for exact entries, whose rising ids are exact_ids[head:];
    gives the first index after it."""
    bits_V, last, reference = logits
    start = g * STRIP
    block, offset = block_of(bits_V, start // BLOCK * BLOCK, last), start % BLOCK
    weigh(block[offset : offset + STRIP], reference, weights)
    while exact_ids[head] < start:
        head += 1
    while exact_ids[head] < min(start + STRIP, len(bits_V)):
        weights[exact_ids[head] - start] = 0.0
        head += 1
    return head


@inlined
def _leave_out(logits, exact_ids, weights, strip_sums):
    """Sum the strips with exact entries again without them: subtracting them would cost the rest its accuracy."""
    head = 0
    while exact_ids[head] < len(logits[0]):
        g = exact_ids[head] // STRIP
        head = _weigh_strip(logits, exact_ids, head, g, weights)
        strip_sums[g] = sum_unit(weights)


@inlined
def _find(logits, exact_ids, points, weights, strip_sums, drawn_ids):
    """Fill the token of each point; points are in units and rise. Gives how many were found."""
    i, head, cumulative = 0, 0, np.int64(0)
    for g in range(len(strip_sums)):
        end = cumulative + _units(strip_sums[g])
        if i < len(points) and points[i] < end:
            head = _weigh_strip(logits, exact_ids, head, g, weights)
            edge, last = cumulative, 0
            for j in range(STRIP):
                if weights[j] > 0:
                    last = j
                edge += _units(weights[j])
                while i < len(points) and points[i] < edge and points[i] < end:
                    drawn_ids[i] = g * STRIP + j
                    i += 1
            # Rounding makes the strip's sum differ from the sum of its tokens.
            while i < len(points) and points[i] < end:
                drawn_ids[i] = g * STRIP + last
                i += 1
        cumulative = end
    return i


@inlined
def _points(rest_units, step, uniforms, points):
    """Fill rising points in [0, rest_units): a step apart, or one per uniform if the step is 0. Gives how many."""
    if step == 0.0:
        for d in range(len(uniforms)):
            points[d] = min(np.int64(uniforms[d] * np.float64(rest_units)), rest_units - 1)
        return len(uniforms) if rest_units > 0 else 0
    count = 0
    while count < len(points) and np.int64((count + uniforms[0]) * step) < rest_units:
        points[count] = np.int64((count + uniforms[0]) * step)
        count += 1
    return count


@inlined
def _write_estimates(drawn_ids, log_unit, are_counts, ids_K, logprobs_K, num_exact):
    """Write distinct ids after the exact entries, by falling count, then rising id. Gives how many.

    Their logprob is log_unit + log(count), or log_unit alone if a token has one point (rounding may give two where p is nearly
    tau).
    """
    keys = np.empty(len(drawn_ids), np.int64)
    count, i = 0, 0
    while i < len(drawn_ids):
        end = i + 1
        while end < len(drawn_ids) and drawn_ids[end] == drawn_ids[i]:
            end += 1
        keys[count] = ((np.int64(i - end) if are_counts else np.int64(-1)) << 32) | np.int64(drawn_ids[i])
        count, i = count + 1, end
    keys = np.sort(keys[:count])
    for j in range(count):
        ids_K[num_exact + j] = keys[j] & 0xFFFFFFFF
        logprobs_K[num_exact + j] = log_unit + math.log(-(keys[j] >> 32))
    return count


@compiled()
def draw_positions(bits_CV, known, settings, found, version=_VERSION):  # noqa: ARG001 - see `kdcache.compiled`
    """Fill in what a selection has besides its exact entries, each position on its own.

    Args:
        bits_CV: bits of bfloat16 or float32.
        known: (C,) float32 maxima; (C,) the logits that weights are relative to, which are the
            maxima or the largest that can be drawn; (C,) float64 logs of the sum of exp; (C,
            num_draws) uniforms, rising along a position, none to draw nothing.
        settings: tau and p, 0 if it is known how many entries are exact; whether draws share the mass of the rest instead of 1;
            whether the first scalar is the tail mass; whether the next is the entropy; float64 1 / temperature of each further
            one.
        found: (C, K) ids and logprobs, of which the first counts_C2[c, 0] are there, perhaps not all of them exact; (C, 2)
            counts; (C, scalars).
    """
    tops_C, references_C, log_z_C, uniforms = known
    tau, p, shares_rest, keeps_tail, keeps_entropy, inverse_temperatures = settings
    ids_CK, logprobs_CK, counts_C2, scalars = found
    last, weights = np.empty(BLOCK, bits_CV.dtype), np.empty(STRIP, np.float32)
    num_tokens, num_draws = bits_CV.shape[1], uniforms.shape[1]
    strip_sums = np.empty(-(-num_tokens // BLOCK) * (BLOCK // STRIP), np.float32)
    most = ids_CK.shape[1] if tau > 0 else num_draws
    points, drawn_ids = np.empty(most, np.int64), np.empty(most, np.int64)
    sums = np.empty(1 + len(inverse_temperatures) if keeps_entropy or len(inverse_temperatures) else 0, np.float64)
    inverse_floats, wants_strips = inverse_temperatures.astype(np.float32), keeps_tail or num_draws > 0
    for c in range(len(bits_CV)):
        above, num_exact = np.float64(tops_C[c]) - log_z_C[c], counts_C2[c, 0]
        is_sound, step = above == above, 0.0
        sums[:] = 0.0
        logits = (bits_CV[c], last, references_C[c])
        fill_last(bits_CV[c], last)
        _weigh(logits, tops_C[c], inverse_floats, wants_strips, strip_sums, sums)
        if is_sound and (tau > 0 or p > 0):
            total_units = _sums(strip_sums)[1]
            num_exact, step = (
                _count_exact(logits, ids_CK[c], num_exact, total_units, tau, p),
                tau * np.float64(total_units),
            )
        counts_C2[c] = num_exact
        exact_ids = np.full(num_exact + 1, num_tokens, np.int64)
        exact_ids[:num_exact] = ids_CK[c, :num_exact]
        exact_ids.sort()
        if wants_strips:
            _leave_out(logits, exact_ids, weights, strip_sums)
        can_draw = is_sound and references_C[c] - tops_C[c] > MIN_LOGPROB
        rest, rest_units = _sums(strip_sums) if wants_strips and can_draw else (0.0, np.int64(0))
        rest *= math.exp(np.float64(references_C[c]) - log_z_C[c])
        column = 0
        if keeps_tail:
            # Without exact entries the tail is everything. NaN stays NaN.
            scalars[c, 0] = rest if num_exact > 0 or tau > 0 else 1.0 + 0.0 * above
            column = 1
        if keeps_entropy:
            scalars[c, column] = -math.exp(above) * sums[0] - above
            column += 1
        for i in range(len(inverse_temperatures)):
            scalars[c, column + i] = math.log(sums[1 + i]) + above * inverse_temperatures[i]
        if num_draws and can_draw and rest_units > 0:
            room = points if tau == 0.0 else points[: ids_CK.shape[1] - num_exact]
            num_points = _points(rest_units, step, uniforms[c], room)
            num_points = _find(logits, exact_ids, room[:num_points], weights, strip_sums, drawn_ids)
            log_unit = math.log(tau) if tau > 0 else math.log((rest if shares_rest else 1.0) / num_draws)
            drawn, out = drawn_ids[:num_points], (ids_CK[c], logprobs_CK[c])
            num_estimates = _write_estimates(drawn, log_unit, tau == 0.0, out[0], out[1], num_exact)
            counts_C2[c, 1] = num_exact + num_estimates
