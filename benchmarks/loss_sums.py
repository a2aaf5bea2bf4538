"""What does a further divergence cost, where several share the pass over the logits?

Method: the same loss with 1, 2, 4 and 8 divergences (`DivergenceSum`), forward and backward, in turn; CPU seconds of the
process. A ratio is the median over rounds of a sum's seconds over those of the one divergence in the same round. "pass" is the
loss over given logits: one exp pass and the divergences; "fused" has the output projection's three products with it. "one by
one" is what a sum would cost without a pass in common: the same four divergences, each with a call of its own.

    python benchmarks/loss_sums.py            some minutes; writes results/loss_sums.md
    python benchmarks/loss_sums.py --quick    toy sizes: shows that the script works
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from loss_variants import Inputs, make_inputs

from kdcache.loss.divergence_sum import DivergenceSum, WeightedDivergence
from kdcache.loss.fused import fused_sparse_kd_loss
from kdcache.loss.prepare import LossSettings
from kdcache.loss.sparse_kd import sparse_kd_loss

RESULTS = Path(__file__).parent / "results" / "loss_sums.md"
KINDS = (
    "forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation", "hellinger", "alpha_beta",
)  # fmt: skip
CASES = {
    "pass": [(256, 64, 32_000, "float32"), (256, 64, 32_000, "bfloat16"), (64, 64, 151_936, "float32")],
    "fused": [(512, 512, 32_000, "float32")],
}
QUICK = {"pass": [(16, 16, 500, "float32")], "fused": [(16, 16, 500, "float32")]}


def total(count: int) -> DivergenceSum:
    return DivergenceSum([WeightedDivergence(kind, 1 / count, tail="bucket") for kind in KINDS[:count]])


def over_logits(inputs: Inputs, logits_PV: torch.Tensor, backend: str, divergence: DivergenceSum | str) -> None:
    settings = LossSettings(backend=backend)
    torch.autograd.grad(sparse_kd_loss(logits_PV, inputs.teacher, divergence=divergence, settings=settings), logits_PV)


def fused(inputs: Inputs, backend: str, divergence: DivergenceSum | str) -> None:
    settings, leaves = LossSettings(backend=backend), (inputs.hidden_PH, inputs.weight_VH)
    loss = fused_sparse_kd_loss(*leaves, inputs.teacher, divergence=divergence, settings=settings)
    torch.autograd.grad(loss, leaves)


def one_by_one(call: Callable[..., None]) -> None:
    for kind in KINDS[:4]:
        call(divergence=kind)


def variants(what: str, inputs: Inputs, backend: str) -> dict[str, Callable[[], None]]:
    if what == "pass":
        logits_PV = (inputs.hidden_PH @ inputs.weight_VH.T).detach().requires_grad_()
        call = partial(over_logits, inputs, logits_PV, backend)
    else:
        call = partial(fused, inputs, backend)
    sums = {f"{count} in one pass": partial(call, divergence=total(count)) for count in (2, 4, 8)}
    return {"1": partial(call, divergence=KINDS[0]), **sums, "4 one by one": partial(one_by_one, call)}


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if round_:  # the first compiles, or loads what is compiled
                seconds[name].append(time.process_time() - start)
    return seconds


def table(what: str, case: tuple[int, int, int, str], backend: str, rounds: int) -> list[str]:
    seconds = measure(variants(what, make_inputs(*case), backend), rounds)
    positions, hidden, vocab, dtype = case
    size = f"P {positions}, V {vocab}, {dtype}" + (f", H {hidden}" if what == "fused" else "")
    lines = [f"## {what}, {backend}: {size}", "", "| divergences | CPU ms | / one divergence |", "|---|---|---|"]
    for name, own in seconds.items():
        ratio = statistics.median(one / base for one, base in zip(own, seconds["1"], strict=True))
        lines.append(f"| {name} | {1e3 * statistics.median(own):.1f} | {ratio:.2f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    lines = [
        "# Further divergences in one pass",
        "",
        f"torch {torch.__version__}, one thread, K 64; `python benchmarks/loss_sums.py`",
        "",
    ]
    for what, cases in (QUICK if quick else CASES).items():
        for case in cases:
            for backend in ("numba", "torch"):
                lines += table(what, case, backend, 2 if quick else 9)
    print("\n".join(lines))
    if not quick:
        RESULTS.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
