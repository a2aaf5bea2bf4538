"""The row losses in plain torch: any device, float64, double backward, torch.compile. Makes [P, V] temporaries.

Shape letters: P positions (rows), K entries per position (padded), V the student's vocabulary. The formulas are those of
`kdcache.kernels.reference`. Nothing here depends on values in Python, so that a compiled graph has no breaks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.kernels.base import Objective
from kdcache.loss.arguments import TargetTensors


def row_losses(logits_PV: Tensor, targets: TargetTensors, objective: Objective) -> Tensor:
    """(P,) losses in nats, not multiplied by the weights; 0 for rows of weight 0. float64 for float64 logits, else float32."""
    z_PV = logits_PV if logits_PV.dtype == torch.float64 else logits_PV.float()
    read_P = None if targets.weights_P is None else targets.weights_P > 0
    if read_P is not None:
        # Before anything else: a NaN in a row that does not count would come back as 0 * NaN.
        z_PV = z_PV.masked_fill(~read_P[:, None], 0.0)
    lse_P = torch.logsumexp(z_PV, dim=1)
    losses_P = torch.zeros_like(lse_P)
    if objective.alpha > 0:
        losses_P = losses_P + objective.alpha * _forward_kl(z_PV, lse_P, targets, objective.tail)
    if objective.alpha < 1 and targets.labels_P is not None:
        losses_P = losses_P + (1 - objective.alpha) * _cross_entropy(z_PV, lse_P, targets.labels_P)
    return losses_P if read_P is None else torch.where(read_P, losses_P, 0.0)


def _forward_kl(z_PV: Tensor, lse_P: Tensor, targets: TargetTensors, tail: str) -> Tensor:
    stored_PK = targets.token_ids_PK >= 0
    ids_PK = targets.token_ids_PK.long()
    log_p_PK = targets.logprobs_PK.detach().to(z_PV.dtype).masked_fill(~stored_PK, -torch.inf)
    if tail == "renormalize":
        mass_P1 = log_p_PK.exp().sum(dim=1, keepdim=True)
        log_p_PK = log_p_PK - torch.where(mass_P1 > 0, mass_P1, 1.0).log()
    p_PK = log_p_PK.exp()
    # 0 log 0 = 0. The infinite operand is taken out before the product and not after: its gradient would be NaN.
    z_PK = torch.where(p_PK > 0, z_PV.gather(1, ids_PK.clamp_min(0)), 0.0)
    losses_P = (p_PK * (torch.where(p_PK > 0, log_p_PK, 0.0) - z_PK + lse_P[:, None])).where(p_PK > 0, 0.0).sum(dim=1)
    if tail != "bucket":
        return losses_P
    has_tail_P = stored_PK.sum(dim=1) < z_PV.shape[1]
    r_P = torch.where(has_tail_P, targets.tail_mass_P.detach().to(z_PV.dtype), 0.0)
    log_r_P = torch.where(r_P > 0, r_P, 1.0).log()
    log_q_tail_P = _tail_logsumexp(z_PV, ids_PK, r_P > 0) - lse_P
    return losses_P + torch.where(r_P > 0, r_P * (log_r_P - log_q_tail_P), 0.0)


def _tail_logsumexp(z_PV: Tensor, ids_PK: Tensor, wanted_P: Tensor) -> Tensor:
    """(P,) logsumexp over the ids outside the support; some finite number with a finite gradient where it is not wanted."""
    vocab_size = z_PV.shape[1]
    # Two columns more: one keeps unwanted rows finite, the other is where padding may write.
    finite_P1 = torch.where(wanted_P, -torch.inf, 0.0).to(z_PV.dtype)[:, None]
    wide_PV = torch.cat([z_PV, finite_P1, torch.full_like(finite_P1, -torch.inf)], dim=1)
    index_PK = torch.where(ids_PK >= 0, ids_PK, vocab_size + 1)
    return torch.logsumexp(wide_PV.scatter(1, index_PK, -torch.inf), dim=1)


def _cross_entropy(z_PV: Tensor, lse_P: Tensor, labels_P: Tensor) -> Tensor:
    has_label_P = labels_P >= 0
    label_z_P = z_PV.gather(1, labels_P.long().clamp_min(0)[:, None])[:, 0]
    return torch.where(has_label_P, lse_P - label_z_P, 0.0)
