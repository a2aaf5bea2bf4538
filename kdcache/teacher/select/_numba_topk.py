"""`_torch_topk.select_top_k` on a CPU, in one pass over a position's logits; ties go to the smaller id.

The logits are read in blocks that stay in the core's first-level cache: once for the maxima of
small groups of tokens, once for a sum of exp relative to the running maximum (Milakov and
Gimelshein, arXiv 1805.02867). The k-th largest of coarser maxima, or one a little below it, is a
bound that at least k tokens reach. The tokens that reach it are collected from the blocks whose
maximum does, and sorted. `benchmarks/capture.py --kernel` measures the time per logit.

A block has as many lanes as groups: lane l of L holds its tokens l, l + L, l + 2L, ... Keys are
those of `_numba_vectors`. A NaN may or may not be selected, but makes every logprob of its position
NaN.
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
"""The bound is taken from this many maxima per entry. With 4, about 1.15 k of unstructured logits reach it."""

MOST_MOVES = 16
"""Moves per candidate after the buckets; where more would be needed, all candidates are sorted."""

_VERSION = version_of(_numba_blocks, _numba_vectors, exact_weights)


@inlined
def _key(bits):
    """The key of a float32's bits; its own inverse. Each step is cut to 32 bits, as numba computes in 64."""
    return np.int32(bits ^ (np.int32(bits >> 31) & np.int32(0x7FFFFFFF)))


@inlined
def _float_of(key, like):
    """The logit of a key. `like` has the dtype of the bits: the keys of bfloat16 have 16 bits."""
    if like.itemsize == 2:
        return logit_of(np.uint16(key ^ (np.int32(key >> 31) & np.int32(0x7FFF))))
    return logit_of(_key(key))


@inlined
def _strip_maxima(keys, out):
    """out[l] = max over w of keys[w * len(out) + l]: elementwise over contiguous strips, which LLVM vectorises at any width."""
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
def _read_logits(bits_V, last, maxima, block_tops):
    """Fill the maxima of groups and blocks. Gives the maximum of all, and the log of the sum of exp."""
    top, total = -np.inf, 0.0
    for b in range(len(block_tops)):
        block, block_maxima = block_of(bits_V, b * BLOCK, last), maxima[b]
        find_maxima(block, block_maxima)
        highest = _lowest_key(bits_V)
        for j in range(len(block_maxima)):
            highest = max(highest, block_maxima[j])
        block_tops[b] = highest
        block_top = np.float64(_float_of(highest, bits_V))
        # A NaN fails both comparisons; it shows in the sum.
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
def _bound(maxima, k, like, coarse):
    """A key that at least k tokens reach, from about `_num_groups` maxima of maxima; else the lowest key."""
    num_coarse = len(maxima) // max(1, len(maxima) // _num_groups(k)) // 16 * 16
    if num_coarse < k:
        return _lowest_key(like)
    _strip_maxima(maxima[: len(maxima) // num_coarse * num_coarse], coarse[:num_coarse])
    # The last block is padded with -inf, and a NaN may be below that.
    minus_inf = np.int32(_key(MINUS_INF) >> (32 - 8 * like.itemsize))
    bound = find_bound(coarse[:num_coarse], k, minus_inf)
    return bound if bound > minus_inf else _lowest_key(like)


@inlined
def _order_by_buckets(logits, ids, interval, room, out):
    """Sort logits in an interval (lowest, highest), and their rising ids, by falling logit.

    Gives False, with nothing sorted, where buckets do not help.
    """
    buckets, ends = room
    out_logits, out_ids = out
    lowest, highest = interval
    if not highest - lowest < np.float32(1e30):  # infinite, or NaN
        return False
    last = np.float32(len(logits) - 1)
    scale = last / max(highest - lowest, np.float32(1e-30))
    for n in range(len(logits)):
        buckets[n] = np.int32(min((highest - logits[n]) * scale, last))
    ends[:] = 0
    for n in range(len(logits)):
        ends[buckets[n]] += 1
    end = 0
    for d in range(len(ends)):
        ends[d], end = end, end + ends[d]
    for n in range(len(logits)):
        rank = ends[buckets[n]]
        ends[buckets[n]] = rank + 1
        out_logits[rank], out_ids[rank] = logits[n], ids[n]
    num_moves = 0
    for n in range(1, len(logits)):
        logit, token_id, rank = out_logits[n], out_ids[n], n
        # Equal logits stay in the order of their ids.
        while rank > 0 and out_logits[rank - 1] < logit:
            out_logits[rank], out_ids[rank] = out_logits[rank - 1], out_ids[rank - 1]
            rank -= 1
        out_logits[rank], out_ids[rank] = logit, token_id
        num_moves += n - rank
        if num_moves > MOST_MOVES * len(logits):
            return False
    return True


@compiled()
def _order_by_keys(logits, ids, k, out):
    """The first k of any logits, and their ids."""
    words, out_logits, out_ids = logits.view(np.int32), out[0], out[1]
    entries = np.empty(len(ids), np.int64)
    for n in range(len(ids)):
        # This orders by key, then by falling id.
        entries[n] = (np.int64(_key(words[n])) << 32) | (0xFFFFFFFF - np.int64(ids[n]))
    entries = np.sort(entries)
    out_words = out_logits.view(np.int32)
    for j in range(k):
        entry = entries[len(entries) - 1 - j]
        out_ids[j] = 0xFFFFFFFF - (entry & 0xFFFFFFFF)
        out_words[j] = _key(np.int32(entry >> 32))


@compiled()
def _select_positions(bits_CV, target_ids_C, num_lanes, found, version=_VERSION):  # noqa: ARG001 - see `kdcache.compiled`
    """See `select_top_k`; each position on its own."""
    ids_CK, logprobs_CK, target_logprobs_C, log_z_C = found
    num_tokens, k, like = bits_CV.shape[1], ids_CK.shape[1], bits_CV[:0, 0]
    block_tops = np.empty(-(-num_tokens // BLOCK), np.int32)
    maxima = np.empty((len(block_tops), num_lanes), np.int32)
    coarse = np.empty(min(maxima.size, 2 * _num_groups(k)), np.int32)
    last = np.empty(BLOCK, bits_CV.dtype)
    logits, ids = np.empty(num_tokens, np.float32), np.empty(num_tokens, np.int32)
    buckets, ends = np.empty(num_tokens, np.int32), np.empty(num_tokens, np.int32)
    ordered = (np.empty(num_tokens, np.float32), np.empty(num_tokens, np.int32))
    for c in range(len(bits_CV)):
        bits_V = bits_CV[c]
        fill_last(bits_V, last)
        top, log_z = _read_logits(bits_V, last, maxima, block_tops)
        bound = _bound(maxima.reshape(-1), k, like, coarse)
        count = 0
        for b in range(len(block_tops)):
            if block_tops[b] >= bound:
                start = b * BLOCK
                length = min(BLOCK, num_tokens - start)
                count = collect(block_of(bits_V, start, last), start, length, bound, logits, ids, count)
        interval = (_float_of(bound, like), np.float32(top))
        room = (buckets[:count], ends[:count])
        # Where there is no distribution, logits may be NaN.
        if log_z != log_z or not _order_by_buckets(logits[:count], ids[:count], interval, room, ordered):
            _order_by_keys(logits[:count], ids[:count], k, ordered)
        ids_CK[c] = ordered[1][:k]
        for j in range(k):
            logprobs_CK[c, j] = ordered[0][j] - log_z
        log_z_C[c] = log_z
        target_logprobs_C[c] = logit_of(bits_V[max(0, target_ids_C[c])]) - log_z


_pool: ThreadPoolExecutor | None = None


def select_top_k(
    bits_CV: NDArray[Any], target_ids_C: NDArray[np.int64], k: int, *, num_threads: int = 1
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Ids, logprobs and target logprobs, as in `found.Selected`, and the log of the sum of exp at each position.

    Args:
        bits_CV: bfloat16 logits as uint16, or float32 logits as int32; NaN may have any sign.
        target_ids_C: int64; negative where nothing follows.
        k: from 1 to V.
        num_threads: into how many parts the positions are cut.

    Raises:
        ValueError: k or a target id is outside this vocabulary; the loops do not check.
    """
    num_positions, num_tokens = bits_CV.shape
    if not 1 <= k <= num_tokens or target_ids_C.max(initial=0) >= num_tokens:
        raise ValueError(f"k = {k} or target {target_ids_C.max(initial=0)} is outside a vocabulary of {num_tokens} tokens")
    ids_CK, logprobs_CK = np.empty((num_positions, k), np.int32), np.empty((num_positions, k), np.float32)
    found = (ids_CK, logprobs_CK, np.empty(num_positions, np.float32), np.empty(num_positions, np.float64))
    num_lanes = lanes_of(num_tokens, k)

    def work(part: slice) -> None:
        _select_positions(bits_CV[part], target_ids_C[part], num_lanes, tuple(array[part] for array in found))

    in_parts(work, num_positions, num_threads)
    return found


def shift_of(bits_CV: NDArray[Any]) -> int:
    """How far to shift the bits to get a float32's: 16 for bfloat16."""
    return 16 if bits_CV.dtype.itemsize == 2 else 0


def in_parts(work: Callable[[slice], None], num_positions: int, num_threads: int) -> None:
    """Call `work` for slices that cover all positions, in threads of a pool where there are several of both."""
    size = max(1, -(-num_positions // num_threads))
    parts = [slice(start, start + size) for start in range(0, num_positions, size)]
    if num_threads > 1 and num_positions > 1:
        list(_get_pool(num_threads).map(work, parts))
    else:
        list(map(work, parts))


def lanes_of(num_tokens: int, k: int) -> int:
    """How many lanes a block has: a power of two that gives GROUPS_PER_ENTRY groups per entry, if
    there are that many tokens."""
    per_block = -(-GROUPS_PER_ENTRY * k // -(-num_tokens // BLOCK))
    return min(BLOCK, max(FEWEST_LANES, 1 << (per_block - 1).bit_length()))


def _get_pool(num_threads: int) -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=max(num_threads, 8), thread_name_prefix="kdcache-top-k")
    return _pool
