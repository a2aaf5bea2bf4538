"""The support with the target id in it: entries of the teacher that are exact, and the id that came next."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.base import PADDING_ID


def with_target(teacher: SoftTargets[Tensor], target_ids_P: Tensor) -> SoftTargets[Tensor]:
    """The exact entries and, where it is none of them, the target id with its exact logprob; the tail has that much less.

    Estimates become padding, so all entries of the result are exact. The target id gets its own column if an estimate has it,
    else a last one that is added: no id is there twice.

    Args:
        teacher: with `target_logprobs_P`, which a loader's batches have.
        target_ids_P: (P,) integers, negative where there is none: such a position keeps its entries.

    Raises:
        LossError: the teacher's logprobs of the target ids are not known, or the entries are unbiased estimates alone.
    """
    target_logprobs_P = teacher.target_logprobs_P
    if target_logprobs_P is None:
        raise LossError(
            "the teacher's logprobs of the target ids are not there, but are needed as entries: ask a loader for them with "
            "with_target_logprobs, or pass dataclasses.replace(teacher, target_logprobs_P=...)"
        )
    if teacher.entries == "unbiased":
        raise LossError("the entries are unbiased estimates, but an entry for the target id needs exact ones with their tail")
    ids_PK, logprobs_PK, is_exact_PK = teacher.token_ids_PK, teacher.logprobs_PK.float(), teacher.token_ids_PK >= 0
    if teacher.num_exact_P is not None:
        columns_K = torch.arange(ids_PK.shape[1], device=ids_PK.device)
        is_exact_PK = is_exact_PK & (columns_K < teacher.num_exact_P[:, None])
    is_target_PK = (ids_PK == target_ids_P[:, None]) & (ids_PK >= 0)
    is_outside_P = (target_ids_P >= 0) & ~(is_target_PK & is_exact_PK).any(dim=1)
    # NaN is a logprob that is not known: of a cache made elsewhere. It must not count as 0.
    target_P = target_logprobs_P.float()
    in_column_PK = is_target_PK & is_outside_P[:, None]
    ids_PK = torch.where(is_exact_PK | in_column_PK, ids_PK, PADDING_ID)
    logprobs_PK = torch.where(in_column_PK, target_P[:, None], logprobs_PK)
    is_added_P = is_outside_P & ~is_target_PK.any(dim=1)
    added_P = torch.where(is_added_P, target_ids_P, PADDING_ID).to(ids_PK.dtype)
    tail_mass_P = teacher.tail_mass_P - torch.where(is_outside_P, target_P.exp(), 0.0)
    return replace(
        teacher,
        token_ids_PK=torch.cat([ids_PK, added_P[:, None]], dim=1),
        logprobs_PK=torch.cat([logprobs_PK, torch.where(is_added_P, target_P, -torch.inf)[:, None]], dim=1),
        tail_mass_P=tail_mass_P.clamp(0, 1),
        entries="exact",
        num_exact_P=None,
    )
