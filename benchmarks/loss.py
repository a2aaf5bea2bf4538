"""How close does the fused sparse KD loss come to its three matrix products, on a CPU?

Method: "three matmuls" is z = h W^T, z W, z^T h with fresh outputs and no loss at all: what any loss with gradients by hidden
states and weight must spend at least. Every variant does forward and backward. Process CPU seconds, since wall time measures
the machine's other jobs; variants interleaved; each ratio is the median over rounds of variant / three matmuls of the same
round. The row kernel alone is given in ns per logit and core.

    python benchmarks/loss.py [--rows 2048 --hidden 512 --vocab 32000 --entries 64 --rounds 5 --threads 1]

The table goes to stdout as Markdown; numbers quoted elsewhere come from a run of this file.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kdcache.kernels import get_backend
from kdcache.kernels.base import Objective, make_targets
from kdcache.loss.fused import fused_sparse_kd_loss
from kdcache.loss.sparse_kd import sparse_kd_loss


@dataclass(frozen=True)
class Inputs:
    """One step's tensors; hidden_PH and weight_VH are leaves."""

    hidden_PH: torch.Tensor
    weight_VH: torch.Tensor
    targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(args: argparse.Namespace) -> Inputs:
    torch.manual_seed(0)
    logprobs_PK = torch.randn(args.rows, args.entries).log_softmax(dim=1) - 0.05
    token_ids_PK = torch.stack([torch.randperm(args.vocab, dtype=torch.int32)[: args.entries] for _ in range(args.rows)])
    return Inputs(
        torch.randn(args.rows, args.hidden).requires_grad_(),
        (torch.randn(args.vocab, args.hidden) / args.hidden**0.5).requires_grad_(),
        (token_ids_PK, logprobs_PK, 1 - logprobs_PK.exp().sum(dim=1)),
    )


def three_matmuls(inputs: Inputs) -> None:
    with torch.no_grad():
        z_PV = inputs.hidden_PH @ inputs.weight_VH.T
        _ = z_PV @ inputs.weight_VH, z_PV.T @ inputs.hidden_PH


def log_softmax_and_gather(inputs: Inputs) -> None:
    """The usual form in plain torch (tail dropped), by autograd."""
    token_ids_PK, logprobs_PK, _ = inputs.targets
    log_q_PV = torch.log_softmax(inputs.hidden_PH @ inputs.weight_VH.T, dim=1)
    log_q_PK = log_q_PV.gather(1, token_ids_PK.long())
    (logprobs_PK.exp() * (logprobs_PK - log_q_PK)).sum(dim=1).mean().backward()


def fused(inputs: Inputs, **options: object) -> None:
    fused_sparse_kd_loss(inputs.hidden_PH, inputs.weight_VH, *inputs.targets, **options).backward()  # type: ignore[arg-type]


def variants() -> dict[str, Callable[[Inputs], None]]:
    return {
        "fused, numba, chunk 512": fused,
        "fused, numba, chunk 256": lambda inputs: fused(inputs, chunk_size=256),
        "fused, torch, chunk 512": lambda inputs: fused(inputs, backend="torch"),
        "whole logits, numba": lambda inputs: sparse_kd_loss(inputs.hidden_PH @ inputs.weight_VH.T, *inputs.targets).backward(),
        "whole logits, log_softmax + gather": log_softmax_and_gather,
    }


def cpu_seconds(function: Callable[[Inputs], None], inputs: Inputs) -> float:
    inputs.hidden_PH.grad = inputs.weight_VH.grad = None
    start = time.process_time()
    function(inputs)
    return time.process_time() - start


def kernel_ns_per_logit(vocab_size: int, num_entries: int, dtype: type) -> float:
    """Best of ten, 64 rows, one core."""
    rng = np.random.default_rng(0)
    logits_PV = rng.standard_normal((64, vocab_size)).astype(np.float32)
    if dtype is np.uint16:
        logits_PV = (logits_PV.view(np.uint32) >> 16).astype(np.uint16)
    ids_PK = rng.permuted(np.tile(np.arange(vocab_size), (64, 1)), axis=1)[:, :num_entries]
    logprobs_PK = np.full(ids_PK.shape, np.log(0.9 / num_entries))
    targets, losses_P = make_targets(ids_PK, logprobs_PK, np.full(64, 0.1), vocab_size=vocab_size), np.empty(64)
    best = np.inf
    for _ in range(10):
        buffer_PV = logits_PV.copy()
        start = time.process_time()
        get_backend("numba").row_losses_and_gradients(buffer_PV, targets, Objective(), losses_P)
        best = min(best, time.process_time() - start)
    return best / logits_PV.size * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 2048), ("hidden", 512), ("vocab", 32000), ("entries", 64), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    inputs, seconds = make_inputs(args), {"three matmuls": []} | {name: [] for name in variants()}
    for round_number in range(args.rounds + 1):
        for name, function in ({"three matmuls": three_matmuls} | variants()).items():
            spent = cpu_seconds(function, inputs)
            if round_number > 0:  # the first one compiles and touches memory
                seconds[name].append(spent)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, float32, {args}\n")
    print("| variant | CPU s | / three matmuls |\n|---|---|---|")
    for name, spent in seconds.items():
        ratios = [own / floor for own, floor in zip(spent, seconds["three matmuls"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"| {name} | {statistics.median(spent):.3f} | {spread} |")
    for dtype, label in ((np.float32, "float32"), (np.uint16, "bfloat16")):
        print(f"| row kernel alone, {label} | {kernel_ns_per_logit(args.vocab, args.entries, dtype):.2f} ns per logit | |")


if __name__ == "__main__":
    main()
