"""`_torch_topk.select_top_k` on a CPU, in one pass over a row; ties go to the smaller id.

A row is read in blocks that stay in the core's first cache: for the maxima of small groups of tokens, then for a sum of exp
relative to the running maximum (Milakov and Gimelshein, arXiv 1805.02867). The k-th largest of coarser maxima, or one a little
below it, is a bound that at least k tokens reach; what reaches it is collected from the blocks whose maximum does, and sorted.
`benchmarks/capture.py --kernel` says what that takes per logit.

Keys are those of `_numba_vectors`. A NaN may or may not be selected, but makes every logprob of its row NaN.

Shape letters: C positions of a chunk, V vocabulary, K entries per position, G groups of a row, L lanes (groups of a block),
W tokens of a group (group l of a block holds its tokens l, l + L, l + 2L, ...), N tokens that reach the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.compiled import compiled, inlined, version_of
from kdcache.teacher.select import _numba_blocks, _numba_vectors, exact_weights
from kdcache.teacher.select._numba_blocks import (
    BLOCK,
    FEWEST_LANES,
    MINUS_INF,
    block_of,
    collect,
    fill_last,
    find_bound,
    find_maxima,
    logit_of,
    sum_exp,
)

GROUPS_PER_ENTRY, FEWEST_GROUPS = 4, 64
"""The bound is taken from this many maxima per entry: with 4, some 1.15 k tokens reach it in a row without structure."""

MOST_MOVES = 16
"""Per candidate, behind the buckets; where more would be needed, all are sorted."""

_VERSION = version_of(_numba_blocks, _numba_vectors, exact_weights)


@inlined
def _key(bits):
    """Of a float32's bits; its own inverse. Each step is cut to 32 bits: numba's integer arithmetic is in 64."""
    return np.int32(bits ^ (np.int32(bits >> 31) & np.int32(0x7FFFFFFF)))


@inlined
def _float_of(key, like):
    """The logit of a key of elements like this one; bfloat16's keys are of its own 16 bits."""
    if like.itemsize == 2:
        return logit_of(np.uint16(key ^ (np.int32(key >> 31) & np.int32(0x7FFF))))
    return logit_of(_key(key))


@inlined
def _strip_maxima(keys, out):
    """out[l] = max over w of keys[w * L + l]: elementwise over contiguous strips, so LLVM vectorises it for any width."""
    num_lanes = len(out)
    for j in range(num_lanes):
        out[j] = keys[j]
    for w in range(1, len(keys) // num_lanes):
        strip = keys[w * num_lanes : (w + 1) * num_lanes]
        for j in range(num_lanes):
            out[j] = max(out[j], strip[j])


@inlined
def _lowest_key(like):
    return np.int32(-(1 << (8 * like.itemsize - 1)))


@inlined
def _read_row(bits_V, last, maxima_BL, tops_B):
    """Fill the groups' maxima and the blocks'; the row's maximum, and its log of the sum of exp."""
    top, total = -np.inf, 0.0
    for b in range(len(tops_B)):
        block, maxima_L = block_of(bits_V, b * BLOCK, last), maxima_BL[b]
        find_maxima(block, maxima_L)
        highest = _lowest_key(bits_V)
        for j in range(len(maxima_L)):
            highest = max(highest, maxima_L[j])
        tops_B[b] = highest
        block_top = np.float64(_float_of(highest, bits_V))
        # A NaN fails both comparisons; it comes to light in the sum.
        if block_top > top:
            total *= math.exp(top - block_top)
            top = block_top
        total += sum_exp(block, np.float32(top) if top > -np.inf else np.float32(0.0), np.float32(1.0))
    # All -inf, or NaN: no distribution.
    return top, top + math.log(total) if top > -np.inf else np.nan


@inlined
def _num_groups(k):
    return max(FEWEST_GROUPS, GROUPS_PER_ENTRY * k)


@inlined
def _bound(maxima_G, k, like, coarse):
    """A key that at least k tokens reach, taken from some `_num_groups` maxima of maxima; else the lowest."""
    num_coarse = len(maxima_G) // max(1, len(maxima_G) // _num_groups(k)) // 16 * 16
    if num_coarse < k:
        return _lowest_key(like)
    _strip_maxima(maxima_G[: len(maxima_G) // num_coarse * num_coarse], coarse[:num_coarse])
    # The last block is filled up with -inf, and a NaN may be below that.
    minus_inf = np.int32(_key(MINUS_INF) >> (32 - 8 * like.itemsize))
    bound = find_bound(coarse[:num_coarse], k, minus_inf)
    return bound if bound > minus_inf else _lowest_key(like)


@inlined
def _order_by_buckets(logits_N, ids_N, interval, room, out):
    """Sort logits of an interval (lowest, highest), and their ids, which rise, by falling logit.

    False, and nothing is sorted, where buckets do not help.
    """
    buckets_N, ends_N = room
    out_logits_N, out_ids_N = out
    lowest, highest = interval
    if not highest - lowest < np.float32(1e30):  # infinite, or NaN
        return False
    last = np.float32(len(logits_N) - 1)
    scale = last / max(highest - lowest, np.float32(1e-30))
    for n in range(len(logits_N)):
        buckets_N[n] = np.int32(min((highest - logits_N[n]) * scale, last))
    ends_N[:] = 0
    for n in range(len(logits_N)):
        ends_N[buckets_N[n]] += 1
    end = 0
    for d in range(len(ends_N)):
        ends_N[d], end = end, end + ends_N[d]
    for n in range(len(logits_N)):
        place = ends_N[buckets_N[n]]
        ends_N[buckets_N[n]] = place + 1
        out_logits_N[place], out_ids_N[place] = logits_N[n], ids_N[n]
    num_moves = 0
    for n in range(1, len(logits_N)):
        logit, token_id, place = out_logits_N[n], out_ids_N[n], n
        # Equal ones stay in the order of their ids.
        while place > 0 and out_logits_N[place - 1] < logit:
            out_logits_N[place], out_ids_N[place] = out_logits_N[place - 1], out_ids_N[place - 1]
            place -= 1
        out_logits_N[place], out_ids_N[place] = logit, token_id
        num_moves += n - place
        if num_moves > MOST_MOVES * len(logits_N):
            return False
    return True


@compiled()
def _order_by_keys(logits_N, ids_N, k, out):
    """The k first of any logits and their ids."""
    words_N, out_logits_N, out_ids_N = logits_N.view(np.int32), out[0], out[1]
    entries_N = np.empty(len(ids_N), np.int64)
    for n in range(len(ids_N)):
        # Orders by key, then by falling id.
        entries_N[n] = (np.int64(_key(words_N[n])) << 32) | (0xFFFFFFFF - np.int64(ids_N[n]))
    entries_N = np.sort(entries_N)
    out_words_N = out_logits_N.view(np.int32)
    for j in range(k):
        entry = entries_N[len(entries_N) - 1 - j]
        out_ids_N[j] = 0xFFFFFFFF - (entry & 0xFFFFFFFF)
        out_words_N[j] = _key(np.int32(entry >> 32))


@compiled()
def _select_rows(bits_CV, targets_C, num_lanes, found, version=_VERSION):  # noqa: ARG001 - see `kdcache.compiled`
    """See `select_top_k`; every row on its own."""
    ids_CK, logprobs_CK, target_logprobs_C, log_z_C = found
    num_tokens, k, like = bits_CV.shape[1], ids_CK.shape[1], bits_CV[:0, 0]
    tops_B = np.empty(-(-num_tokens // BLOCK), np.int32)
    maxima_BL = np.empty((len(tops_B), num_lanes), np.int32)
    coarse = np.empty(min(maxima_BL.size, 2 * _num_groups(k)), np.int32)
    last = np.empty(BLOCK, bits_CV.dtype)
    logits_N, ids_N = np.empty(num_tokens, np.float32), np.empty(num_tokens, np.int32)
    buckets_N, ends_N = np.empty(num_tokens, np.int32), np.empty(num_tokens, np.int32)
    ordered = (np.empty(num_tokens, np.float32), np.empty(num_tokens, np.int32))
    for row in range(len(bits_CV)):
        bits_V = bits_CV[row]
        fill_last(bits_V, last)
        top, log_z = _read_row(bits_V, last, maxima_BL, tops_B)
        bound = _bound(maxima_BL.reshape(-1), k, like, coarse)
        count = 0
        for b in range(len(tops_B)):
            if tops_B[b] >= bound:
                start = b * BLOCK
                length = min(BLOCK, num_tokens - start)
                count = collect(block_of(bits_V, start, last), start, length, bound, logits_N, ids_N, count)
        interval = (_float_of(bound, like), np.float32(top))
        room = (buckets_N[:count], ends_N[:count])
        # Without a distribution there may be NaN among the logits.
        if log_z != log_z or not _order_by_buckets(logits_N[:count], ids_N[:count], interval, room, ordered):
            _order_by_keys(logits_N[:count], ids_N[:count], k, ordered)
        ids_CK[row] = ordered[1][:k]
        for j in range(k):
            logprobs_CK[row, j] = ordered[0][j] - log_z
        log_z_C[row] = log_z
        target_logprobs_C[row] = logit_of(bits_V[max(0, targets_C[row])]) - log_z


_pool: ThreadPoolExecutor | None = None


def select_top_k(
    bits_CV: NDArray[Any], targets_C: NDArray[np.int64], k: int, *, num_threads: int = 1
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Ids, logprobs and target logprobs, as `found.Selected`; and the log of the sum of exp of each row.

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
    num_lanes = lanes_of(num_tokens, k)

    def work(rows: slice) -> None:
        _select_rows(bits_CV[rows], targets_C[rows], num_lanes, tuple(array[rows] for array in found))

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


def lanes_of(num_tokens: int, k: int) -> int:
    """L: a power of two, so that there are GROUPS_PER_ENTRY groups per entry where the row has as many tokens."""
    per_block = -(-GROUPS_PER_ENTRY * k // -(-num_tokens // BLOCK))
    return min(BLOCK, max(FEWEST_LANES, 1 << (per_block - 1).bit_length()))


def _get_pool(num_threads: int) -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=max(num_threads, 8), thread_name_prefix="kdcache-top-k")
    return _pool
