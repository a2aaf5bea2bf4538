"""A teacher with more ids than its student, where no token uses the ids in excess: the padding of embedding matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.base import PADDING_ID


class EntriesWithin(NamedTuple):
    """Soft targets without the entries of ids that the student does not have.

    Attributes:
        teacher: with -1 for such an id. Its tail has what the teacher gave them where they were exact; estimates are in no tail
            mass to begin with, since that is the mass of everything that is not an exact entry.
        left_out_P: (P,) float32, what all entries that were left out had, estimates included.
    """

    teacher: SoftTargets[Tensor]
    left_out_P: Tensor


def entries_within(teacher: SoftTargets[Tensor], vocab_size: int) -> EntriesWithin:
    """Leave out entries of ids from `vocab_size` on, and count their mass to the tail; the losses take the result.

    For ids that no token of the tokenizer uses, as in Qwen2.5, whose large models have 152,064 ids and whose small ones 151,936
    for the same 151,665 tokens. Where a token has such an id the student cannot learn it from the cache.

    Args:
        teacher: what a loader or `SoftTargets.of` gives.
        vocab_size: the student's.
    """
    is_unknown_PK = teacher.token_ids_PK >= vocab_size
    masses_PK = torch.where(is_unknown_PK, teacher.logprobs_PK.float().exp(), 0.0)
    left_out_P = moved_P = masses_PK.sum(dim=1)
    if teacher.num_exact_P is not None:
        columns_K = torch.arange(masses_PK.shape[1], device=masses_PK.device)
        moved_P = torch.where(columns_K < teacher.num_exact_P[:, None], masses_PK, 0.0).sum(dim=1)
    elif teacher.entries == "unbiased":
        moved_P = torch.zeros_like(left_out_P)
    within = replace(
        teacher,
        token_ids_PK=teacher.token_ids_PK.masked_fill(is_unknown_PK, PADDING_ID),
        tail_mass_P=(teacher.tail_mass_P + moved_P).clamp_max(1.0),
        vocab_size=vocab_size if teacher.vocab_size is None else min(teacher.vocab_size, vocab_size),
    )
    return EntriesWithin(within, left_out_P)
