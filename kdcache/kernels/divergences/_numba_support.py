"""The divergences that compare logits on the support, for one position of the compiled kernels: as in `_numba`."""

from __future__ import annotations

import math

import numpy as np

from kdcache.compiled import inlined

LOG_P, P, LOG_Q, Q, H = range(5)


def centered_mse(x_7K1, _):
    count, mean, loss = 0, 0.0, 0.0
    x_7K1[H] = 0.0
    for b in range(x_7K1.shape[1] - 1):
        if x_7K1[LOG_P, b] > -np.inf:
            count += 1
            mean += x_7K1[LOG_Q, b] - x_7K1[LOG_P, b]
    for b in range(x_7K1.shape[1] - 1):
        if x_7K1[LOG_P, b] > -np.inf:
            gap = x_7K1[LOG_Q, b] - x_7K1[LOG_P, b] - mean / count
            loss += gap * gap / count
            x_7K1[H, b] = 2 * gap / count
    return loss


def hinge_ranking(x_7K1, options):
    num_pairs, loss, tail = 0, 0.0, x_7K1.shape[1] - 1
    x_7K1[H] = 0.0
    for i in range(tail):
        for j in range(tail):
            if x_7K1[LOG_P, i] > x_7K1[LOG_P, j] > -np.inf:
                num_pairs += 1
                short = options[0] - (x_7K1[LOG_Q, i] - x_7K1[LOG_Q, j])
                if not short <= 0:
                    loss += short
                    step = 1.0 if short > 0 else short
                    x_7K1[H, i] -= step
                    x_7K1[H, j] += step
    x_7K1[H] /= max(num_pairs, 1)
    return loss / max(num_pairs, 1)


def logistic_ranking(x_7K1, _):
    num_pairs, loss, tail = 0, 0.0, x_7K1.shape[1] - 1
    x_7K1[H] = 0.0
    for i in range(tail):
        for j in range(tail):
            if x_7K1[LOG_P, i] > x_7K1[LOG_P, j] > -np.inf:
                num_pairs += 1
                gap = x_7K1[LOG_Q, i] - x_7K1[LOG_Q, j]
                small = math.exp(-abs(gap))
                loss += math.log1p(small) - min(gap, 0.0)
                step = (small if gap > 0 else 1.0) / (1 + small)
                x_7K1[H, i] -= step
                x_7K1[H, j] += step
    x_7K1[H] /= max(num_pairs, 1)
    return loss / max(num_pairs, 1)


@inlined
def _soft_ranks(values_K, strength, ranks_K, pool_K):
    """Centred soft ranks, and for each the rank of its pool's first member; returns whether they differ at all."""
    num = len(values_K)
    order_K = np.argsort(-values_K, kind="mergesort")
    starts_K, sums_K = np.empty(num + 1, np.int64), np.empty(num)
    pools = 0
    for rank in range(num):
        starts_K[pools], sums_K[pools] = rank, values_K[order_K[rank]] / strength - (num - rank)
        pools += 1
        starts_K[pools] = rank + 1
        while pools > 1 and (
            sums_K[pools - 2] * (starts_K[pools] - starts_K[pools - 1])
            <= sums_K[pools - 1] * (starts_K[pools - 1] - starts_K[pools - 2])
        ):
            sums_K[pools - 2] += sums_K[pools - 1]
            pools -= 1
            starts_K[pools] = rank + 1
    for pool in range(pools):
        level = sums_K[pool] / (starts_K[pool + 1] - starts_K[pool])
        for rank in range(starts_K[pool], starts_K[pool + 1]):
            ranks_K[order_K[rank]] = values_K[order_K[rank]] / strength - level - (num + 1) / 2
            pool_K[order_K[rank]] = starts_K[pool]
    differ = False
    for k in range(num):
        differ |= values_K[k] != values_K[0]
    return differ


def soft_spearman(x_7K1, options):
    strength, tail, num = options[0], x_7K1.shape[1] - 1, 0
    x_7K1[H] = 0.0
    inside_K = np.empty(tail, np.int64)
    for b in range(tail):
        if x_7K1[LOG_P, b] > -np.inf:
            inside_K[num] = b
            num += 1
    inside_K = inside_K[:num]
    if num < 2:
        return 0.0
    p_K, q_K, teacher_K, ranks_K = np.empty(num), np.empty(num), np.empty(num), np.empty(num)
    pool_K, slope_K, pool_sums_K, pool_counts_K = np.empty(num, np.int64), np.empty(num), np.zeros(num), np.zeros(num)
    for k in range(num):
        p_K[k], q_K[k] = x_7K1[LOG_P, inside_K[k]], x_7K1[LOG_Q, inside_K[k]]
    if not _soft_ranks(p_K, strength, teacher_K, pool_K):
        return 0.0 * q_K.sum()
    if not _soft_ranks(q_K, strength, ranks_K, pool_K):
        return 1.0
    teacher_length, length = math.sqrt((teacher_K * teacher_K).sum()), math.sqrt((ranks_K * ranks_K).sum())
    correlation = (teacher_K * ranks_K).sum() / (teacher_length * length)
    for k in range(num):
        slope_K[k] = (correlation * ranks_K[k] / length - teacher_K[k] / teacher_length) / length
        pool_sums_K[pool_K[k]] += slope_K[k]
        pool_counts_K[pool_K[k]] += 1
    for k in range(num):
        x_7K1[H, inside_K[k]] = (slope_K[k] - pool_sums_K[pool_K[k]] / pool_counts_K[pool_K[k]]) / strength
    return 1 - correlation
