"""How close does the fused sparse KD loss come to its three matrix products, on a CPU?

Method: "three matmuls" is z = h W^T, z W, z^T h with fresh outputs and no loss at all: what any loss with gradients by hidden
states and weight must spend at least. Every variant does forward and backward. Process CPU seconds, since wall time measures
the machine's other jobs; variants interleaved; each ratio is the median over rounds of variant / three matmuls of the same
round. The row kernel alone is given in ns per logit and core.

    python benchmarks/loss.py [--rows 2048 --hidden 512 --vocab 32000 --entries 64 --rounds 5 --threads 1]
        [--dtype float32|bfloat16] [--divergence forward_kl] [--memory] [--output benchmarks/results/loss-x.md]

--memory measures in one fresh process per variant how far the peak rises above the inputs. The table goes to stdout as
Markdown, and to --output with the machine's name and the targets; numbers quoted elsewhere come from a run of this file.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdcache.kernels import get_backend
from kdcache.kernels.base import Objective, make_targets
from kdcache.kernels.divergences import get_divergence
from kdcache.loss.fused import fused_sparse_kd_loss
from kdcache.loss.sparse_kd import sparse_kd_loss


@dataclass(frozen=True)
class Inputs:
    """One step's tensors; hidden_PH and weight_VH are leaves."""

    hidden_PH: torch.Tensor
    weight_VH: torch.Tensor
    targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    divergence: str


def make_inputs(args: argparse.Namespace) -> Inputs:
    torch.manual_seed(0)
    logprobs_PK = torch.randn(args.rows, args.entries).log_softmax(dim=1) - 0.05
    # One random stride per row: distinct ids without a permutation of the vocabulary each.
    strides_P1, offsets_P1 = (torch.randint(1, args.vocab // args.entries, (args.rows, 1)) for _ in range(2))
    token_ids_PK = ((offsets_P1 + strides_P1 * torch.arange(args.entries)) % args.vocab).int()
    dtype = getattr(torch, args.dtype)
    return Inputs(
        torch.randn(args.rows, args.hidden).to(dtype).requires_grad_(),
        (torch.randn(args.vocab, args.hidden) / args.hidden**0.5).to(dtype).requires_grad_(),
        (token_ids_PK, logprobs_PK, 1 - logprobs_PK.exp().sum(dim=1)),
        args.divergence,
    )


def three_matmuls(inputs: Inputs) -> None:
    with torch.no_grad():
        z_PV = inputs.hidden_PH @ inputs.weight_VH.T
        _ = z_PV @ inputs.weight_VH, z_PV.T @ inputs.hidden_PH


def log_softmax_and_gather(inputs: Inputs) -> None:
    """The usual form in plain torch (tail dropped), by autograd."""
    token_ids_PK, logprobs_PK, _ = inputs.targets
    log_q_PV = torch.log_softmax((inputs.hidden_PH @ inputs.weight_VH.T).float(), dim=1)
    log_q_PK = log_q_PV.gather(1, token_ids_PK.long())
    (logprobs_PK.exp() * (logprobs_PK - log_q_PK)).sum(dim=1).mean().backward()


def dense_teacher(inputs: Inputs) -> None:
    """Full-vocabulary distillation: a dense teacher, kl_div, autograd."""
    token_ids_PK, logprobs_PK, _ = inputs.targets
    p_PV = torch.zeros(len(token_ids_PK), len(inputs.weight_VH)).scatter_(1, token_ids_PK.long(), logprobs_PK.exp())
    log_q_PV = torch.log_softmax((inputs.hidden_PH @ inputs.weight_VH.T).float(), dim=1)
    torch.nn.functional.kl_div(log_q_PV, p_PV, reduction="batchmean").backward()


def fused(inputs: Inputs, **options: object) -> None:
    options = {"divergence": inputs.divergence, **options}
    fused_sparse_kd_loss(inputs.hidden_PH, inputs.weight_VH, *inputs.targets, **options).backward()  # type: ignore[arg-type]


def variants() -> dict[str, Callable[[Inputs], None]]:
    return {
        "fused, numba, chunk 512": fused,
        "fused, numba, chunk 1024": lambda inputs: fused(inputs, chunk_size=1024),
        "fused, numba, chunk 256": lambda inputs: fused(inputs, chunk_size=256),
        "fused, torch, chunk 512": lambda inputs: fused(inputs, backend="torch"),
        "whole logits, numba": lambda inputs: sparse_kd_loss(inputs.hidden_PH @ inputs.weight_VH.T, *inputs.targets).backward(),
        "whole logits, log_softmax + gather": log_softmax_and_gather,
        "whole logits, dense teacher": dense_teacher,
    }


def cpu_seconds(function: Callable[[Inputs], None], inputs: Inputs) -> float:
    inputs.hidden_PH.grad = inputs.weight_VH.grad = None
    start = time.process_time()
    function(inputs)
    return time.process_time() - start


def peak_mib() -> float:
    """Of this process so far, on Linux. Not getrusage, whose maximum a new process inherits from the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM line; leave --memory out")


def print_growth(args: argparse.Namespace) -> None:
    """In a process of its own: how far one step of a variant raises the peak above inputs and compiled code."""
    small = argparse.Namespace(**{**vars(args), "rows": 4, "vocab": 1000})
    function = ({"three matmuls": three_matmuls} | variants())[args.memory_of]
    function(make_inputs(small))
    inputs, before = make_inputs(args), peak_mib()
    function(inputs)
    print(peak_mib() - before)


def measured_growth(name: str) -> float:
    command = [sys.executable, *sys.argv, "--memory-of", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def kernel_ns_per_logit(vocab_size: int, num_entries: int, dtype: type, divergence: str) -> float:
    """Best of ten, 64 rows, one core."""
    rng = np.random.default_rng(0)
    logits_PV = rng.standard_normal((64, vocab_size)).astype(np.float32)
    if dtype is np.uint16:
        logits_PV = (logits_PV.view(np.uint32) >> 16).astype(np.uint16)
    ids_PK = rng.permuted(np.tile(np.arange(vocab_size), (64, 1)), axis=1)[:, :num_entries]
    logprobs_PK = np.full(ids_PK.shape, np.log(0.9 / num_entries))
    targets, losses_P = make_targets(ids_PK, logprobs_PK, np.full(64, 0.1), vocab_size=vocab_size), np.empty(64)
    best, objective = np.inf, Objective(divergence=get_divergence(divergence))
    for _ in range(10):
        buffer_PV = logits_PV.copy()
        start = time.process_time()
        get_backend("numba").row_losses_and_gradients(buffer_PV, targets, objective, losses_P)
        best = min(best, time.process_time() - start)
    return best / logits_PV.size * 1e9


def timings(args: argparse.Namespace) -> dict[str, list[float]]:
    """CPU seconds of every variant in every round but the first, which compiles and touches memory."""
    inputs = make_inputs(args)
    functions = {"three matmuls": three_matmuls} | variants()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(args.rounds + 1):
        for name, function in functions.items():
            spent = cpu_seconds(function, inputs)
            if round_number > 0:
                seconds[name].append(spent)
    return seconds


def report(args: argparse.Namespace) -> str:
    """The whole result as Markdown."""
    said = {name: value for name, value in vars(args).items() if name not in ("memory_of", "output")}
    lines = [f"{processor_name()}, {os.cpu_count()} cores (shared), torch {torch.__version__}", "", f"`{said}`", ""]
    lines += ["| variant | CPU s | / three matmuls | peak MiB above inputs |", "|---|---|---|---|"]
    seconds, ratio_of = timings(args), {}
    for name, spent in seconds.items():
        ratios = [own / floor for own, floor in zip(spent, seconds["three matmuls"], strict=True)]
        ratio_of[name] = statistics.median(ratios)
        spread = f"{ratio_of[name]:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        memory = f"{measured_growth(name):.0f}" if args.memory else ""
        lines.append(f"| {name} | {statistics.median(spent):.3f} | {spread} | {memory} |")
    kernels = []
    for dtype, label in ((np.float32, "float32"), (np.uint16, "bfloat16")):
        kernels.append(kernel_ns_per_logit(args.vocab, args.entries, dtype, args.divergence))
        lines.append(f"| row kernel alone, {label} | {kernels[-1]:.2f} ns per logit | | |")
    best = min(ratio for name, ratio in ratio_of.items() if name.startswith("fused, numba"))
    lines += ["", f"Target: fused with numba within 1.10 of three matmuls: {best:.2f}, {'met' if best <= 1.1 else 'NOT met'}."]
    lines += [
        f"Target: row kernel at most 0.8 ns per logit: {max(kernels):.2f}, {'met' if max(kernels) <= 0.8 else 'NOT met'}."
    ]
    return "\n".join(lines) + "\n"


def processor_name() -> str:
    """As Linux says it, else as Python does."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.exists())
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 2048), ("hidden", 512), ("vocab", 32000), ("entries", 64), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--divergence", default="forward_kl")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_growth(args)
        return
    text = report(args)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)


if __name__ == "__main__":
    main()
