"""How close does capture come to what any capture must do: prefill, and the output projection of every position?

Method: random Llama models made on the fly, vLLM's engine in this process, sequences of random tokens. All variants of a model
run in one engine, interleaved; a ratio is the median over rounds of (floor's CPU seconds / variant's), of the same round. CPU
seconds of the process, since wall time measures the machine's other jobs; wall time is in the JSON too. On a GPU the engine is
a process of its own and the host waits for it: there the figures are of wall time, steps have 8192 tokens, the body is `1b`,
and no peaks are read (vLLM takes its share of the memory at the start). Variants:

- prefill: one token generated after each prompt, nothing else. Projects one position per sequence.
- limit: prefill and the output projection of every position, in the worker's chunks, its logits thrown away.
- worker: `VllmTeacher.score` on the worker route, records and all; with --kinds, other selections than `top_k` as well.
- flat, dict: vLLM's own prompt logprobs in its two containers; flat is `score` on the public route.
- transformers: `HfTeacher.score`.

    python benchmarks/capture.py [--quick] [--bodies thin,deep --vocabs 8192,32768,151936 --entries 16,64,256]
                                 [--slow-entries 64] [--kinds] [--rounds 3] [--threads 1] [--out benchmarks/results]
    python benchmarks/capture.py --peaks [--bodies ... --vocabs ... --out ...]
    python benchmarks/capture.py --kernel [--vocabs ... --entries ... --out ...]

Writes capture.json and, from it, capture.md. With --kernel: what the selections cost per logit, without a model (see
capture_kernels.py), in capture_kernels.md. Peak memory is measured apart from times, each variant in a process of its own (see
capture_peaks.py); with --peaks alone, into the report that --out holds, whose times stay.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # no warm-up: the first round is one

import numpy as np
from capture_peaks import Prepared, in_fork, memory_table, memory_target, peak_of
from device import Device, add_argument, chosen

BODIES = {"thin": (2, 256), "deep": (12, 768), "1b": (16, 2048)}
"""Layers and hidden size."""

RESULT = "RESULT "
STEP_TOKENS = {"cpu": 2048, "cuda": 8192}
CLOCKS = {"cpu": "cpu_seconds", "cuda": "wall_seconds"}


@dataclass(frozen=True)
class Case:
    """One model and what is measured with it."""

    body: str
    vocab_size: int
    entries: tuple[int, ...]
    slow_entries: tuple[int, ...]
    rounds: int
    threads: int
    tokens: int
    chunk: int
    kinds: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Sample:
    """One variant in one round."""

    variant: str
    cpu_seconds: float
    wall_seconds: float


def build_model(folder: Path, case: Case) -> None:
    """A random Llama in bfloat16 whose logits have a standard deviation of 3."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden = BODIES[case.body]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=3 / hidden**0.5)
    model.save_pretrained(folder)


def make_sequences(case: Case) -> list[Any]:
    """Random tokens in sequences of 257 to 512, every position supervised."""
    from kdcache.format.record import TokenSequence, sequence_key

    rng, sequences, left = np.random.default_rng(0), [], case.tokens
    while left > 0:
        length = min(left, int(rng.integers(257, 513)))
        ids_N, all_N = rng.integers(0, case.vocab_size, length).astype(np.int32), np.ones(length, np.bool_)
        key = sequence_key(ids_N, all_N, "")
        sequences.append(TokenSequence(ids_N, all_N, np.zeros(length, np.uint8), np.zeros(1, np.int32), "random", key))
        left -= length
    return sequences


KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "threshold 0.02": ("threshold", {"tau": 0.02, "seed": 0}, {}),
    "sampled 50": ("sampled", {"num_draws": 50, "seed": 0}, {}),
    "top_k_sampled 16, 32": ("top_k_sampled", {"k": 16, "num_draws": 32, "seed": 0}, {}),
    "top_k 64, entropy, T = 2": ("top_k", {"k": 64}, {"entropy": True, "temperatures": (2.0,)}),
}


def selection_of(kind: str, params: dict[str, Any], beside: dict[str, Any]) -> Any:
    from kdcache.format.manifest import SelectionInfo

    return SelectionInfo(kind=kind, params=params, **beside)


def top_k(k: int) -> Any:
    return selection_of("top_k", {"k": k}, {})


class Variants:
    """The things that are timed, over one engine and one transformers model."""

    def __init__(self, folder: Path, case: Case) -> None:
        from kdcache.config.teacher import TeacherConfig, VllmConfig
        from kdcache.teacher import load_teacher

        common: dict[str, Any] = {
            "tokens_per_forward": STEP_TOKENS[case.device],
            "chunk_positions": case.chunk,
            "num_threads": case.threads,
        }
        self._case, self._sequences = case, make_sequences(case)
        self._vllm: Any = load_teacher(
            TeacherConfig(model=str(folder), backend="vllm", vllm=VllmConfig(route="worker"), **common)
        )
        self._load_hf = lambda: load_teacher(TeacherConfig(model=str(folder), backend="transformers", **common))

    @cached_property
    def _hf(self) -> Any:
        return self._load_hf()

    def prepared(self, name: str) -> Prepared:
        """For `peak_of`; the warm-up is the worker's on 32 tokens."""
        (short,) = make_sequences(replace(self._case, tokens=32))

        def warm_up() -> None:
            for _ in self._vllm.score([short], top_k(16)):
                pass

        return warm_up, dict(self.table())[name], self._vllm._chunk

    def table(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Name and call."""
        yield "prefill", self._prefill
        yield "limit", self._limit
        for k in self._case.entries:
            yield f"worker {k}", lambda k=k: self._score(self._vllm, top_k(k))
        for name, kind in KINDS.items() if self._case.kinds else ():
            yield f"worker {name}", lambda kind=kind: self._score(self._vllm, selection_of(*kind))
        for k in self._case.slow_entries:
            yield f"flat {k}", lambda k=k: [None for _ in self._vllm._score_publicly(self._sequences, top_k(k))]
            yield f"dict {k}", lambda k=k: self._generate(prompt_logprobs=k, logprobs=k)
            yield f"transformers {k}", lambda k=k: self._score(self._hf, top_k(k))

    def _score(self, teacher: Any, selection: Any) -> None:
        for _ in teacher.score(self._sequences, selection):
            pass

    def _prefill(self) -> None:
        self._generate()

    def _limit(self) -> None:
        from kdcache.teacher.vllm.wire import pack_requests

        self._vllm._call_workers("kdcache_begin", self._case.tokens, self._vllm._chunk, None, 0)
        self._generate([{"extra_args": extra_args} for extra_args in pack_requests(self._sequences)])
        self._vllm._call_workers("kdcache_end")

    def _generate(self, each: Sequence[dict[str, Any]] | None = None, **options: Any) -> None:
        import vllm

        fixed: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, **options}
        params = [vllm.SamplingParams(**fixed, **own) for own in each or [{}] * len(self._sequences)]
        self._vllm._generate(self._sequences, params)


def measure(name: str, call: Callable[[], None]) -> Sample:
    """Run it once."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Sample(name, cpu, wall)


def run_case(case: Case) -> list[Sample]:
    """All rounds of a model, in this process; the first one compiles and touches memory, and is not kept."""
    samples = []
    with tempfile.TemporaryDirectory() as name:
        build_model(Path(name), case)
        variants = Variants(Path(name), case)
        for number in range(case.rounds + 1):
            found = [measure(*variant) for variant in variants.table()]
            samples += found if number else []
    return samples


def run_peaks(case: Case) -> dict[str, dict[str, int]]:
    """Peak memory of plain prefill, of the limit, of the worker and of vLLM's own logprobs."""
    import transformers  # noqa: F401
    import vllm  # noqa: F401

    slow = [f"{way} {k}" for k in case.slow_entries for way in ("flat", "dict")]
    names = ["prefill", "limit", *(f"worker {k}" for k in case.entries), *slow]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        in_fork(lambda: build_model(folder, case))
        return {name: in_fork(lambda name=name: peak_of(lambda: Variants(folder, case).prepared(name))) for name in names}


def run_apart(case: Case, *options: str) -> Any:
    """`run_case`, or with --peaks `run_peaks`, in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), *options]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    (line,) = (line for line in output.splitlines() if line.startswith(RESULT))
    return json.loads(line.removeprefix(RESULT))


def median_of(result: dict[str, Any], variant: str, value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(value(sample) for sample in result["samples"] if sample["variant"] == variant)


def ratios(result: dict[str, Any], floor: str, variant: str, clock: str) -> list[float]:
    """The floor's seconds over the variant's, round by round."""
    by_name = {name: [s[clock] for s in result["samples"] if s["variant"] == name] for name in (floor, variant)}
    return [base / own for base, own in zip(by_name[floor], by_name[variant], strict=True)]


def make_table(report: dict[str, Any]) -> str:
    """Markdown; one block per model."""
    lines = ["# benchmarks/capture.py", "", report["machine"], ""]
    for result in report["results"]:
        case = result["case"]
        layers, hidden = BODIES[case["body"]]
        clock = CLOCKS[case.get("device", "cpu")]
        unit = clock.removesuffix("_seconds").replace("cpu", "CPU")
        lines += [
            f"## {case['body']} body ({layers} x {hidden}), vocabulary {case['vocab_size']}",
            "",
            f"{case['tokens']} tokens, {case['rounds']} rounds, {case['threads']} thread(s).",
            "",
            f"| variant, K | tokens per {unit} s | of prefill | of limit (rounds) | of limit, wall |",
            "|---|---|---|---|---|",
        ]
        for variant in dict.fromkeys(sample["variant"] for sample in result["samples"]):
            of_limit = ratios(result, "limit", variant, clock)
            lines.append(
                f"| {variant} | {case['tokens'] / median_of(result, variant, lambda s, clock=clock: s[clock]):,.0f} "
                f"| {statistics.median(ratios(result, 'prefill', variant, clock)):.3f} "
                f"| {statistics.median(of_limit):.3f} ({min(of_limit):.2f}-{max(of_limit):.2f}) "
                f"| {statistics.median(ratios(result, 'limit', variant, 'wall_seconds')):.3f} |"
            )
        lines += ["", *(memory_table(result["peaks"]) if "peaks" in result else []), "", *targets(result), ""]
    return "\n".join(lines)


def targets(result: dict[str, Any]) -> list[str]:
    """What was aimed at, and what came out."""
    lines, clock = [], CLOCKS[result["case"].get("device", "cpu")]
    for k in result["case"]["entries"]:
        of_limit = statistics.median(ratios(result, "limit", f"worker {k}", clock))
        lines.append(f"- K = {k}: {of_limit:.2f} of the limit; {'at least' if of_limit >= 0.9 else 'below'} 0.9")
        if k in result["case"]["slow_entries"]:
            faster = statistics.median(ratios(result, f"flat {k}", f"worker {k}", clock))
            most = statistics.median(ratios(result, f"flat {k}", "limit", clock))
            verdict = "at least 2" if faster >= 2 else f"below 2{', which is out of reach' if most < 2 else ''}"
            lines.append(f"- K = {k}: {faster:.1f} times flat logprobs, the limit {most:.1f} times; {verdict}")
    case = result["case"]
    sizes = ", ".join(f"{8 * k + 5} bytes per position at K = {k}" for k in case["entries"])
    memory = memory_target(result["peaks"], case["vocab_size"], case["tokens"], case["entries"]) if "peaks" in result else []
    return [*lines, f"- leaving the worker: {sizes}", *memory]


def tokens_for(body: str, vocab_size: int) -> int:
    """A few seconds per variant."""
    if body == "1b":
        return 262_144
    return {("thin", True): 16384, ("thin", False): 4096, ("deep", True): 4096, ("deep", False): 2048}[
        body, vocab_size < 100_000
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small model, under a minute")
    parser.add_argument("--kernel", action="store_true", help="the selections alone, per logit; no model")
    parser.add_argument("--peaks", action="store_true", help="peak memory alone; times are left as they are")
    parser.add_argument("--kinds", action="store_true", help="also the worker's other selections")
    add_argument(parser)
    for name, default in (
        ("bodies", ""),
        ("vocabs", "8192,32768,151936"),
        ("entries", "16,64,256"),
        ("slow-entries", "64"),
    ):
        parser.add_argument(f"--{name}", default=default)
    for name, default in (("rounds", 3), ("threads", 1), ("chunk", 512), ("tokens", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="folder for capture.json and capture.md; only printed without it")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def cases_of(args: argparse.Namespace) -> list[Case]:
    if args.quick:
        return [Case("thin", 8192, (16,), (16,), 1, args.threads, 2048, args.chunk, args.kinds, args.device)]
    entries, slow = (tuple(int(k) for k in text.split(",") if k) for text in (args.entries, args.slow_entries))
    models = [(body, int(vocab)) for body in args.bodies.split(",") for vocab in args.vocabs.split(",")]
    return [
        Case(
            body,
            vocab,
            entries,
            slow,
            args.rounds,
            args.threads,
            args.tokens or tokens_for(body, vocab),
            args.chunk,
            args.kinds,
            args.device,
        )
        for body, vocab in models
    ]


def run_kernels(args: argparse.Namespace) -> None:
    """Print the table of `capture_kernels`, and write it."""
    from capture_kernels import kernel_table

    selections = {f"top_k {k}": top_k(int(k)) for k in args.entries.split(",")}
    selections |= {name: selection_of(*kind) for name, kind in KINDS.items()}
    table = kernel_table(
        machine(args.device), [int(vocab) for vocab in args.vocabs.split(",")], selections, args.chunk, Device(args.device)
    )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "capture_kernels.md").write_text(table + "\n")
    print(table)


def machine(device: str) -> str:
    import torch
    import vllm

    return f"{Device(device).name}, {os.cpu_count()} cores, vLLM {vllm.__version__}, torch {torch.__version__}, bfloat16"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    args.device = chosen(args.device).kind
    args.bodies = args.bodies or {"cpu": "thin,deep", "cuda": "1b"}[args.device]
    if args.case:
        case = Case(**json.loads(args.case))
        print(RESULT + json.dumps(run_peaks(case) if args.peaks else [asdict(sample) for sample in run_case(case)]))
        return
    if args.peaks and args.device != "cpu":
        raise SystemExit("--peaks reads the memory of a process on a CPU; on a GPU vLLM takes its share at the start")
    if args.kernel:
        run_kernels(args)
        return
    report = kept_report(args.out) if args.peaks else {"machine": machine(args.device), "results": []}
    for case in cases_of(args):
        if args.peaks:
            result_of(report, case)["peaks"] = run_apart(case, "--peaks")
        else:
            found = {"case": asdict(case), "samples": run_apart(case)}
            found |= {"peaks": run_apart(case, "--peaks")} if args.device == "cpu" else {}
            report["results"].append(found)
        if args.out:  # after each model: a later one may be stopped
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "capture.json").write_text(json.dumps(report, indent=1) + "\n")
            (args.out / "capture.md").write_text(make_table(report) + "\n")
    print(make_table(report))


def kept_report(folder: Path | None) -> dict[str, Any]:
    """What an earlier run wrote there."""
    path = (folder or Path()) / "capture.json"
    if folder is None or not path.is_file():
        raise SystemExit("--peaks adds to a report: --out must name a folder with a capture.json")
    return json.loads(path.read_text())


def result_of(report: dict[str, Any], case: Case) -> dict[str, Any]:
    """The report's part about the same model."""
    same = [
        r for r in report["results"] if all(r["case"][key] == getattr(case, key) for key in ("body", "vocab_size", "tokens"))
    ]
    if not same:
        raise SystemExit(
            f"capture.json has no times of the {case.body} body with {case.vocab_size} ids and {case.tokens} tokens"
        )
    return same[0]


if __name__ == "__main__":
    main()
