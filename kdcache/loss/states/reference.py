"""The definitions: losses on inner states in plain NumPy, float64. Slow; every fast function is compared with these.

Sources: cosine, DistilBERT (arXiv 1910.01108); normalised MSE, Patient KD (1908.09355); relative MSE, ALM (2503.20083);
relations, MiniLMv2 (2012.15828); attention, attention transfer (1612.03928) and TinyBERT (1909.10351); RKD (1904.05068);
CRD (1910.10699). Where a paper leaves a choice, the authors' published code decides, which the tests compare with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


def mse(student_FH: Floats, teacher_FH: Floats) -> Floats:
    """(F,) the mean over the elements of a vector of (s - t)^2."""
    return ((student_FH - teacher_FH) ** 2).mean(axis=1)


def relative_mse(student_FH: Floats, teacher_FH: Floats) -> Floats:
    """(F,) the sum of (s - t)^2 over the sum of t^2: what share of the teacher's vector is missed."""
    return ((student_FH - teacher_FH) ** 2).sum(axis=1) / (teacher_FH**2).sum(axis=1)


def normalized_mse(student_FH: Floats, teacher_FH: Floats) -> Floats:
    """(F,) the sum of (s/|s| - t/|t|)^2, from 0 to 4."""
    student_FH = student_FH / np.linalg.norm(student_FH, axis=1, keepdims=True)
    teacher_FH = teacher_FH / np.linalg.norm(teacher_FH, axis=1, keepdims=True)
    return ((student_FH - teacher_FH) ** 2).sum(axis=1)


def cosine(student_FH: Floats, teacher_FH: Floats) -> Floats:
    """(F,) 1 - cos(s, t), from 0 to 2."""
    products = (student_FH * teacher_FH).sum(axis=1)
    return 1 - products / np.linalg.norm(student_FH, axis=1) / np.linalg.norm(teacher_FH, axis=1)


def relations(left_NH: Floats, right_NH: Floats, num_heads: int) -> Floats:
    """(heads, N, N) softmax over keys 0..query of left . right / sqrt(width), for each relation head; 0 at later keys.

    All heads of a token are one vector, which is cut into `num_heads` new ones: `width` is H / num_heads.
    """
    num_tokens, width = len(left_NH), left_NH.shape[1] // num_heads
    found = np.zeros((num_heads, num_tokens, num_tokens))
    for head in range(num_heads):
        columns = slice(head * width, (head + 1) * width)
        for query in range(num_tokens):
            scores = right_NH[: query + 1, columns] @ left_NH[query, columns] / np.sqrt(width)
            masses = np.exp(scores - scores.max())
            found[head, query, : query + 1] = masses / masses.sum()
    return found


def relation_kl(teacher: Floats, student: Floats) -> Floats:
    """(N,) KL(teacher, student) of two (heads, N, N) relations at each query, the mean over heads."""
    terms = np.where(teacher > 0, teacher * np.log(np.where(teacher > 0, teacher, 1) / np.where(teacher > 0, student, 1)), 0)
    return terms.sum(axis=2).mean(axis=0)


def attention(query: Floats, key: Floats, scale: float) -> Floats:
    """(heads, N, N) softmax over keys 0..query; 0 at later keys.

    Args:
        query: (heads, N, width).
        key: (key heads, N, width); each serves heads / key heads heads of queries.
        scale: multiplies the products.
    """
    num_heads, num_tokens, _ = query.shape
    group, found = num_heads // len(key), np.zeros((num_heads, num_tokens, num_tokens))
    for head in range(num_heads):
        for token in range(num_tokens):
            scores = key[head // group, : token + 1] @ query[head, token] * scale
            masses = np.exp(scores - scores.max())
            found[head, token, : token + 1] = masses / masses.sum()
    return found


def _top_and_tail(kept: Floats, whole: Floats, keys: NDArray[np.integer[Any]]) -> tuple[Floats, Floats]:
    """Masses of the kept keys and of all others together, of a teacher (summing to 1) and of a student."""
    teacher = np.append(kept, max(1 - kept.sum(), 0) if len(keys) < np.count_nonzero(whole) else 0)
    return teacher / teacher.sum(), np.append(whole[keys], np.delete(whole, keys).sum())


def attention_kl(kept: Floats, whole: Floats, keys: NDArray[np.integer[Any]]) -> float:
    """KL of one head at one query: over the teacher's top keys, and one bucket of all the others.

    Args:
        kept: the teacher's attention at `keys`, positive; its rest is 1 minus their sum, where there are further keys.
        whole: (N,) the student's attention to every key.
        keys: distinct.
    """
    teacher, student = _top_and_tail(kept, whole, keys)
    return float(sum(p * np.log(p / q) for p, q in zip(teacher, student, strict=True) if p > 0))


def attention_normalized_mse(kept: Floats, whole: Floats, keys: NDArray[np.integer[Any]]) -> float:
    """|s/|s| - t/|t||^2 of one head at one query: over the teacher's top keys, and one bucket; arguments as `attention_kl`."""
    teacher, student = _top_and_tail(kept, whole, keys)
    return float(((student / np.linalg.norm(student) - teacher / np.linalg.norm(teacher)) ** 2).sum())


def smooth_l1(difference: Floats) -> Floats:
    """x^2 / 2 up to 1, |x| - 1/2 beyond."""
    size = np.abs(difference)
    return np.where(size < 1, size**2 / 2, size - 0.5)


def rkd_distance(student_SH: Floats, teacher_SH: Floats) -> float:
    """The mean over all pairs, a vector with itself too, of smooth-L1 of distances, each side's over its mean positive one."""
    return float(smooth_l1(_relative_distances(student_SH) - _relative_distances(teacher_SH)).mean())


def _relative_distances(vectors_SH: Floats) -> Floats:
    distances_SS = np.linalg.norm(vectors_SH[:, None] - vectors_SH[None], axis=2)
    return distances_SS / distances_SS[distances_SS > 0].mean() if distances_SS.any() else distances_SS


def rkd_angle(student_SH: Floats, teacher_SH: Floats) -> float:
    """The mean over all triplets of smooth-L1 of the cosine of the angle at the first of the three; 0 where two are equal."""
    return float(smooth_l1(_angles(student_SH) - _angles(teacher_SH)).mean())


def _angles(vectors_SH: Floats) -> Floats:
    differences = vectors_SH[None] - vectors_SH[:, None]
    norms = np.linalg.norm(differences, axis=2, keepdims=True)
    units = differences / np.where(norms > 0, norms, 1)
    return np.einsum("ijh,ikh->ijk", units, units)


def nce(positive_S: Floats, negatives: Floats, num_sequences: int, eps: float = 1e-7) -> Floats:
    """(S,) -log of P/(P + m/n) for the positive, and of (m/n)/(P + m/n) for each of the m negatives.

    Args:
        positive_S, negatives: (S,) and (S, m) exp(similarity / temperature) over the normalising constant: the model's P.
        num_sequences: n, of the bank that the negatives are drawn from.
        eps: added to both denominators.
    """
    noise = negatives.shape[1] / num_sequences
    found_S = -np.log(positive_S / (positive_S + noise + eps))
    return found_S - np.log(noise / (negatives + noise + eps)).sum(axis=1)
