"""What does distillation from cached entries cost a training step, beside plain cross-entropy?

Method: a Llama-shaped student of random weights, one packed batch, steps of forward, loss, backward, clipping and AdamW. Ours
are `kdcache.train.step.optimize`, as the trainer calls it. The baselines train on the labels alone: `F.cross_entropy` over
whole logits, and torch's fused `F.linear_cross_entropy`. Seconds of the process on a CPU, of the device on a GPU, where there
are larger cases and ours is timed with Triton's loss as well (`device.py`); variants interleaved; each ratio is the median
over rounds of variant / cross-entropy over whole logits of the same round. The loss's share of a step is what it takes beyond
the same step with next to no loss (means of the hidden states and of the weight).

    python benchmarks/train_step.py --list
    python benchmarks/train_step.py --case 32k-512-float32        a minute or two
    python benchmarks/train_step.py --quick --output FOLDER       a toy: shows that the script works

A case is merged into results/train_step.json under the device's name; results/train_step.md is made of that file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from device import add_argument, chosen
from loss import RESULTS
from loss_variants import make_inputs
from transformers import LlamaConfig, LlamaForCausalLM

from kdcache.config.train import LossConfig, StudentConfig, TrainConfig
from kdcache.loader.batches.batch import NO_TARGET
from kdcache.loader.torch_batches import TorchBatch
from kdcache.train.body import hidden_states, output_projection
from kdcache.train.step import make_optimizer, optimize

PLAIN = "cross-entropy, whole logits"
NO_LOSS = "no loss"
SEQUENCE = 256


@dataclass(frozen=True)
class Case:
    """A student and its batch: a few sequences of SEQUENCE tokens."""

    hidden: int
    layers: int
    vocab: int
    dtype: str
    rows: int

    def student(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        heads = max(1, self.hidden // 64)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocab,
                hidden_size=self.hidden,
                intermediate_size=self.hidden * 3,
                num_hidden_layers=self.layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=SEQUENCE,
                tie_word_embeddings=True,
            )
        ).train()

    def batch(self) -> TorchBatch:
        positions = self.rows * SEQUENCE
        ids_BT = torch.randint(0, self.vocab, (self.rows, SEQUENCE))
        end_B1 = torch.full((self.rows, 1), NO_TARGET)
        return TorchBatch(
            input_ids_BT=ids_BT,
            position_ids_BT=torch.arange(SEQUENCE).expand(self.rows, -1),
            segment_ids_BT=torch.ones(self.rows, SEQUENCE, dtype=torch.int32),
            cu_seqlens_G1=torch.arange(self.rows + 1) * SEQUENCE,
            target_ids_BT=torch.cat([ids_BT[:, 1:], end_B1], dim=1),
            flat_positions_P=torch.arange(positions),
            teacher=make_inputs(positions, 1, self.vocab, "float32").teacher,
            weights_P=torch.ones(positions),
            max_seqlen=SEQUENCE,
            num_sequences=self.rows,
            num_masked=0,
        )


CASES = {
    f"{label}-{hidden}-{dtype}": Case(hidden, 4, vocab, dtype, 8 if vocab < 1e5 else 4)
    for label, vocab in (("32k", 32_000), ("152k", 151_936))
    for hidden in (512, 1024)
    for dtype in ("float32", "bfloat16")
}
GPU_CASES = {
    f"{label}-2048-bfloat16-gpu": Case(2048, 8, vocab, "bfloat16", 32) for label, vocab in (("32k", 32_000), ("152k", 151_936))
}
QUICK = {"toy": Case(32, 1, 500, "float32", 2)}
Step = Callable[[], object]


def ours(student: LlamaForCausalLM, batch: TorchBatch, dtype: str, **loss: Any) -> Step:
    """The trainer's own step."""
    config = TrainConfig(
        cache="", out="", steps=1, dtype=dtype, student=StudentConfig(model=""), loss=LossConfig(**loss)  # type: ignore[arg-type]
    )  # fmt: skip
    optimizer = make_optimizer(student, config.optimizer)
    return lambda: optimize(student, optimizer, batch, config, 1e-4)


def by_hand(student: LlamaForCausalLM, batch: TorchBatch, dtype: str, loss: Callable[..., torch.Tensor]) -> Step:
    """The same step around another loss of (hidden states, weight, labels)."""
    config = TrainConfig(cache="", out="", steps=1, student=StudentConfig(model=""))
    optimizer, target_ids_P = make_optimizer(student, config.optimizer), batch.target_ids_BT.flatten()

    def step() -> None:
        with torch.autocast(target_ids_P.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden_PH = hidden_states(student, batch.input_ids_BT, batch.position_ids_BT).flatten(0, 1)
        hidden_PH = hidden_PH.to(getattr(torch, dtype))
        loss(hidden_PH, output_projection(student).weight.to(hidden_PH.dtype), target_ids_P).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def whole_cross_entropy(hidden_PH: torch.Tensor, weight_VH: torch.Tensor, target_ids_P: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy((hidden_PH @ weight_VH.T).float(), target_ids_P)


def no_loss(hidden_PH: torch.Tensor, weight_VH: torch.Tensor, target_ids_P: torch.Tensor) -> torch.Tensor:
    """Gradients for hidden states and weight from next to nothing."""
    del target_ids_P
    return hidden_PH.float().mean() + weight_VH.float().mean()


def steps_of(case: Case) -> dict[str, Step]:
    """Each with the same student, whose weights move a little: times do not depend on them."""
    student, batch, dtype = case.student(), case.batch(), case.dtype
    steps: dict[str, Step] = {
        NO_LOSS: by_hand(student, batch, dtype, no_loss),
        PLAIN: by_hand(student, batch, dtype, whole_cross_entropy),
        "ours, labels alone (alpha 0)": ours(student, batch, dtype, alpha=0.0),
        "ours, cached entries (alpha 1)": ours(student, batch, dtype, alpha=1.0),
        "ours, both (alpha 0.5)": ours(student, batch, dtype, alpha=0.5),
    }
    if batch.target_ids_BT.is_cuda:
        steps["ours, cached entries, triton"] = ours(student, batch, dtype, alpha=1.0, backend="triton")
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        fused = torch.nn.functional.linear_cross_entropy
        steps["F.linear_cross_entropy"] = by_hand(student, batch, dtype, fused)
    return steps


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One case, as it is kept in the results."""
    case, load, device = (CASES | GPU_CASES | QUICK)[name], os.getloadavg()[0], chosen(args.device)
    steps = steps_of(case)
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for round_number in range(args.rounds + 1):
        for variant, step in steps.items():
            spent = device.clock(step)
            if round_number > 0:  # the first compiles and touches memory
                seconds[variant].append(spent)
    variants = {
        variant: {
            f"{device.unit.lower()}_s": statistics.median(spent),
            "ratios": [own / plain for own, plain in zip(spent, seconds[PLAIN], strict=True)],
            "loss_share": statistics.median(1 - none / own for own, none in zip(spent, seconds[NO_LOSS], strict=True)),
        }
        for variant, spent in seconds.items()
    }
    said = {"case": name, **asdict(case), "threads": args.threads, "rounds": args.rounds}
    return said | {"cpu": device.name, "torch": torch.__version__, "load_before": round(load, 1), "variants": variants}


def merge(result: dict[str, Any], folder: Path) -> None:
    """Put the case in the place of an older one of the same processor; make the table anew."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train_step.json"
    results = json.loads(path.read_text()) if path.exists() else []
    results = [r for r in results if (r["cpu"], r["case"]) != (result["cpu"], result["case"])] + [result]
    path.write_text(json.dumps(results, indent=1) + "\n")
    (folder / "train_step.md").write_text(report(results))


def report(results: list[dict[str, Any]]) -> str:
    lines = ["<!-- made by benchmarks/train_step.py of train_step.json -->", ""]
    for r in sorted(results, key=lambda r: (r["cpu"], list(CASES | GPU_CASES | QUICK).index(r["case"]))):
        shape = f"{r['layers']} layers, H {r['hidden']}, V {r['vocab']}, {r['dtype']}, {r['rows']} x {SEQUENCE} tokens"
        lines += [
            f"## {r['case']}",
            "",
            f"{r['cpu']}, torch {r['torch']}, {r['threads']} thread(s); {shape}; load {r['load_before']}",
            "",
        ]
        unit = "gpu" if any("gpu_s" in v for v in r["variants"].values()) else "cpu"
        lines += [
            f"| step | {unit.upper()} s | / cross-entropy over whole logits | loss's share of the step |",
            "|---|---|---|---|",
        ]
        for name, v in r["variants"].items():
            spread = f"{statistics.median(v['ratios']):.2f} ({min(v['ratios']):.2f}-{max(v['ratios']):.2f})"
            lines.append(f"| {name} | {v[f'{unit}_s']:.3f} | {spread} | {v['loss_share']:.0%} |")
        ratio = statistics.median(r["variants"]["ours, cached entries (alpha 1)"]["ratios"])
        met = "met" if ratio <= 1.1 else "NOT met"
        lines += ["", f"A step with distillation within 1.10 of one with plain cross-entropy: {ratio:.2f}, {met}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true")
    what.add_argument("--case", choices=[*CASES, *GPU_CASES, *QUICK])
    what.add_argument("--all", action="store_true")
    what.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    add_argument(parser)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of train_step.json and train_step.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = chosen(args.device)
    device.use()
    cases = CASES if device.kind == "cpu" else GPU_CASES
    for name in [args.case] if args.case else QUICK if args.quick else cases:
        if args.list:
            print(name)
            continue
        result = measure(name, args)
        merge(result, args.output)
        print(report([result]))


if __name__ == "__main__":
    main()
