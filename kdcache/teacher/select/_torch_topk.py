"""From logits to what a record keeps: the k most probable tokens, their logprobs over the whole vocabulary, the target's.

`select_top_k` takes a chunk of positions at a time; `select_top_k_reference` is its definition.

Shape letters: C positions of a chunk, V vocabulary, K entries per position.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.teacher.select import _numba_topk
from kdcache.teacher.select.found import Selected

MAX_ELEMENTS = 2**24
"""Logits that are in float32 at once on a device, whatever the chunk: 64 MiB. Twice over for plain top-k, four times for the
other selections, eight times where a sampler's filters are applied (and what torch takes within a sort)."""


def select_top_k(logits_CV: Tensor, targets_C: Tensor, k: int) -> Selected[Tensor]:
    """The k most probable tokens of each position and the one that came, normalised over the vocabulary.

    Entries are by falling logit. On a CPU ties go to the smaller id; elsewhere `torch.topk` decides. Logprobs are NaN where any
    logit of the position is NaN or +inf, or all are -inf.

    Args:
        logits_CV: any floating dtype; not changed. On a CPU no copy of it is made (of float16, one of the chunk); elsewhere
            float32 copies of MAX_ELEMENTS at a time: two of 64 MiB at most, whatever the chunk.
        targets_C: int64 on the same device; negative where there is no target.
        k: from 1 to V.
    """
    if logits_CV.device.type == "cpu":
        return _select_on_cpu(logits_CV, targets_C, k)
    return select_on_device(logits_CV, targets_C, k)


def select_on_device(logits_CV: Tensor, targets_C: Tensor, k: int) -> Selected[Tensor]:
    """`select_top_k` by torch operations, on any device."""
    # Selected before it is widened: half the bytes to read.
    values_CK, ids_CK = logits_CV.topk(k, dim=-1)
    parts = logits_CV.split(max(1, MAX_ELEMENTS // logits_CV.shape[1]))
    log_z_C1 = torch.cat([_log_sum_exp(part_PV) for part_PV in parts])
    target_logits_C1 = logits_CV.gather(-1, targets_C.clamp_min(0)[:, None]).float()
    return _exact(ids_CK.to(torch.int32), values_CK.float() - log_z_C1, (target_logits_C1 - log_z_C1)[:, 0])


def select_top_k_reference(logits_CV: Tensor, targets_C: Tensor, k: int) -> Selected[Tensor]:
    """The definition: whole rows in float64, a stable sort, so that ties go to the smaller id."""
    logprobs_CV = logits_CV.double().log_softmax(dim=-1)
    order_CK = logits_CV.double().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    targets_C1 = targets_C.clamp_min(0)[:, None]
    return _exact(
        order_CK.to(torch.int32),
        logprobs_CV.gather(-1, order_CK).float(),
        logprobs_CV.gather(-1, targets_C1)[:, 0].float(),
    )


def _exact(token_ids_CK: Tensor, logprobs_CK: Tensor, target_logprobs_C: Tensor) -> Selected[Tensor]:
    """Entries that are all exact, with nothing else."""
    none_C0 = logprobs_CK.new_empty((len(logprobs_CK), 0))
    return Selected(token_ids_CK, logprobs_CK, target_logprobs_C, none_C0.int(), none_C0)


def _log_sum_exp(logits_PV: Tensor) -> Tensor:
    """(P, 1) in float32; written out, since `logsumexp` would keep a third copy."""
    z_PV = logits_PV.float()
    top_P1 = z_PV.amax(dim=-1, keepdim=True)
    return top_P1 + (z_PV - top_P1).exp_().sum(dim=-1, keepdim=True).log_()


def _select_on_cpu(logits_CV: Tensor, targets_C: Tensor, k: int) -> Selected[Tensor]:
    """A tenth to a fifth of what `torch.topk` and `logsumexp` cost (benchmarks/capture.py)."""
    found = _numba_topk.select_top_k(bits_of(logits_CV), targets_C.numpy(), k, num_threads=torch.get_num_threads())
    return _exact(*map(torch.from_numpy, found[:3]))


def bits_of(logits_CV: Tensor) -> NDArray[Any]:
    """bfloat16 logits as uint16, others as the int32 of a float32; a view where that can be."""
    if logits_CV.dtype not in (torch.bfloat16, torch.float32):
        logits_CV = logits_CV.float()
    bits_dtype = torch.uint16 if logits_CV.dtype == torch.bfloat16 else torch.int32
    return logits_CV.detach().contiguous().view(bits_dtype).numpy()
