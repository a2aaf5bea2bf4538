"""What benchmarks/loss.py times: ours, the bound, and what else one would write, each forward and backward over one batch.

Shape letters: P positions (rows), C rows of one chunk, K entries per position, V the vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from kdcache.format.soft_targets import SoftTargets
from kdcache.loss.fused import Projection, fused_sparse_kd_loss
from kdcache.loss.prepare import LossSettings
from kdcache.loss.sparse_kd import sparse_kd_loss

NUM_ENTRIES = 64


@dataclass(frozen=True)
class Inputs:
    """One step's tensors; hidden_PH and weight_VH are leaves."""

    hidden_PH: torch.Tensor
    weight_VH: torch.Tensor
    teacher: SoftTargets[torch.Tensor]
    target_ids_P: torch.Tensor


Variant = Callable[[Inputs], None]


def make_inputs(rows: int, hidden: int, vocab: int, dtype: str) -> Inputs:
    torch.manual_seed(0)
    num_entries = min(NUM_ENTRIES, vocab // 4)
    logprobs_PK = torch.randn(rows, num_entries).log_softmax(dim=1) - 0.05
    # One random stride per row: distinct ids without a permutation of the vocabulary each.
    strides_P1, offsets_P1 = (torch.randint(1, vocab // num_entries, (rows, 1)) for _ in range(2))
    token_ids_PK = ((offsets_P1 + strides_P1 * torch.arange(num_entries)) % vocab).int()
    return Inputs(
        torch.randn(rows, hidden).to(getattr(torch, dtype)).requires_grad_(),
        (torch.randn(vocab, hidden) / hidden**0.5).to(getattr(torch, dtype)).requires_grad_(),
        SoftTargets.of(token_ids_PK, logprobs_PK, 1 - logprobs_PK.exp().sum(dim=1), entries="exact"),
        torch.randint(0, vocab, (rows,)),
    )


def three_matmuls(inputs: Inputs) -> None:
    """The bound: no loss at all, fresh outputs."""
    with torch.no_grad():
        z_PV = inputs.hidden_PH @ inputs.weight_VH.T
        _ = z_PV @ inputs.weight_VH, z_PV.T @ inputs.hidden_PH


def fused(inputs: Inputs, *, divergence: str = "forward_kl", backend: str = "auto", chunk: int | None = None) -> None:
    projection, settings = Projection(inputs.weight_VH, chunk_positions=chunk), LossSettings(backend=backend)
    fused_sparse_kd_loss(inputs.hidden_PH, projection, inputs.teacher, divergence=divergence, settings=settings).backward()


def whole_logits(inputs: Inputs) -> None:
    sparse_kd_loss(inputs.hidden_PH @ inputs.weight_VH.T, inputs.teacher).backward()


def gathered_kl(
    hidden_PH: torch.Tensor, weight_VH: torch.Tensor, ids_PK: torch.Tensor, logprobs_PK: torch.Tensor
) -> torch.Tensor:
    """The usual form: log_softmax and gather, tail dropped."""
    log_q_PK = torch.log_softmax((hidden_PH @ weight_VH.T).float(), dim=1).gather(1, ids_PK.long())
    return (logprobs_PK.exp() * (logprobs_PK - log_q_PK)).sum(dim=1).mean()


def by_autograd(inputs: Inputs, loss: Callable[..., torch.Tensor] = gathered_kl) -> None:
    loss(inputs.hidden_PH, inputs.weight_VH, inputs.teacher.token_ids_PK, inputs.teacher.logprobs_PK).backward()


def chunked_autograd(inputs: Inputs, chunk: int = 512) -> None:
    """The usual form chunk by chunk, each chunk's graph done with before the next."""
    parts = [
        tensor.split(chunk) for tensor in (inputs.hidden_PH.detach(), inputs.teacher.token_ids_PK, inputs.teacher.logprobs_PK)
    ]
    gradients = []
    for part_CH, ids_CK, logprobs_CK in zip(*parts, strict=True):
        hidden_CH = part_CH.requires_grad_()
        loss = gathered_kl(hidden_CH, inputs.weight_VH, ids_CK, logprobs_CK)
        (loss * (len(hidden_CH) / len(inputs.hidden_PH))).backward()
        gradients.append(hidden_CH.grad)
    inputs.hidden_PH.grad = torch.cat(gradients)


def dense_teacher(inputs: Inputs) -> None:
    """Full-vocabulary distillation: a dense teacher, kl_div, autograd."""
    token_ids_PK, logprobs_PK = inputs.teacher.token_ids_PK, inputs.teacher.logprobs_PK
    p_PV = torch.zeros(len(token_ids_PK), len(inputs.weight_VH)).scatter_(1, token_ids_PK.long(), logprobs_PK.exp())
    log_q_PV = torch.log_softmax((inputs.hidden_PH @ inputs.weight_VH.T).float(), dim=1)
    torch.nn.functional.kl_div(log_q_PV, p_PV, reduction="batchmean").backward()


def linear_cross_entropy(inputs: Inputs) -> None:
    """torch's own fused loss: hard labels, no teacher; its own choice of chunks."""
    torch.nn.functional.linear_cross_entropy(inputs.hidden_PH, inputs.weight_VH, inputs.target_ids_P).backward()


def dense_probabilities(inputs: Inputs) -> torch.Tensor:
    """(P, V) of the entries, in the student's dtype: what a loss that takes no entries must be given."""
    token_ids_PK, logprobs_PK = inputs.teacher.token_ids_PK, inputs.teacher.logprobs_PK
    p_PV = torch.zeros(len(token_ids_PK), len(inputs.weight_VH), dtype=inputs.hidden_PH.dtype)
    return p_PV.scatter_(1, token_ids_PK.long(), logprobs_PK.exp().to(p_PV.dtype))


def liger_kl(inputs: Inputs, loss: Callable[..., torch.Tensor]) -> None:
    loss(inputs.hidden_PH, inputs.weight_VH, dense_probabilities(inputs)).backward()


def _liger() -> dict[str, Variant]:
    """Liger's fused loss of dense cached targets, the nearest rival: its Triton kernels need a GPU."""
    try:
        from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss
    except ImportError:
        return {}
    kinds = {"": {}, ", dW in float32": {"accum_dtype": torch.float32}}
    return {
        f"Liger fused linear KL{name} (dense teacher)": partial(liger_kl, loss=LigerFusedLinearKLDivLoss(**options))
        for name, options in kinds.items()
    }


def groups_of(device: str) -> dict[str, dict[str, Variant]]:
    """What is timed there: on a GPU `auto` and `triton` in numba's place, and Liger's loss where it is installed."""
    if device == "cpu":
        return GROUPS
    ours: dict[str, Variant] = {"fused, auto": fused, "fused, triton": partial(fused, backend="triton")}
    ours |= {f"fused, triton, chunk {c}": partial(fused, backend="triton", chunk=c) for c in (1024, 2048, 4096, 8192)}
    ours |= {f"fused, triton, {d}": partial(fused, backend="triton", divergence=d) for d in ("reverse_kl", "jensen_shannon")}
    others = {name.replace("numba", "auto"): variant for name, variant in GROUPS["torch"].items()}
    groups = GROUPS | {"ours": ours, "torch": others}
    return groups | ({"liger": liger} if (liger := _liger()) else {})


def _groups() -> dict[str, dict[str, Variant]]:
    ours: dict[str, Variant] = {"fused, numba": fused}
    ours |= {f"fused, numba, chunk {c}": partial(fused, chunk=c) for c in (512, 1024, 2048)}
    compiled = torch.compile(gathered_kl)
    others: dict[str, Variant] = {
        "fused, torch": partial(fused, backend="torch"),
        "whole logits, numba": whole_logits,
        "whole logits, log_softmax + gather": by_autograd,
        "the same, torch.compile": partial(by_autograd, loss=compiled),
        "the same, chunks of 512": chunked_autograd,
        "whole logits, dense teacher": dense_teacher,
    }
    groups = {"ours": ours, "torch": others}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        groups["labels"] = {"F.linear_cross_entropy (labels, no teacher)": linear_cross_entropy}
    return groups


GROUPS = _groups()
"""Variants that are timed together, each beside the bound."""
