"""CRD: the student's vector of a sequence is nearer to the teacher's of the same one than to those of others (1910.10699).

Noise-contrastive estimation against a bank of all sequences: with a cache the teacher's bank is the cache itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdcache.loss.states.vectors import widened

EPS = 1e-7
"""Added to both denominators, as in the authors' code."""


def contrast(anchors_SH: Tensor, positives_SH: Tensor, negatives: Tensor, temperature: float = 0.07) -> Tensor:
    """(S, 1 + M) exp(similarity / temperature) of each anchor with its positive, then with the negatives that all share.

    Args:
        anchors_SH, positives_SH: one of each sequence, of length 1.
        negatives: (M, H) of length 1.
        temperature: what similarities are divided by.
    """
    anchors_SH, positives_SH, negatives = map(widened, (anchors_SH, positives_SH, negatives))
    positives_S1 = (anchors_SH * positives_SH).sum(dim=1, keepdim=True)
    return (torch.cat([positives_S1, anchors_SH @ negatives.T], dim=1) / temperature).exp()


def nce(scores: Tensor, normalizer: Tensor | float, num_sequences: int) -> Tensor:
    """(S,) the noise-contrastive loss of each anchor: -log of P/(P + m/n), and of (m/n)/(P + m/n) for the m negatives.

    Args:
        scores: (S, 1 + M) of `contrast`; P is a score over the normalizer.
        normalizer: n times a score's mean, fixed at the first batch.
        num_sequences: n, of the bank that the negatives were drawn from, with equal probabilities.
    """
    masses = widened(scores) / normalizer
    noise = (scores.shape[1] - 1) / num_sequences
    logs = (masses + noise + EPS).log()
    return logs[:, 0] - masses[:, 0].log() + (logs[:, 1:] - math.log(noise)).sum(dim=1)


@torch.no_grad()
def moved(bank_SH: Tensor, found_SH: Tensor, momentum: float = 0.5) -> Tensor:
    """(S, H) a bank's vectors moved towards new ones, and brought to length 1 again."""
    mixed_SH = momentum * bank_SH + (1 - momentum) * found_SH.to(bank_SH.dtype)
    return mixed_SH / mixed_SH.norm(dim=1, keepdim=True)
