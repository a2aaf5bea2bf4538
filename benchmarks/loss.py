"""How close does the fused sparse KD loss come to its three matrix products?

Method: "three matmuls" is z = h W^T, z W, z^T h with fresh outputs and no loss at all: what any loss with gradients by hidden
states and weight must spend at least. Every variant (`loss_variants.py`) does forward and backward. Seconds of the process on a
CPU, of the device on a GPU (`device.py`); variants interleaved; a ratio is the median over rounds of variant / three matmuls of
the same round. Memory: how far the peak rises above the inputs: on a CPU of a fresh process per variant, on a GPU of torch's
allocator. The row kernel alone is given in ns per logit and core, on a CPU. A GPU has cases of its own (names end in `gpu`).

    python benchmarks/loss.py --list                              the parts: a case and a group of variants each
    python benchmarks/loss.py --part 32k-2048-bfloat16 ours       one of them, at most some minutes
    python benchmarks/loss.py --all                               one after another
    python benchmarks/loss.py --quick --output FOLDER             all variants on toy sizes: shows that the script works

A part is merged into results/loss.json under the device's name; results/loss.md is made of that file. Numbers quoted
elsewhere come from there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device import Device, add_argument, chosen
from loss_variants import GROUPS, Inputs, Variant, groups_of, make_inputs, three_matmuls

from kdcache.kernels import numba_kernels
from kdcache.kernels.base import Objective, make_kernel_inputs
from kdcache.kernels.divergences import DIVERGENCES

RESULTS = Path(__file__).parent / "results"
BOUND = "three matmuls"
GROUP_ORDER = ["ours", "torch", "labels", "liger"]


@dataclass(frozen=True)
class Case:
    """Shapes of one comparison; rows so many that the loss has chunks, rounds so few that a part stays near five minutes."""

    rows: int
    hidden: int
    vocab: int
    dtype: str

    @property
    def rounds(self) -> int:
        return 5 if self.rows >= 8192 else 3 if self.vocab * self.hidden < 1e8 else 1

    def inputs(self) -> Inputs:
        return make_inputs(self.rows, self.hidden, self.vocab, self.dtype)


CASES = {
    f"{label}-{hidden}-{dtype}": Case(rows, hidden, vocab, dtype)
    for label, vocab in (("32k", 32_000), ("152k", 151_936))
    for hidden in (512, 2048)
    for dtype, rows in (("float32", 2048 if vocab * hidden < 1e8 else 1024), ("bfloat16", 4096 if vocab < 1e5 else 2048))
}
GPU_CASES = {
    f"{label}-{hidden}-bfloat16-gpu": Case(8192, hidden, vocab, "bfloat16")
    for label, vocab in (("32k", 32_000), ("152k", 151_936))
    for hidden in (2048, 4096)
}
QUICK = {"toy-16-float32": Case(96, 16, 500, "float32"), "toy-16-bfloat16": Case(96, 16, 500, "bfloat16")}


def seconds_of(function: Variant, inputs: Inputs, device: Device) -> float:
    inputs.hidden_PH.grad = inputs.weight_VH.grad = None
    return device.clock(lambda: function(inputs))


def timings(case: Case, group: str, rounds: int, device: Device) -> dict[str, list[float]]:
    """Seconds of every variant in every round, after a round on the first rows that compiles what is to be compiled."""
    inputs, functions = case.inputs(), {BOUND: three_matmuls} | groups_of(device.kind)[group]
    for name, function in functions.items():
        # torch.compile makes its code for one shape.
        function(inputs if "torch.compile" in name else make_inputs(8, case.hidden, case.vocab, case.dtype))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(seconds_of(function, inputs, device))
    return seconds


def growth_mib(case: Case, name: str) -> float:
    """In a process of its own: how far one step of a variant raises the peak above inputs and compiled code."""
    function = next(variants[name] for variants in GROUPS.values() if name in variants) if name != BOUND else three_matmuls
    if "torch.compile" not in name:
        function(make_inputs(8, case.hidden, 1000, case.dtype))
    inputs = case.inputs()
    return Device("cpu").peak_memory(lambda: function(inputs)) / 2**20


def measured_growth(case: Case, name: str, device: Device) -> float:
    if device.kind != "cpu":
        function = next(v[name] for v in [{BOUND: three_matmuls}, *groups_of(device.kind).values()] if name in v)
        inputs = case.inputs()
        return device.peak_memory(lambda: function(inputs)) / 2**20
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
    targets = make_kernel_inputs(ids_PK, logprobs_PK, tail_P, vocab_size=vocab_size, num_exact_P=np.full(num_rows, 32))
    best, objective, losses_P = np.inf, Objective(divergence=DIVERGENCES[divergence]()), np.empty(num_rows)
    for _ in range(10):
        buffer_PV = logits_PV.copy()
        call = partial(numba_kernels.position_losses_and_gradients, buffer_PV, targets, objective, losses_P)
        best = min(best, Device("cpu").clock(call))
    return best / logits_PV.size * 1e9


def measure(name: str, group: str, args: argparse.Namespace) -> dict[str, Any]:
    """One part, as it is kept in the results."""
    case, device = (CASES | GPU_CASES | QUICK)[name], chosen(args.device)
    load = os.getloadavg()[0]
    rounds = args.rounds or case.rounds
    seconds = timings(case, group, rounds, device)
    variants = {}
    for variant, spent in seconds.items():
        ratios = [own / bound for own, bound in zip(spent, seconds[BOUND], strict=True)]
        variants[variant] = {
            f"{device.unit.lower()}_s": statistics.median(spent),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
        if args.memory:
            variants[variant]["peak_mib"] = measured_growth(case, variant, device)
    part: dict[str, Any] = {"case": name, "group": group, **asdict(case), "threads": args.threads, "rounds": rounds}
    part |= {"cpu": device.name, "torch": torch.__version__, "load_before": round(load, 1), "variants": variants}
    if group == "ours" and device.kind == "cpu":
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
    for part in sorted(
        parts, key=lambda p: (p["cpu"], list(CASES | GPU_CASES | QUICK).index(p["case"]), GROUP_ORDER.index(p["group"]))
    ):
        lines += [f"## {part['case']}, {part['group']}", ""]
        shape = f"P {part['rows']}, H {part['hidden']}, V {part['vocab']}, {part['dtype']}, {part['threads']} thread(s)"
        lines += [
            f"{part['cpu']}, torch {part['torch']}; {shape}; {part['rounds']} rounds, load before {part['load_before']}",
            "",
        ]
        unit = "gpu" if any("gpu_s" in v for v in part["variants"].values()) else "cpu"
        lines += [f"| variant | {unit.upper()} s | / three matmuls | peak MiB above inputs |", "|---|---|---|---|"]
        for name, v in part["variants"].items():
            spread = f"{v['ratio']:.2f} ({min(v['ratios']):.2f}-{max(v['ratios']):.2f})"
            lines.append(f"| {name} | {v[f'{unit}_s']:.3f} | {spread} | {v['peak_mib']:.0f} |" if "peak_mib" in v else
                         f"| {name} | {v[f'{unit}_s']:.3f} | {spread} | |")  # fmt: skip
        lines.append("")
        if part["group"] == "ours":
            lines += targets_met(part)
    return "\n".join(lines)


def targets_met(part: dict[str, Any]) -> list[str]:
    if "kernel_ns" not in part:
        ratios = {name: part["variants"][name]["ratio"] for name in ("fused, auto", "fused, triton")}
        said = ", ".join(f"{name} {ratio:.2f}, {'met' if ratio <= 1.1 else 'NOT met'}" for name, ratio in ratios.items())
        return [f"Fused at the default chunk within 1.10 of three matmuls: {said}.", ""]
    ratio, slowest = part["variants"]["fused, numba"]["ratio"], max(part["kernel_ns"].values())
    kernels = ", ".join(f"{name} {ns:.2f}" for name, ns in part["kernel_ns"].items())
    return [
        f"Fused at the default chunk within 1.10 of three matmuls: {ratio:.2f}, {'met' if ratio <= 1.1 else 'NOT met'}.",
        f"Row kernel at most 0.8 ns per logit: {kernels}: {'met' if slowest <= 0.8 else 'NOT met'}.",
        "",
    ]


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
    add_argument(parser)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of loss.json and loss.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = chosen(args.device)
    device.use()
    cases, groups = CASES if device.kind == "cpu" else GPU_CASES, groups_of(device.kind)
    tried = QUICK if args.quick else cases
    parts = [tuple(args.part)] if args.part else [(case, group) for case in tried for group in groups]
    if any(case not in cases | QUICK or group not in groups for case, group in parts):
        parser.error(f"there are the cases {', '.join(cases)} and the groups {', '.join(groups)}")
    for case, group in parts:
        if args.list:
            print(case, group)
            continue
        part = measure(case, group, args)
        merge(part, args.output)
        print(report([part]))


if __name__ == "__main__":
    main()
