"""`_topk_torch.select_top_k` on a CPU, in one pass over a row: about 0.6 ns per logit and core; ties go to the smaller id.

A row is read once, in blocks that stay in the core's first cache: as float32, for a running maximum and sum of exp (Milakov and
Gimelshein, arXiv 1805.02867), and as integers of the same order, for the maxima of small groups of tokens. The k-th largest of
coarser maxima is a bound that at least k tokens reach, so only groups whose maximum reaches it are looked at again.

Keys: int32 in the order of the logits (a float32's bits, the lower 31 inverted where it is negative). Key and token id make one
int64 that orders by logit, then by falling id. A NaN may or may not be selected, but makes every logprob of its row NaN.

Shape letters: C positions of a chunk, V vocabulary, K entries per position, G groups of a row, L lanes (groups of a block),
W tokens of a group: group l of a block holds its tokens l, l + L, l + 2L, ...
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.teacher._numba_compile import REASSOCIATE, kernel

BLOCK = 4096
"""Logits handled at once: the scratch arrays of a block take 48 KiB."""

MAX_WIDTH = 32
"""Tokens of a group, unless that leaves fewer than GROUPS_PER_ENTRY groups per entry."""

GROUPS_PER_ENTRY = 4
"""The bound is taken from this many maxima per entry: with 4, some 1.15 k tokens reach it in a row without structure."""

_LOWEST_KEY = -(2**31)


@kernel()
def _key(bits):
    """Of a float32's bits; its own inverse. Each step is cut to 32 bits: numba's integer arithmetic is in 64."""
    return np.int32(bits ^ (np.int32(bits >> 31) & np.int32(0x7FFFFFFF)))


@kernel()
def _float_bits(bits, shift):
    return np.int32(np.int32(bits) << shift)


@kernel()
def _load_block(bits, shift, out, keys):
    """Float32 bits and keys of up to BLOCK logits; `shift` is 16 for bfloat16 bits. What is past the end has the lowest key."""
    for j in range(len(bits)):
        value = _float_bits(bits[j], shift)
        out[j] = value
        keys[j] = _key(value)
    for j in range(len(bits), len(keys)):
        keys[j] = _LOWEST_KEY


@kernel()
def _strip_maxima(keys, out):
    """out[l] = max over w of keys[w * L + l]: elementwise over contiguous strips, so LLVM vectorises it for any width."""
    num_lanes = len(out)
    for j in range(num_lanes):
        out[j] = keys[j]
    for w in range(1, len(keys) // num_lanes):
        strip = keys[w * num_lanes : (w + 1) * num_lanes]
        for j in range(num_lanes):
            out[j] = max(out[j], strip[j])


@kernel({"contract"})
def _exp_in_place(x, powers, top):
    """x * the float32 that `powers` are the bits of = exp(x - top), for x <= top, within 1e-6; NaN for NaN; at least 1e-38.

    2^n * 2^f with n + f = (x - top) / ln 2; coefficients of the Cephes library's exp2f. Nothing but elementwise arithmetic,
    fused where it can be, which LLVM vectorises; math.exp would be a call per element.
    """
    lowest = np.float32(-87.0)
    for j in range(len(x)):
        d = x[j] - top
        # In this order NaN stays NaN.
        y = (lowest if d < lowest else d) * np.float32(1.44269504)
        n = np.floor(y + np.float32(0.5))
        f = y - n
        p = np.float32(1.535336188319500e-4) * f + np.float32(1.339887440266574e-3)
        p = p * f + np.float32(9.618437357674640e-3)
        p = p * f + np.float32(5.550332471162809e-2)
        p = p * f + np.float32(2.402264791363012e-1)
        p = p * f + np.float32(6.931472028550421e-1)
        x[j] = p * f + np.float32(1.0)
        powers[j] = np.int32(np.int32(n) + 127) << 23


@kernel(REASSOCIATE)
def _dot(x, y):
    total = np.float32(0.0)
    for j in range(len(x)):
        total += x[j] * y[j]
    return total


@kernel()
def _float_of(key, word_i, word_f):
    word_i[0] = _key(key)
    return word_f[0]


@kernel()
def _read_row(bits_V, shift, maxima_G, num_lanes, scratch):
    """Fill the groups' maxima; the row's maximum and log of the sum of exp."""
    bits, floats, powers, power_floats, keys = scratch
    top, total = -np.inf, 0.0
    for start in range(0, len(bits_V), BLOCK):
        stop = min(start + BLOCK, len(bits_V))
        size = stop - start
        _load_block(bits_V[start:stop], shift, bits, keys)
        first = start // BLOCK * num_lanes
        maxima = maxima_G[first : first + num_lanes]
        _strip_maxima(keys, maxima)
        highest = np.int32(_LOWEST_KEY)
        for j in range(num_lanes):
            highest = max(highest, maxima[j])
        powers[0] = _key(highest)
        block_top = np.float64(power_floats[0])
        # A NaN fails both comparisons; it comes to light in the sum.
        if block_top > top:
            total *= math.exp(top - block_top)
            top = block_top
        _exp_in_place(floats[:size], powers[:size], np.float32(top) if top > -np.inf else np.float32(0.0))
        total += _dot(floats[:size], power_floats[:size])
    # All -inf, or NaN: no distribution.
    return top + math.log(total) if top > -np.inf else np.nan


@kernel()
def _bound(maxima_G, k):
    """A key that at least k tokens reach: the k-th largest of some GROUPS_PER_ENTRY * k maxima of maxima; else the lowest."""
    num_coarse = len(maxima_G) // max(1, len(maxima_G) // (GROUPS_PER_ENTRY * k))
    if num_coarse < k:
        return np.int32(_LOWEST_KEY)
    coarse = np.empty(num_coarse, np.int32)
    _strip_maxima(maxima_G[: len(maxima_G) // num_coarse * num_coarse], coarse)
    return np.partition(coarse, num_coarse - k)[num_coarse - k]


@kernel()
def _collect(bits_V, shift, maxima_G, num_lanes, bound, out):
    """Write key and id of each token whose key reaches the bound; how many."""
    count = 0
    for g in range(len(maxima_G)):
        if maxima_G[g] >= bound:
            start = g // num_lanes * BLOCK
            for j in range(start + g % num_lanes, min(start + BLOCK, len(bits_V)), num_lanes):
                key = _key(_float_bits(bits_V[j], shift))
                if key >= bound:
                    out[count] = (np.int64(key) << 32) | np.int64(0xFFFFFFFF - j)
                    count += 1
    return count


@kernel()
def _select_rows(bits_CV, shift, targets_C, num_lanes, found):
    """See `select_top_k`; every row on its own."""
    ids_CK, logprobs_CK, target_logprobs_C, log_z_C = found
    k, num_tokens = ids_CK.shape[1], bits_CV.shape[1]
    bits, powers, keys = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
    scratch = (bits, bits.view(np.float32), powers, powers.view(np.float32), keys)
    maxima_G = np.empty(-(-num_tokens // BLOCK) * num_lanes, np.int32)
    candidates = np.empty(num_tokens, np.int64)
    word_i = np.empty(1, np.int32)
    word_f = word_i.view(np.float32)
    for row in range(len(bits_CV)):
        bits_V = bits_CV[row]
        log_z = _read_row(bits_V, shift, maxima_G, num_lanes, scratch)
        log_z_C[row] = log_z
        count = _collect(bits_V, shift, maxima_G, num_lanes, _bound(maxima_G, k), candidates)
        chosen = candidates[:count]
        if count > 2 * k:
            chosen = np.partition(chosen, count - k)[count - k :]
        chosen = np.sort(chosen)
        for j in range(k):
            entry = chosen[len(chosen) - 1 - j]
            ids_CK[row, j] = 0xFFFFFFFF - (entry & 0xFFFFFFFF)
            logprobs_CK[row, j] = _float_of(np.int32(entry >> 32), word_i, word_f) - log_z
        word_i[0] = _float_bits(bits_V[max(0, targets_C[row])], shift)
        target_logprobs_C[row] = word_f[0] - log_z


_pool: ThreadPoolExecutor | None = None


def select_top_k(
    bits_CV: NDArray[Any], targets_C: NDArray[np.int64], k: int, *, num_threads: int = 1
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Ids, logprobs and target logprobs, as `_topk_torch.Selected`; and the log of the sum of exp of each row.

    Args:
        bits_CV: bfloat16 logits as uint16, or float32 logits as int32. NaNs of any sign.
        targets_C: int64; negative where there is no target.
        k: from 1 to V.
        num_threads: how many parts the rows are cut into.

    Raises:
        ValueError: k or a target is not of this vocabulary; the loops do not look.
    """
    num_rows, num_tokens = bits_CV.shape
    if not 1 <= k <= num_tokens or targets_C.max(initial=0) >= num_tokens:
        raise ValueError(f"k = {k} or target {targets_C.max(initial=0)} is outside a row of {num_tokens} logits")
    ids_CK, logprobs_CK = np.empty((num_rows, k), np.int32), np.empty((num_rows, k), np.float32)
    found = (ids_CK, logprobs_CK, np.empty(num_rows, np.float32), np.empty(num_rows, np.float64))
    shift, num_lanes = shift_of(bits_CV), BLOCK // group_width(num_tokens, k)

    def work(rows: slice) -> None:
        _select_rows(bits_CV[rows], shift, targets_C[rows], num_lanes, tuple(array[rows] for array in found))

    in_parts(work, num_rows, num_threads)
    return found


def shift_of(bits_CV: NDArray[Any]) -> int:
    """By how much bits are shifted to be float32's: 16 for bfloat16."""
    return 16 if bits_CV.dtype.itemsize == 2 else 0


def in_parts(work: Callable[[slice], None], num_rows: int, num_threads: int) -> None:
    """Call work for slices that together are all rows, in threads of a pool where there are several of both."""
    size = max(1, -(-num_rows // num_threads))
    parts = [slice(start, start + size) for start in range(0, num_rows, size)]
    if num_threads > 1 and num_rows > 1:
        list(_get_pool(num_threads).map(work, parts))
    else:
        list(map(work, parts))


def group_width(num_tokens: int, k: int) -> int:
    """W: a power of two from 1 to MAX_WIDTH, so that there are GROUPS_PER_ENTRY groups per entry where the row has as many."""
    widest = max(1, num_tokens // (GROUPS_PER_ENTRY * k))
    return min(MAX_WIDTH, 1 << (widest.bit_length() - 1))


def _get_pool(num_threads: int) -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=max(num_threads, 8), thread_name_prefix="kdcache-top-k")
    return _pool
