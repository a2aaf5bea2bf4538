"""A teacher with more ids than its student, where the ids that are too many are no token's: the padding of embedding matrices.

Shape letters: P positions (rows), K entries per position (padded).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.kernels.base import PADDING_ID


class EntriesWithin(NamedTuple):
    """Entries without those of ids that the student does not have.

    Attributes:
        token_ids_PK: (P, K) -1 in the place of such an id.
        tail_mass_P: (P,) with what the teacher gave them where they were exact; estimates are in no tail mass to begin with,
            since that is the mass of all that is no exact entry.
        left_out_P: (P,) float32, what all entries that were left out had, estimates included.
    """

    token_ids_PK: Tensor
    tail_mass_P: Tensor
    left_out_P: Tensor


def entries_within(
    vocab_size: int, token_ids_PK: Tensor, logprobs_PK: Tensor, tail_mass_P: Tensor, num_exact_P: Tensor | None = None
) -> EntriesWithin:
    """Leave out entries of ids from `vocab_size` on, and count their mass to the tail; the losses take the result.

    For ids that no token of the tokenizer uses, as in Qwen2.5, whose large models have 152,064 rows and whose small ones
    151,936 for the same 151,665 tokens. Where a token has such an id the student cannot learn from the cache.

    Args:
        vocab_size: the student's.
        token_ids_PK, logprobs_PK, tail_mass_P, num_exact_P: as for `sparse_kd_loss`.
    """
    is_unknown_PK = token_ids_PK >= vocab_size
    masses_PK = torch.where(is_unknown_PK, logprobs_PK.float().exp(), 0.0)
    left_out_P = moved_P = masses_PK.sum(dim=1)
    if num_exact_P is not None:
        columns_K = torch.arange(token_ids_PK.shape[1], device=token_ids_PK.device)
        moved_P = torch.where(columns_K < num_exact_P[:, None], masses_PK, 0.0).sum(dim=1)
    tail_mass_P = (tail_mass_P + moved_P).clamp_max(1.0)
    return EntriesWithin(token_ids_PK.masked_fill(is_unknown_PK, PADDING_ID), tail_mass_P, left_out_P)
