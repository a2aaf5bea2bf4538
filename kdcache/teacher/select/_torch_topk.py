"""The k most probable tokens of a chunk of positions, their logprobs over the whole vocabulary, and the target's.

`select_top_k_reference` is the definition of `select_top_k`.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.teacher.select import _numba_topk
from kdcache.teacher.select.found import Selected

MAX_ELEMENTS = 2**24
"""How many logits are in float32 at once on a device, whatever the chunk: 64 MiB. Plain top-k takes this twice, the other
selections four times, and a sampler's filters eight times (plus what torch takes within a sort)."""


def select_top_k(logits_CV: Tensor, target_ids_C: Tensor, k: int) -> Selected[Tensor]:
    """The k most probable tokens of each position and the one that came, normalised over the vocabulary.

    Entries are by falling logit. On a CPU ties go to the smaller id; elsewhere `torch.topk` decides. Logprobs are NaN where any
    logit of the position is NaN or +inf, or all are -inf.

    Args:
        logits_CV: any floating dtype; not changed. On a CPU they are not copied (float16 is, once per chunk); elsewhere there
            are float32 copies of MAX_ELEMENTS at a time: at most two of 64 MiB, whatever the chunk.
        target_ids_C: int64 on the same device; negative where nothing follows.
        k: from 1 to V.
    """
    if logits_CV.device.type == "cpu":
        return _select_on_cpu(logits_CV, target_ids_C, k)
    return select_on_device(logits_CV, target_ids_C, k)


def select_on_device(logits_CV: Tensor, target_ids_C: Tensor, k: int) -> Selected[Tensor]:
    """`select_top_k` by torch operations, on any device."""
    # Selected before they are widened: half the bytes to read.
    values_CK, ids_CK = logits_CV.topk(k, dim=-1)
    parts = logits_CV.split(max(1, MAX_ELEMENTS // logits_CV.shape[1]))
    log_z_C1 = torch.cat([_log_sum_exp(part_PV) for part_PV in parts])
    target_logits_C1 = logits_CV.gather(-1, target_ids_C.clamp_min(0)[:, None]).float()
    return _exact(ids_CK.to(torch.int32), values_CK.float() - log_z_C1, (target_logits_C1 - log_z_C1)[:, 0])


def select_top_k_reference(logits_CV: Tensor, target_ids_C: Tensor, k: int) -> Selected[Tensor]:
    """The definition: whole distributions in float64 and a stable sort, so that ties go to the smaller id."""
    logprobs_CV = logits_CV.double().log_softmax(dim=-1)
    order_CK = logits_CV.double().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    target_ids_C1 = target_ids_C.clamp_min(0)[:, None]
    return _exact(
        order_CK.to(torch.int32),
        logprobs_CV.gather(-1, order_CK).float(),
        logprobs_CV.gather(-1, target_ids_C1)[:, 0].float(),
    )


def _exact(token_ids_CK: Tensor, logprobs_CK: Tensor, target_logprobs_C: Tensor) -> Selected[Tensor]:
    """Entries that are all exact, with nothing else."""
    none_C0 = logprobs_CK.new_empty((len(logprobs_CK), 0))
    return Selected(token_ids_CK, logprobs_CK, target_logprobs_C, none_C0.int(), none_C0)


def _log_sum_exp(logits_PV: Tensor) -> Tensor:
    """(P, 1) float32; written out, since `logsumexp` would keep a third copy."""
    z_PV = logits_PV.float()
    top_P1 = z_PV.amax(dim=-1, keepdim=True)
    return top_P1 + (z_PV - top_P1).exp_().sum(dim=-1, keepdim=True).log_()


def _select_on_cpu(logits_CV: Tensor, target_ids_C: Tensor, k: int) -> Selected[Tensor]:
    """Takes a tenth to a fifth of the time of `torch.topk` and `logsumexp` (benchmarks/capture.py)."""
    found = _numba_topk.select_top_k(bits_of(logits_CV), target_ids_C.numpy(), k, num_threads=torch.get_num_threads())
    return _exact(*map(torch.from_numpy, found[:3]))


def bits_of(logits_CV: Tensor) -> NDArray[Any]:
    """bfloat16 logits as uint16, others as the int32 of a float32; a view where possible."""
    if logits_CV.dtype not in (torch.bfloat16, torch.float32):
        logits_CV = logits_CV.float()
    bits_dtype = torch.uint16 if logits_CV.dtype == torch.bfloat16 else torch.int32
    return logits_CV.detach().contiguous().view(bits_dtype).numpy()
