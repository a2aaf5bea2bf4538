"""How close does the fused sparse KD loss come to its three matrix products, on a CPU?

Method: "three matmuls" is z = h W^T, z W, z^T h with fresh outputs and no loss at all: what any loss with gradients by hidden
states and weight must spend at least. Every variant (`loss_variants.py`) does forward and backward. Process CPU seconds, since
wall time measures the machine's other jobs; variants interleaved; a ratio is the median over rounds of variant / three matmuls
of the same round. Memory: how far the peak of a fresh process per variant rises above its inputs. The row kernel alone is given
in ns per logit and core.

    python benchmarks/loss.py --list                              the parts: a case and a group of variants each
    python benchmarks/loss.py --part 32k-2048-bfloat16 ours       one of them, at most some minutes
    python benchmarks/loss.py --all                               one after another
    python benchmarks/loss.py --quick --output FOLDER             all variants on toy sizes: shows that the script works

A part is merged into results/loss.json under the processor's name; results/loss.md is made of that file. Numbers quoted
elsewhere come from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loss_variants import GROUPS, Inputs, Variant, make_inputs, three_matmuls

from kdcache.kernels import get_backend
from kdcache.kernels.base import Objective, make_targets
from kdcache.kernels.divergences import DIVERGENCES

RESULTS = Path(__file__).parent / "results"
BOUND = "three matmuls"


@dataclass(frozen=True)
class Case:
    """Shapes of one comparison; rows so many that the loss has chunks, rounds so few that a part stays near five minutes."""

    rows: int
    hidden: int
    vocab: int
    dtype: str

    @property
    def rounds(self) -> int:
        return 3 if self.vocab * self.hidden < 1e8 else 1

    def inputs(self) -> Inputs:
        return make_inputs(self.rows, self.hidden, self.vocab, self.dtype)


CASES = {
    f"{label}-{hidden}-{dtype}": Case(rows, hidden, vocab, dtype)
    for label, vocab in (("32k", 32_000), ("152k", 151_936))
    for hidden in (512, 2048)
    for dtype, rows in (("float32", 2048 if vocab * hidden < 1e8 else 1024), ("bfloat16", 4096 if vocab < 1e5 else 2048))
}
QUICK = {"toy-16-float32": Case(96, 16, 500, "float32"), "toy-16-bfloat16": Case(96, 16, 500, "bfloat16")}


def cpu_seconds(function: Variant, inputs: Inputs) -> float:
    inputs.hidden_PH.grad = inputs.weight_VH.grad = None
    start = time.process_time()
    function(inputs)
    return time.process_time() - start


def timings(case: Case, group: str, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every variant in every round, after a round on the first rows that compiles what is to be compiled."""
    inputs, functions = case.inputs(), {BOUND: three_matmuls} | GROUPS[group]
    for name, function in functions.items():
        # torch.compile makes its code for one shape.
        function(inputs if "torch.compile" in name else make_inputs(8, case.hidden, case.vocab, case.dtype))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(cpu_seconds(function, inputs))
    return seconds


def peak_mib() -> float:
    """Of this process so far, on Linux. Not getrusage, whose maximum a new process inherits from the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM line; use --no-memory")


def growth_mib(case: Case, name: str) -> float:
    """In a process of its own: how far one step of a variant raises the peak above inputs and compiled code."""
    function = next(variants[name] for variants in GROUPS.values() if name in variants) if name != BOUND else three_matmuls
    if "torch.compile" not in name:
        function(make_inputs(8, case.hidden, 1000, case.dtype))
    inputs = case.inputs()
    # Making the inputs took more than they are; 5 sets the peak back to what is in use (proc_pid_clear_refs(5)).
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mib()
    function(inputs)
    return peak_mib() - before


def measured_growth(case: Case, name: str) -> float:
    code = f"import loss; print(loss.growth_mib(loss.Case(**{asdict(case)!r}), {name!r}))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", f"import torch; torch.set_num_threads(1); {code}"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def kernel_ns_per_logit(vocab_size: int, dtype: str, divergence: str, num_rows: int = 64) -> float:
    """The row kernel with the gradient in place; best of ten, one core."""
    rng = np.random.default_rng(0)
    logits_PV = rng.standard_normal((num_rows, vocab_size)).astype(np.float32)
    if dtype == "bfloat16":
        logits_PV = (logits_PV.view(np.uint32) >> 16).astype(np.uint16)
    ids_PK = np.stack([rng.choice(vocab_size, 64, replace=False) for _ in range(num_rows)])
    logprobs_PK, tail_P = np.full(ids_PK.shape, np.log(0.9 / 64)), np.full(num_rows, 0.1)
    targets = make_targets(ids_PK, logprobs_PK, tail_P, vocab_size=vocab_size, num_exact_P=np.full(num_rows, 32))
    best, objective, losses_P = np.inf, Objective(divergence=DIVERGENCES[divergence]()), np.empty(num_rows)
    for _ in range(10):
        buffer_PV = logits_PV.copy()
        start = time.process_time()
        get_backend("numba").row_losses_and_gradients(buffer_PV, targets, objective, losses_P)
        best = min(best, time.process_time() - start)
    return best / logits_PV.size * 1e9


def measure(name: str, group: str, args: argparse.Namespace) -> dict[str, Any]:
    """One part, as it is kept in the results."""
    case = (CASES | QUICK)[name]
    load = os.getloadavg()[0]
    rounds = args.rounds or case.rounds
    seconds = timings(case, group, rounds)
    variants = {}
    for variant, spent in seconds.items():
        ratios = [own / bound for own, bound in zip(spent, seconds[BOUND], strict=True)]
        variants[variant] = {"cpu_s": statistics.median(spent), "ratio": statistics.median(ratios), "ratios": ratios}
        if args.memory:
            variants[variant]["peak_mib"] = measured_growth(case, variant)
    part: dict[str, Any] = {"case": name, "group": group, **asdict(case), "threads": args.threads, "rounds": rounds}
    part |= {"cpu": processor_name(), "torch": torch.__version__, "load_before": round(load, 1), "variants": variants}
    if group == "ours":
        part["kernel_ns"] = {d: kernel_ns_per_logit(case.vocab, case.dtype, d) for d in ("forward_kl", *args.divergences)}
    return part


def merge(part: dict[str, Any], folder: Path) -> None:
    """Put the part in the place of an older one of the same processor, case and group; make the table anew."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "loss.json"
    parts = json.loads(path.read_text()) if path.exists() else []
    parts = [p for p in parts if (p["cpu"], p["case"], p["group"]) != (part["cpu"], part["case"], part["group"])]
    parts.append(part)
    path.write_text(json.dumps(parts, indent=1) + "\n")
    (folder / "loss.md").write_text(report(parts))


def report(parts: list[dict[str, Any]]) -> str:
    """Every part's table, and what became of the targets."""
    lines = ["<!-- made by benchmarks/loss.py of loss.json -->", ""]
    for part in sorted(parts, key=lambda p: (p["cpu"], list(CASES | QUICK).index(p["case"]), list(GROUPS).index(p["group"]))):
        lines += [f"## {part['case']}, {part['group']}", ""]
        shape = f"P {part['rows']}, H {part['hidden']}, V {part['vocab']}, {part['dtype']}, {part['threads']} thread(s)"
        lines += [
            f"{part['cpu']}, torch {part['torch']}; {shape}; {part['rounds']} rounds, load before {part['load_before']}",
            "",
        ]
        lines += ["| variant | CPU s | / three matmuls | peak MiB above inputs |", "|---|---|---|---|"]
        for name, v in part["variants"].items():
            spread = f"{v['ratio']:.2f} ({min(v['ratios']):.2f}-{max(v['ratios']):.2f})"
            lines.append(f"| {name} | {v['cpu_s']:.3f} | {spread} | {v['peak_mib']:.0f} |" if "peak_mib" in v else
                         f"| {name} | {v['cpu_s']:.3f} | {spread} | |")  # fmt: skip
        lines.append("")
        if part["group"] == "ours":
            lines += targets_met(part)
    return "\n".join(lines)


def targets_met(part: dict[str, Any]) -> list[str]:
    ratio, slowest = part["variants"]["fused, numba"]["ratio"], max(part["kernel_ns"].values())
    kernels = ", ".join(f"{name} {ns:.2f}" for name, ns in part["kernel_ns"].items())
    return [
        f"Fused at the default chunk within 1.10 of three matmuls: {ratio:.2f}, {'met' if ratio <= 1.1 else 'NOT met'}.",
        f"Row kernel at most 0.8 ns per logit: {kernels}: {'met' if slowest <= 0.8 else 'NOT met'}.",
        "",
    ]


def processor_name() -> str:
    """As Linux says it, else as Python does."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true")
    what.add_argument("--part", nargs=2, metavar=("CASE", "GROUP"))
    what.add_argument("--all", action="store_true")
    what.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, help="3, or 1 of the largest cases")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--divergences", nargs="*", default=["reverse_kl", "jensen_shannon", "tail_aware_kl"])
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of loss.json and loss.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts = (
        [tuple(args.part)] if args.part else [(case, group) for case in (QUICK if args.quick else CASES) for group in GROUPS]
    )
    if any(case not in CASES | QUICK or group not in GROUPS for case, group in parts):
        parser.error(f"there are the cases {', '.join(CASES)} and the groups {', '.join(GROUPS)}")
    for case, group in parts:
        if args.list:
            print(case, group)
            continue
        part = measure(case, group, args)
        merge(part, args.output)
        print(report([part]))


if __name__ == "__main__":
    main()
