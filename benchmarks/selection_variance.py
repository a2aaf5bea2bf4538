"""What does a student lose to a sparse record of its teacher: how far are target and gradient from those of full distillation?

Method: a teacher's logits at P positions of text that it was not trained on, and a student that is the same model without its
last layer: weaker, and alike. Every selection makes records of these positions, with R seeds where it draws, by the code that
captures use. From each record comes the target that its loss trains towards, t, and the gradient of that loss by the output
weight, H^T (sum(t) q - t), q the student's distribution and H its states. Beside it stands full distillation: t = p.

- error: mean over positions and seeds of |t - p|^2. Of an unbiased scheme it is the variance, of top-k the bias squared.
- bias: the same of t's mean over the seeds, less the variance's share: what more data does not average away.
- cosine: of the angle between the gradients of all P positions together.
- ids, bytes: mean entries and `packed` bytes per position, framing and the text's own tokens apart.

Targets: `top_k` with its tail as one bucket, spread as the student has it (kdcache's loss) and renormalised (what is done
elsewhere); all others their entries as they are (tail `drop`).

    python benchmarks/selection_variance.py [--teacher FOLDER] [--positions 512] [--repeats 8] [--quick] [--out FOLDER]

The teacher is what tools/train_teacher.py makes, or any causal model in the Llama layout. Without one a small random model is
made, which proves that the script works and nothing else. Writes selection_variance.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor

from kdcache.codec import get_codec
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions, TokenSequence, sequence_key
from kdcache.format.selection import fixed_entries
from kdcache.teacher.select.found import Found, Selected, record_of
from kdcache.teacher.select.torch_selector import Selector
from kdcache.teacher.select.uniforms import position_states

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

SIZES: dict[str, list[dict[str, Any]]] = {
    "top_k, bucket": [{"k": k} for k in (4, 8, 16, 32, 64)],
    "top_k, renormalised": [{"k": k} for k in (4, 8, 16, 32, 64)],
    "top_p_k, bucket": [{"p": p, "k": 64} for p in (0.5, 0.8, 0.95)],
    "sampled": [{"num_draws": n} for n in (6, 12, 25, 50, 100)],
    "threshold": [{"tau": tau} for tau in (0.16, 0.08, 0.04, 0.02, 0.01)],
    "top_k_sampled": [{"k": k, "num_draws": n} for k, n in ((2, 4), (4, 8), (8, 16), (16, 32))],
}
AT_IDS, AT_BYTES = (8, 16, 24), (12, 24, 36)


@dataclass(frozen=True)
class Positions:
    """What is known of P positions: sequences, teacher's logits, student's states and logits."""

    name: str
    sequences: list[TokenSequence]
    teacher_PV: Tensor
    student_PH: Tensor
    student_PV: Tensor


@dataclass(frozen=True)
class Point:
    """One scheme at one size."""

    scheme: str
    params: dict[str, Any]
    ids: float
    bytes: float
    error: float
    bias: float
    cosine: float


@dataclass
class Seeds:
    """Sums over the seeds of one point."""

    ids: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)


def random_model(folder: Path) -> None:
    """A random Llama whose logits have a standard deviation of 3."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2000, max_position_embeddings=256, **shape))
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=3 / 8)
    model.save_pretrained(folder)


def texts_of(folder: Path, vocab_size: int, num_tokens: int) -> np.ndarray:
    """Ids of the standard library's documents that train_teacher leaves out; random ones without a tokenizer."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return np.random.default_rng(0).integers(0, vocab_size, num_tokens).astype(np.int32)
    from teacher_text import split_of, standard_library

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    for document in standard_library():
        if split_of(document.source) != "train" and len(ids) < num_tokens:
            ids += tokenizer(document.text, add_special_tokens=False)["input_ids"]
    return np.array(ids[:num_tokens], np.int32)


def plain_sequence(ids_N: np.ndarray) -> TokenSequence:
    supervised_N = np.arange(len(ids_N)) < len(ids_N) - 1
    key = sequence_key(ids_N, supervised_N, "")
    return TokenSequence(ids_N, supervised_N, np.zeros(len(ids_N), np.uint8), np.zeros(1, np.int32), "text", key)


@torch.inference_mode()
def positions_of(folder: Path, name: str, num_positions: int) -> Positions:
    """Run teacher and student over sequences of 129 tokens."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids_N = texts_of(folder, model.config.vocab_size, num_positions // 128 * 129)
    sequences = [plain_sequence(ids_N[start : start + 129]) for start in range(0, len(ids_N), 129)]
    teacher, student = [], []
    for sequence in sequences:
        ids_1N = torch.from_numpy(sequence.input_ids_N.astype(np.int64))[None]
        output = model(ids_1N, use_cache=False, output_hidden_states=True)
        teacher.append(output.logits[0, :-1].float())
        # hidden_states[-1] has been through the final norm; the one before it is the last layer's input.
        student.append(model.base_model.norm(output.hidden_states[-2])[0, :-1].float())
    student_PH = torch.cat(student)
    return Positions(name, sequences, torch.cat(teacher), student_PH, model.get_output_embeddings()(student_PH).float())


def records_of(positions: Positions, selection: SelectionInfo) -> list[Distributions]:
    """As a capture would make them, one per sequence."""
    selector, records, start = Selector(selection, positions.teacher_PV.shape[-1]), [], 0
    for sequence in positions.sequences:
        here = slice(start, start + len(sequence.positions_P))
        states_P = position_states(selection.params.get("seed", 0), sequence.key, sequence.positions_P).view(np.int64)
        targets_P = torch.from_numpy(sequence.target_ids_P.astype(np.int64))
        found = selector.select(positions.teacher_PV[here], targets_P, torch.from_numpy(states_P))
        records.append(record_of(sequence, selection, Found.from_padded(Selected(*(tensor.numpy() for tensor in found)))))
        start = here.stop
    return records


def bytes_of(records: list[Distributions], selection: SelectionInfo, vocab_size: int) -> float:
    """Per position: the packed codec's columns, and the number of entries where it varies."""
    columns = get_codec("packed", {"vocab_size": vocab_size}, selection).encode(records)
    num_positions = sum(record.num_positions for record in records)
    offsets = sum(8 * len(record.offsets_P1[:1]) for record in records)  # Arrow's, of a sequence
    return (sum(column.nbytes for column in columns) - offsets) / num_positions + 2 * (fixed_entries(selection) is None)


def targets_of(records: list[Distributions], scheme: str, q_PV: Tensor) -> Tensor:
    """(P, V) what the loss over these entries trains towards."""
    target_PV, start = torch.zeros_like(q_PV), 0
    for record in records:
        rows_E = start + np.repeat(np.arange(record.num_positions), record.num_entries_P)
        target_PV[torch.from_numpy(rows_E), torch.from_numpy(record.token_ids_E.astype(np.int64))] = torch.from_numpy(
            np.exp(record.logprobs_E)
        )
        start += record.num_positions
    if scheme.endswith("renormalised"):
        return target_PV / target_PV.sum(dim=-1, keepdim=True)
    if scheme.endswith("bucket"):
        outside_PV = torch.where(target_PV > 0, 0.0, q_PV)
        tail_P1 = torch.from_numpy(np.concatenate([record.tail_mass_P for record in records]))[:, None]
        return target_PV + tail_P1 * outside_PV / outside_PV.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    return target_PV


def gradient(positions: Positions, q_PV: Tensor, target_PV: Tensor) -> Tensor:
    """(H, V) of the loss with respect to the output weight, transposed."""
    return positions.student_PH.T @ (target_PV.sum(dim=-1, keepdim=True) * q_PV - target_PV)


def measure(positions: Positions, scheme: str, params: dict[str, Any], repeats: int) -> Point:
    """One scheme at one size, over the seeds."""
    p_PV, q_PV = positions.teacher_PV.softmax(dim=-1), positions.student_PV.softmax(dim=-1)
    full_HV = gradient(positions, q_PV, p_PV)
    kind, seeds, mean_PV = scheme.split(",")[0], Seeds(), torch.zeros_like(p_PV)
    draws = kind in ("sampled", "threshold", "top_k_sampled")
    num_seeds = repeats if draws else 1
    for seed in range(num_seeds):
        selection = SelectionInfo(kind=kind, params=params | ({"seed": seed} if draws else {}))
        records = records_of(positions, selection)
        target_PV = targets_of(records, scheme, q_PV)
        seeds.ids.append(sum(record.num_entries for record in records) / len(p_PV))
        seeds.bytes.append(bytes_of(records, selection, p_PV.shape[-1]))
        seeds.errors.append(float(((target_PV - p_PV) ** 2).sum(dim=-1).mean()))
        own_HV = gradient(positions, q_PV, target_PV)
        seeds.cosines.append(float((own_HV * full_HV).sum() / (own_HV.norm() * full_HV.norm())))
        mean_PV += target_PV / num_seeds
    error = float(np.mean(seeds.errors))
    of_mean = float(((mean_PV - p_PV) ** 2).sum(dim=-1).mean())
    # E|mean - p|^2 = bias^2 + variance / R, and the error is bias^2 + variance.
    bias = of_mean if num_seeds == 1 else max(0.0, (num_seeds * of_mean - error) / (num_seeds - 1))
    numbers = (float(np.mean(values)) for values in (seeds.ids, seeds.bytes))
    return Point(scheme, params, *numbers, error, bias, float(np.mean(seeds.cosines)))


def at(points: Sequence[Point], axis: str, where: float) -> tuple[float, float] | None:
    """Error and sine of the angle at a number of ids or bytes, linear in logarithms between sizes; None outside them."""
    ordered = sorted(points, key=lambda point: getattr(point, axis))
    sizes = np.log([getattr(point, axis) for point in ordered])
    if len(ordered) < 2 or not sizes[0] <= np.log(where) <= sizes[-1]:
        return None
    errors = np.log([max(point.error, 1e-30) for point in ordered])
    sines = np.log([max(1 - point.cosine**2, 1e-30) / 2 for point in ordered])
    return float(np.exp(np.interp(np.log(where), sizes, errors))), float(np.exp(np.interp(np.log(where), sizes, sines)))


def compared(points: Sequence[Point], axis: str, sizes: Sequence[float]) -> Iterator[str]:
    """Rows of a table at equal sizes."""
    yield f"| at equal {axis} | " + " | ".join(f"{size} {axis}: error, 1 - cosine" for size in sizes) + " |"
    yield "|---" * (len(sizes) + 1) + "|"
    for scheme in SIZES:
        own = [point for point in points if point.scheme == scheme]
        cells = [f"{found[0]:.2e}, {found[1]:.1e}" if (found := at(own, axis, size)) else "-" for size in sizes]
        yield f"| {scheme} | {' | '.join(cells)} |"
    yield ""


EXPECTED = {"ids": 3.0, "bytes": 3.5}
"""Times less variance than Random Sampling KD that simulations promised."""


def against_sampled(points: Sequence[Point]) -> Iterator[str]:
    """How many times less error `threshold` has than `sampled`, beside what was expected."""
    for axis, sizes in (("ids", AT_IDS), ("bytes", AT_BYTES)):
        ratios = []
        for size in sizes:
            drawn, ours = (at([p for p in points if p.scheme == scheme], axis, size) for scheme in ("sampled", "threshold"))
            if drawn and ours:
                ratios.append((drawn[0] / ours[0], f"{drawn[0] / ours[0]:.1f} at {size}"))
        verdict = "reached" if ratios and max(ratios)[0] >= EXPECTED[axis] else "not reached"
        said = ", ".join(text for _, text in ratios) or "no size in common"
        yield f"- `threshold` has times less error than `sampled` at equal {axis}: {said}; expected {EXPECTED[axis]}: {verdict}"


def make_table(name: str, num_positions: int, points: Sequence[Point]) -> str:
    """Markdown: all points, then at equal ids and at equal bytes."""
    lines = ["# benchmarks/selection_variance.py", "", f"{name}, {num_positions} positions.", "", *against_sampled(points), ""]
    lines += ["| scheme | size | ids | bytes | error | bias | cosine |", "|---|---|---|---|---|---|---|"]
    for p in points:
        size = ", ".join(f"{key} {value}" for key, value in p.params.items())
        lines.append(f"| {p.scheme} | {size} | {p.ids:.1f} | {p.bytes:.1f} | {p.error:.2e} | {p.bias:.1e} | {p.cosine:.5f} |")
    return "\n".join([*lines, "", *compared(points, "ids", AT_IDS), *compared(points, "bytes", AT_BYTES)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="folder of a causal language model")
    parser.add_argument("--positions", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--repeats", type=int, default=8, help="seeds of what is drawn")
    parser.add_argument("--quick", action="store_true", help="128 positions, 2 seeds, every other size")
    parser.add_argument("--out", type=Path, help="folder for selection_variance.json and .md; only printed without it")
    args = parser.parse_args(arguments)
    num_positions, repeats = (128, 2) if args.quick else (args.positions, args.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.teacher or Path(scratch)
        if args.teacher is None:
            random_model(folder)
        positions = positions_of(folder, args.teacher.name if args.teacher else "a random model", num_positions)
    sizes = {scheme: params[:: 2 if args.quick else 1] for scheme, params in SIZES.items()}
    points = [measure(positions, scheme, one, repeats) for scheme, params in sizes.items() for one in params]
    name = f"Teacher: {positions.name}, {positions.teacher_PV.shape[-1]:,} ids; {repeats} seeds"
    table = make_table(name, len(positions.teacher_PV), points)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        report = {"teacher": name, "positions": len(positions.teacher_PV), "points": [asdict(point) for point in points]}
        (args.out / "selection_variance.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "selection_variance.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
